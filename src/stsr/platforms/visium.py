"""10x Genomics Visium: Space Ranger folders with tissue_positions of version 1 or 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.geometry.measurement import VISIUM_PITCH_UM, VISIUM_SPOT_UM
from stsr.histology import files as he
from stsr.platforms.source import Options, Source, Spots, choose_genes
from stsr.platforms.tenx import read_matrix

NAME = "visium"

_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_MATRIX = ("filtered_feature_bc_matrix.h5", "*filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_FULL = ("*fullres*", "*full_image*", "*image*")
_ENDINGS = (*he.TIFF_ENDINGS, ".jpg", ".jpeg", ".png")
_BEND = (
    0.15  # of the pitch: how far spots may lie from a perfect lattice; rounding to whole pixels is below this
)
_INSIDE = 0.9  # of the spots; more outside and the image is another one


def recognises(path: Path) -> bool:
    """Whether the folder, or its ``outs``, is Space Ranger's."""
    return _folder(path) is not None


def read(path: Path, options: Options) -> Source:
    """Read a Space Ranger folder.

    Parameters
    ----------
    path
        The folder with ``spatial``, or the run above it.
    options
        Full-resolution image, um per pixel, genes. An alignment, if given, goes from pixels of the image to um.

    Returns
    -------
    Source
        um are pixels of the full-resolution image times its pixel size, which is measured on the spots' lattice.

    Raises
    ------
    StsrError
        If a file is missing or damaged, the spots are no lattice, or the image is not that of the spots.
    """
    folder = _folder(path)
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
    he.check_pixel(he.scaling(um_per_px), measured_um, f"the lattice of spots in {folder}")
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)  # x is the column
    warnings: list[str] = []
    picture = _picture(path, folder, options, pixels, um_per_px, warnings)
    table = counts[positions.index, genes].copy()
    table.obs["array_row"], table.obs["array_col"] = positions["array_row"], positions["array_col"]
    return Source(
        name=folder.parent.name if folder.name == "outs" else folder.name,
        platform=NAME,
        genes=genes,
        picture=picture,
        spots=Spots(pixels * um_per_px, "disc", VISIUM_SPOT_UM, table),
        warnings=warnings,
        facts={"um_per_fullres_px": round(um_per_px, 6), "folder": folder.name},
    )


def lattice_um_per_px(positions) -> float:
    """um per full-resolution pixel, from the lattice: neighbours lie 100 um apart on every slide.

    ``spot_diameter_fullres`` is not used: Space Ranger's value is of 65 um spots in some versions, 55 in others.

    Parameters
    ----------
    positions
        DataFrame with ``array_row``, ``array_col`` and the two pixel columns.

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
    lattice = np.stack(
        [columns * VISIUM_PITCH_UM / 2, rows * VISIUM_PITCH_UM * np.sqrt(3) / 2, np.ones_like(rows)], 1
    )
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    px_per_um, *_ = np.linalg.lstsq(lattice, pixels, rcond=None)  # (3, 2)
    size = abs(np.linalg.det(px_per_um[:2])) ** 0.5
    bend = np.abs(lattice @ px_per_um - pixels).max() / max(size * VISIUM_PITCH_UM, 1e-9)
    if not size > 0 or bend > _BEND:
        raise StsrError(
            "the spots' pixel positions do not follow their array rows and columns; check tissue_positions"
        )
    return 1.0 / size


def _folder(path: Path) -> Path | None:
    for folder in (path, path / "outs"):
        if (folder / "spatial").is_dir() and (
            find(folder / "spatial", *_POSITIONS) or find(folder, *_MATRIX)
        ):
            return folder
        if (folder / "binned_outputs").is_dir():
            return folder
    return None


def _positions(file: Path):
    """Positions of all spots, indexed by barcode; version 1 has no header."""
    import pandas as pd

    with reading(file):
        with file.open() as lines:
            has_header = lines.readline().startswith("barcode")
        table = pd.read_csv(file, header=0 if has_header else None, names=None if has_header else _COLUMNS)
        table = table[_COLUMNS].set_index("barcode")
        return table.astype(dict.fromkeys(_COLUMNS[1:], float)).astype({"in_tissue": int})


def _in_tissue(positions, barcodes, folder: Path):
    """Spots that lie in tissue and have counts, in the order of the matrix."""
    joined = [barcode for barcode in barcodes if barcode in positions.index]
    if not joined:
        raise StsrError(
            f"no barcode of the matrix in {folder} is in its table of positions; they are of other sections"
        )
    if len(joined) < len(barcodes):
        raise StsrError(
            f"{len(barcodes) - len(joined)} of {len(barcodes)} barcodes of the matrix in {folder} have no place in its "
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


def _picture(
    path: Path, folder: Path, options: Options, pixels, um_per_px: float, warnings
) -> he.Picture | None:
    image = options.he or _found(path, folder)
    if image is not None:
        levels, _ = he.open_levels(image)
        if options.alignment is not None:
            px_to_um = he.read_alignment(options.alignment)
            he.check_pixel(px_to_um, None, image.name)
            return he.Picture(levels, px_to_um, image)
        _check_inside(levels[0], pixels, image, 1.0)
        return he.Picture(levels, he.scaling(um_per_px), image)
    image = find(folder / "spatial", "tissue_hires_image.png", "tissue_hires_image.*", "*hires_image.png")
    if image is None:
        warnings.append(f"no image in {folder}: superres needs one; add the full-resolution image with --he")
        return None
    factor = _hires_factor(need(folder / "spatial", "scalefactors_json.json", what="the scale of the images"))
    levels, _ = he.open_levels(image)
    _check_inside(levels[0], pixels, image, factor)
    warnings.append(
        f"only {image.name} ({um_per_px / factor:.3g} um per pixel) is there: cells cannot be seen in it; give the "
        f"full-resolution image with --he"
    )
    return he.Picture(levels, he.scaling(um_per_px / factor), image)


def _found(path: Path, folder: Path) -> Path | None:
    """A full-resolution image that lies beside the results."""
    for place in dict.fromkeys((folder, path)):
        for pattern in _FULL:
            for file in sorted(place.glob(pattern)):
                if (
                    file.name.lower().endswith(_ENDINGS)
                    and "hires" not in file.name
                    and "lowres" not in file.name
                ):
                    return file
    return None


def _hires_factor(file: Path) -> float:
    with reading(file):
        factor = float(json.loads(file.read_text())["tissue_hires_scalef"])
        if not 0 < factor <= 1.5:
            raise ValueError(f"tissue_hires_scalef is {factor}")
    return factor


def _check_inside(level, pixels: np.ndarray, image: Path, factor: float) -> None:
    """Spots must lie in the image; positions are in full-resolution pixels."""
    _, height, width = level.shape
    x, y = pixels.T * factor
    inside = float(np.mean((x >= 0) & (x < width) & (y >= 0) & (y < height)))
    if inside < _INSIDE:
        raise StsrError(
            f"only {inside:.0%} of the spots lie in {image.name} ({width} x {height} pixels): it is not the image that "
            f"Space Ranger was given; give that one with --he"
        )
