"""10x Genomics Visium: Space Ranger folders with tissue_positions of version 1 or 2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.geometry.lattice import VISIUM_PITCH_UM, VISIUM_SPOT_UM, fitted, hexagonal_um, with_shift
from stsr.histology import files as he
from stsr.histology.image import Image, scaling
from stsr.platforms.source import Options, Source, Spots, choose_genes
from stsr.platforms.tenx import read_matrix

if TYPE_CHECKING:
    import pandas as pd

NAME = "visium"

_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_MATRIX = ("filtered_feature_bc_matrix.h5", "*filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_FULL = ("*fullres*", "*full_image*", "*image*")
_ENDINGS = (*he.TIFF_ENDINGS, ".jpg", ".jpeg", ".png")
_BEND = (
    0.15  # of the pitch: largest distance of a spot from the lattice; rounding to whole pixels stays below
)
_INSIDE = 0.9  # least share of the spots inside the image; with fewer it is another image


def recognises(path: Path) -> bool:
    """Whether the folder, or its ``outs``, is Space Ranger's."""
    return _folder(path) is not None


def read(path: Path, options: Options) -> Source:
    """Read a Space Ranger folder.

    Parameters
    ----------
    path
        The folder with ``spatial``, or the folder of the run above it.
    options
        Full-resolution image, um per pixel, genes. An alignment, if given, maps pixels of the image to um.

    Returns
    -------
    Source
        Coordinates are pixels of the full-resolution image times its pixel size, which is measured on the spots'
        lattice.

    Raises
    ------
    StsrError
        If a file is missing or damaged, the spots form no lattice, or the image is not that of the spots.
    """
    folder = _folder(path)
    if folder is None:
        raise StsrError(f"{path} is not a Space Ranger folder; give the one with the folder spatial")
    if (folder / "binned_outputs").is_dir() or find(folder / "spatial", "tissue_positions.parquet"):
        raise StsrError(
            f"{folder} is Visium HD, whose bins are not spots; give a Visium (v1 or v2) output folder"
        )
    positions = _positions(need(folder / "spatial", *_POSITIONS, what="positions of the spots"))
    counts = read_matrix(need(folder, *_MATRIX, what="counts per spot"))
    genes = choose_genes(list(counts.var_names), options.genes, str(folder))
    positions = _in_tissue(positions, counts.obs_names, folder)
    measured_um = lattice_um_per_px(positions)
    um_per_px = options.um_per_px or measured_um
    he.check_pixel(scaling(um_per_px), measured_um, f"the lattice of spots in {folder}")
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)  # x is the column
    warnings: list[str] = []
    image = _image(path, folder, options, pixels, um_per_px, warnings)
    table = counts[positions.index, genes].copy()
    table.obs["array_row"], table.obs["array_col"] = positions["array_row"], positions["array_col"]
    return Source(
        name=folder.parent.name if folder.name == "outs" else folder.name,
        platform=NAME,
        genes=genes,
        image=image,
        spots=Spots(pixels * um_per_px, "disc", VISIUM_SPOT_UM, table),
        warnings=warnings,
        facts={"um_per_fullres_px": round(um_per_px, 6), "folder": folder.name},
    )


def lattice_um_per_px(positions: pd.DataFrame) -> float:
    """um per full-resolution pixel, from the lattice of spots, whose pitch is 100 um on every slide.

    ``spot_diameter_fullres`` is not used: it refers to spots of 65 um in some versions of Space Ranger, 55 in others.

    Parameters
    ----------
    positions
        Table with ``array_row``, ``array_col`` and the two pixel columns.

    Raises
    ------
    StsrError
        If there are too few spots, or they do not lie on a lattice.
    """
    rows, columns = positions["array_row"].to_numpy(float), positions["array_col"].to_numpy(float)
    if len(rows) < 4 or np.ptp(rows) == 0 or np.ptp(columns) == 0:
        raise StsrError(
            f"{len(rows)} spots in tissue are too few to measure the pixel size; give a whole section"
        )
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    px_per_um, misfit_px = fitted(with_shift(hexagonal_um(rows, columns)), pixels)
    if not px_per_um > 0 or misfit_px > _BEND * px_per_um * VISIUM_PITCH_UM:
        raise StsrError(
            "the spots' pixel positions do not follow their array rows and columns; check tissue_positions"
        )
    return 1.0 / px_per_um


