"""10x Genomics Visium HD: Space Ranger's ``binned_outputs``, whole or in part, and ``feature_slice.h5``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stsr.errors import StsrError
from stsr.files import find, need
from stsr.histology import files as he
from stsr.histology.image import um_per_px_of
from stsr.platforms.source import Bins, Options, Source
from stsr.platforms.spaceranger import MATRICES, Registration, open_image, scale_factors
from stsr.platforms.visium_hd import matrix, slices
from stsr.platforms.visium_hd.positions import Positions, read_positions

NAME = "visium_hd"

_SQUARE = re.compile(r"^square_(\d{3})um$")
_POSITIONS = ("tissue_positions.parquet", "*tissue_positions.parquet")
_SLICES = ("feature_slice.h5", "*feature_slice.h5")
_BINNED = "binned_outputs"


def recognises(path: Path) -> bool:
    """Whether the path is a run of Visium HD, its ``outs``, ``binned_outputs`` or one ``square_*`` folder."""
    return path.is_dir() and bool(_folder(path).squares or _folder(path).slices)


def read(path: Path, options: Options) -> Source:
    """Read the output of Space Ranger for a Visium HD slide.

    The counts of the finest bins available are streamed: those of a ``square_*`` folder, or of 2 um from
    ``feature_slice.h5``; those of the folder itself if it is one of the ``square_*`` folders.

    Parameters
    ----------
    path
        The folder of the run, its ``outs``, ``binned_outputs``, or one of the ``square_*`` folders.
    options
        Full-resolution image, um per pixel, genes. An alignment, if given, maps pixels of the image to um.

    Returns
    -------
    Source
        Coordinates are those of the array: a bin's row and column times its size.

    Raises
    ------
    StsrError
        If a file is missing or damaged, positions do not follow the array, or the image is not that of the bins.
    """
    folder = _folder(path)
    warnings: list[str] = []
    positions = _positions(folder, warnings)
    bins, genes, file = _bins(folder, positions, options)
    um_per_px = um_per_px_of(positions.px_to_um)
    named_um = options.um_per_px or positions.named_um_per_px
    he.check_pixel(positions.px_to_um, named_um, f"the image that {positions.file.name} refers to")
    registration = Registration(positions.px_to_um, positions.pixels, "bins")
    image = open_image(folder.around, folder.spatial, options, registration, warnings)
    return Source(
        name=folder.name,
        platform=NAME,
        genes=genes,
        image=image,
        bins=bins,
        warnings=warnings,
        facts={
            "folder": folder.name,
            "counts_from": file.name,
            "counts_bin_um": bins.bin_um,
            "um_per_fullres_px": round(um_per_px, 6),
            "positions_misfit_um": round(positions.misfit_um, 3),
        },
    )


# ---------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class _Folder:
    """What was found of a run."""

    squares: dict[float, Path]
    """Bin size, um: its folder; finest first."""
    slices: Path | None
    """``feature_slice.h5``."""
    around: tuple[Path, ...]
    """Folders in which the full-resolution image may lie."""
    name: str

    @property
    def spatial(self) -> Path:
        """Folder with the hires image."""
        beside = [square / "spatial" for square in self.squares.values()]
        beside += [folder / "spatial" for folder in self.around]
        found = (place for place in beside if find(place, "*hires_image.*"))
        return next(found, beside[0])


def _folder(path: Path) -> _Folder:
    """What there is at a path. Of a run, the images around; of one ``square_*`` folder, no other counts."""
    path = path.resolve()
    binned = [path, path / _BINNED, path / "outs" / _BINNED]
    squares = {size: square for place in binned for size, square in _squares(place).items()}
    one = None if squares else _own_bin_um(path)
    tops = [path, path / "outs"]
    if one is not None:
        squares, tops = {one: path}, [path, path.parent]
    if tops[-1].name == _BINNED or path.name == _BINNED:
        tops.append(path.parent if path.name == _BINNED else path.parent.parent)
    if tops[-1].name == "outs" and tops[-1].parent != path:
        tops.append(tops[-1].parent)
    places = [place for top in tops for place in (top, top / "microscope_image") if place.is_dir()]
    slices = None if one else next((file for place in places if (file := find(place, *_SLICES))), None)
    return _Folder(dict(sorted(squares.items())), slices, tuple(places), _name(path))


def _squares(place: Path) -> dict[float, Path]:
    """``square_*`` folders {bin size, um: folder} of a folder."""
    found = {}
    for child in place.iterdir() if place.is_dir() else ():
        if (match := _SQUARE.match(child.name)) and child.is_dir():
            found[float(match[1])] = child
    return found


def _own_bin_um(path: Path) -> float | None:
    """Bin size, um, if the folder is itself that of one bin size; None otherwise."""
    if match := _SQUARE.match(path.name):
        return float(match[1])
    factors = find(path / "spatial", "scalefactors_json.json")
    if factors is None or find(path, *MATRICES) is None:
        return None
    size = scale_factors(factors).get("bin_size_um")
    return float(size) if isinstance(size, int | float) and size > 0 else None


def _name(path: Path) -> str:
    """Name of the run: that of the first folder above that Space Ranger did not name."""
    while (path.name in ("outs", _BINNED) or _SQUARE.match(path.name)) and path.parent.name:
        path = path.parent
    return path.name


# ----------------------------------------------------------------------------------------------------- files


def _positions(folder: _Folder, warnings: list[str]) -> Positions:
    """Positions of the finest bins that have a table, else those in ``feature_slice.h5``."""
    for bin_um, square in folder.squares.items():
        file = find(square / "spatial", *_POSITIONS)
        if file is not None:
            factors = find(square / "spatial", "scalefactors_json.json")
            named = scale_factors(factors).get("microns_per_pixel") if factors else None
            if not factors:
                warnings.append(
                    f"scalefactors_json.json is missing in {square / 'spatial'}: pixels are not checked"
                )
            return read_positions(file, bin_um, float(named) if named else None)
    if folder.slices is not None:
        return slices.read_positions(folder.slices)
    square = next(iter(folder.squares.values()))
    raise StsrError(
        f"tissue_positions.parquet (positions of the bins) is missing in {square / 'spatial'}; copy it, or "
        f"feature_slice.h5, from the output of Space Ranger"
    )


def _bins(folder: _Folder, positions: Positions, options: Options) -> tuple[Bins, list[str], Path]:
    """The stream of the finest counts, the panel, and the file they are read from."""
    matrices = {size: find(square, *MATRICES) for size, square in folder.squares.items()}
    found = [(size, file) for size, file in matrices.items() if file is not None]
    if folder.slices is not None and (not found or found[0][0] != slices.BIN_UM):
        bin_um, file = slices.BIN_UM, folder.slices
        open_stream = partial(slices.open_stream, file)
        in_tissue = slices.read_tissue(file)
    else:
        if not found:
            need(next(iter(folder.squares.values())), *MATRICES, what="counts per bin")
        bin_um, file = found[0]
        open_stream = partial(matrix.open_stream, file, positions, bin_um)
        in_tissue = None
    in_tissue = positions.in_tissue_at(bin_um) if in_tissue is None else in_tissue
    stream, genes, entries = open_stream(in_tissue, options.genes)
    return Bins(stream, bin_um, in_tissue, entries), genes, file
