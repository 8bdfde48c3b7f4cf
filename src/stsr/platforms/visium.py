"""10x Genomics Visium: Space Ranger folders with tissue_positions of version 1 or 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.geometry.lattice import VISIUM_PITCH_UM, VISIUM_SPOT_UM, fitted, hexagonal_um, with_shift
from stsr.histology import files as he
from stsr.histology.image import scaling
from stsr.platforms.source import Options, Source, Spots, choose_genes
from stsr.platforms.spaceranger import MATRICES, Registration, open_image
from stsr.platforms.tenx import read_matrix

if TYPE_CHECKING:
    import pandas as pd

NAME = "visium"

_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
_BEND = (
    0.15  # of the pitch: largest distance of a spot from the lattice; rounding to whole pixels stays below
)


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
    positions = _positions(need(folder / "spatial", *_POSITIONS, what="positions of the spots"))
    counts = read_matrix(need(folder, *MATRICES, what="counts per spot"))
    genes = choose_genes(list(counts.var_names), options.genes, str(folder))
    positions = _in_tissue(positions, counts.obs_names, folder)
    measured_um = lattice_um_per_px(positions)
    um_per_px = options.um_per_px or measured_um
    he.check_pixel(scaling(um_per_px), measured_um, f"the lattice of spots in {folder}")
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)  # x is the column
    warnings: list[str] = []
    registration = Registration(scaling(um_per_px), pixels, "spots")
    image = open_image((folder, path), folder / "spatial", options, registration, warnings)
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
            find(folder / "spatial", *_POSITIONS) or find(folder, *MATRICES)
        ):
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