def _folder(path: Path) -> Path | None:
    for folder in (path, path / "outs"):
        if (folder / "spatial").is_dir() and (
            find(folder / "spatial", *_POSITIONS) or find(folder, *_MATRIX)
        ):
            return folder
        if (folder / "binned_outputs").is_dir():
            return folder
    return None


def _positions(file: Path) -> pd.DataFrame:
    """Positions of all spots, indexed by barcode; files of version 1 have no header."""
    import pandas as pd

    with reading(file):
        with file.open() as lines:
            has_header = lines.readline().startswith("barcode")
        table = pd.read_csv(file, header=0 if has_header else None, names=None if has_header else _COLUMNS)
        table = table[_COLUMNS].set_index("barcode")
        return table.astype(dict.fromkeys(_COLUMNS[1:], float)).astype({"in_tissue": int})


def _in_tissue(positions: pd.DataFrame, barcodes: Sequence[str], folder: Path) -> pd.DataFrame:
    """Positions of the spots in tissue that have counts, in the order of the matrix."""
    joined = [barcode for barcode in barcodes if barcode in positions.index]
    if not joined:
        raise StsrError(
            f"no barcode of the matrix in {folder} is in its table of positions; give files of the same section"
        )
    if len(joined) < len(barcodes):
        raise StsrError(
            f"{len(barcodes) - len(joined)} of {len(barcodes)} barcodes of the matrix in {folder} are missing in its "
            f"table of positions, which is cut short or of another section; copy it again from its source"
        )
    positions = positions.loc[joined]
    kept = positions[positions["in_tissue"] == 1]
    if not len(kept):
        raise StsrError(
            f"no tissue found: no spot in {folder} is marked as in tissue; check tissue_positions"
        )
    return kept


# ---------------------------------------------------------------------------------------------------- image


def _image(
    path: Path, folder: Path, options: Options, pixels: np.ndarray, um_per_px: float, warnings: list[str]
) -> Image | None:
    image = options.he or _found(path, folder)
    if image is not None:
        levels, _ = he.open_levels(image)
        if options.alignment is not None:
            px_to_um = he.read_alignment(options.alignment)
            he.check_pixel(px_to_um, None, image.name)
            return Image(levels, px_to_um, path=image)
        _check_inside(levels[0], pixels, image, 1.0)
        return Image(levels, scaling(um_per_px), path=image)
    image = find(folder / "spatial", "tissue_hires_image.png", "tissue_hires_image.*", "*hires_image.png")
    if image is None:
        warnings.append(f"no image in {folder}: superres needs one; add the full-resolution image with --he")
        return None
    factor = _hires_factor(need(folder / "spatial", "scalefactors_json.json", what="the scale of the images"))
    levels, _ = he.open_levels(image)
    _check_inside(levels[0], pixels, image, factor)
    warnings.append(
        f"only {image.name} ({um_per_px / factor:.3g} um per pixel) is available and cells are not resolved; give the "
        f"full-resolution image with --he"
    )
    return Image(levels, scaling(um_per_px / factor), path=image)


def _found(path: Path, folder: Path) -> Path | None:
    """The full-resolution image, if it lies beside the results."""
    for place in dict.fromkeys((folder, path)):
        for pattern in _FULL:
            for file in sorted(place.glob(pattern)):
                small = "hires" in file.name or "lowres" in file.name
                if file.name.lower().endswith(_ENDINGS) and not small:
                    return file
    return None


def _hires_factor(file: Path) -> float:
    with reading(file):
        factor = float(json.loads(file.read_text())["tissue_hires_scalef"])
        if not 0 < factor <= 1.5:
            raise ValueError(f"tissue_hires_scalef is {factor}")
    return factor


def _check_inside(level: Any, pixels: np.ndarray, image: Path, factor: float) -> None:
    """Refuse an image that most spots lie outside of; positions are in full-resolution pixels."""
    _, height, width = level.shape
    x, y = pixels.T * factor
    inside = float(np.mean((x >= 0) & (x < width) & (y >= 0) & (y < height)))
    if inside < _INSIDE:
        raise StsrError(
            f"only {inside:.0%} of the spots lie in {image.name} ({width} x {height} pixels): it is not the image that "
            f"Space Ranger was run on; give that one with --he"
        )
