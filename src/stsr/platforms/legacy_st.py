"""First-generation Spatial Transcriptomics: a table of counts, a table of spots, an image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.geometry.lattice import fitted, with_shift
from stsr.histology import files as he
from stsr.histology.image import Image, scaling
from stsr.platforms.source import Options, Source, Spots, check_raw, choose_genes

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

NAME = "legacy_st"
PITCH_UM = 200.0
SPOT_UM = 100.0

_COUNTS = ("counts.tsv.gz", "counts.tsv", "*.tsv.gz", "*stdata*.tsv")
_SPOTS = ("spots.tsv", "*selection.tsv", "*spots*.tsv")
_IMAGE = ("image.jpg", "*.jpg", "*.jpeg", "*.tif", "*.tiff", "*.png")
_BEND = 0.2  # of the pitch: largest distance of a spot from its array position


def recognises(path: Path) -> bool:
    """Whether the folder holds the two tables."""
    return path.is_dir() and find(path, *_COUNTS) is not None and find(path, *_SPOTS) is not None


def read(path: Path, options: Options) -> Source:
    """Read a folder of ST tables.

    Parameters
    ----------
    path
        Folder with counts (spots ``XxY`` by genes, tab separated), spots (``x y new_x new_y pixel_x pixel_y
        selected``), and the image that pixel_x and pixel_y refer to.
    options
        Image, um per pixel, genes.

    Returns
    -------
    Source
        Coordinates are pixels times the pixel size, which is measured on the spots' 200 um lattice.

    Raises
    ------
    StsrError
        If a file is missing or damaged, or the tables do not match each other or the image.
    """
    spots = _spots(need(path, *_SPOTS, what="positions of the spots"))
    file = need(path, *_COUNTS, what="counts per spot")
    counts = _counts(file)
    joined = [name for name in counts.obs_names if name in spots.index]
    if not joined:
        raise StsrError(f"no spot of {file.name} is in the table of spots; give tables of the same section")
    genes = choose_genes(list(counts.var_names), options.genes, file.name)
    spots, counts = spots.loc[joined], counts[joined, genes].copy()
    measured_um = _um_per_px(spots)
    um_per_px = options.um_per_px or measured_um
    he.check_pixel(scaling(um_per_px), measured_um, f"the lattice of spots in {path}")
    pixels = spots[["pixel_x", "pixel_y"]].to_numpy(float)
    warnings: list[str] = []
    return Source(
        name=path.name,
        platform=NAME,
        genes=genes,
        image=_image(path, options, pixels, um_per_px, warnings),
        spots=Spots(pixels * um_per_px, "disc", SPOT_UM, counts),
        warnings=warnings,
        facts={"um_per_image_px": round(um_per_px, 6), "folder": path.name},
    )


def _spots(file: Path) -> pd.DataFrame:
    """Table of the spots selected as lying in tissue, indexed by ``XxY``."""
    import pandas as pd

    with reading(file):
        table = pd.read_csv(file, sep="\t")
        table = table[
            ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", *table.columns.intersection(["selected"])]
        ]
        table.index = [f"{int(x)}x{int(y)}" for x, y in zip(table["x"], table["y"], strict=True)]
        table = table[~table.index.duplicated()]
    if "selected" in table:
        table = table[table["selected"] == 1]
    return table


def _counts(file: Path) -> AnnData:
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    with reading(file):
        table = pd.read_csv(file, sep="\t", index_col=0)
        values = table.to_numpy()
        if values.dtype == object:
            raise ValueError("not a table of numbers")
    check_raw(values, str(file))
    counts = anndata.AnnData(sp.csr_matrix(values.astype(np.int32)))
    counts.obs_names = [str(name) for name in table.index]
    counts.var_names = [str(name) for name in table.columns]
    counts.var_names_make_unique()
    return counts


def _um_per_px(spots: pd.DataFrame) -> float:
    """Pixel size from the pitch of 200 um; the fit over all spots averages out errors of manual placement."""
    if len(spots) < 4:
        raise StsrError(f"{len(spots)} spots are too few to measure the pixel size; give a whole section")
    array, pixels = spots[["new_x", "new_y"]].to_numpy(float), spots[["pixel_x", "pixel_y"]].to_numpy(float)
    px_per_step, misfit_px = fitted(with_shift(array), pixels)
    if not px_per_step > 0 or misfit_px > _BEND * px_per_step:
        raise StsrError("pixel_x and pixel_y do not follow new_x and new_y; check the table of spots")
    return PITCH_UM / px_per_step


def _image(
    path: Path, options: Options, pixels: np.ndarray, um_per_px: float, warnings: list[str]
) -> Image | None:
    image = options.he or find(path, *_IMAGE)
    if image is None:
        warnings.append(f"no image in {path}: superres needs one; add it with --he")
        return None
    levels, _ = he.open_levels(image)
    if options.alignment is not None:
        return Image(levels, he.read_alignment(options.alignment), path=image)
    _, height, width = levels[0].shape
    inside = float(np.mean(((pixels >= 0) & (pixels < [width, height])).all(1)))
    if inside < 0.9:
        raise StsrError(
            f"only {inside:.0%} of the spots lie in {image.name} ({width} x {height} pixels): it was made smaller or "
            f"is of another section; give the image that pixel_x and pixel_y refer to with --he"
        )
    return Image(levels, scaling(um_per_px), path=image)
