"""AnnData files: cells with coordinates and an image beside the file, or Visium spots as in scanpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from stsr.errors import StsrError
from stsr.files import find, reading
from stsr.geometry.lattice import VISIUM_SPOT_UM, median_pitch
from stsr.histology import files as he
from stsr.histology.image import Image, scaling
from stsr.platforms.source import Cells, Chunk, Options, Source, Spots, Transcripts, choose_genes
from stsr.platforms.visium import lattice_um_per_px
from stsr.store import discovery

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData
    from geopandas import GeoDataFrame

NAME = "anndata"

_IMAGE = ("he.*", "*he*.png", "*he*.tif*", "*he*.jp*g", "*.png", "*.tif*", "*.jp*g")
_ALIGNMENT = ("he_px_to_um.csv", "*px_to_um*.csv", "*alignment*.csv")
_APART_UM = (2.0, 150.0)  # from a cell to its neighbour, including sections with few cells
_SECTION_UM = (50.0, 50_000.0)
_SPARSE = 0.95  # quantile of distances between neighbours that sets the smoothing of the tissue mask
_CELL_RADIUS_UM = 6.5  # of a typical cell in tissue; where counts are placed if only the centre is known
_ROWS = 20_000  # cells at a time


def recognises(path: Path) -> bool:
    """Whether the path is an ``.h5ad`` file or a folder with one."""
    return _file(path) is not None


def read(path: Path, options: Options) -> Source:
    """Read an AnnData file with ``obsm["spatial"]``.

    Parameters
    ----------
    path
        The file, or its folder.
    options
        Image and its alignment (pixels of the image to um), which by default are searched beside the file;
        ``um_per_px`` where coordinates are pixels; genes.

    Returns
    -------
    Source
        Visium spots if ``obs`` has array positions, otherwise cells. The counts of a cell are placed at random in a
        disc around its centre, as the file holds no positions of transcripts.

    Raises
    ------
    StsrError
        If coordinates, raw counts or the image's alignment are missing or implausible.
    """
    import anndata

    file = _file(path)
    if file is None:
        raise StsrError(f"there is no .h5ad file at {path}; check the path")
    with reading(file):
        table = anndata.read_h5ad(file)
    if "spatial" not in table.obsm or table.obsm["spatial"].shape[1] < 2:
        raise StsrError(f'{file} has no coordinates; put x and y in obsm["spatial"]')
    xy = np.asarray(table.obsm["spatial"], float)[:, :2]
    if not len(xy) or not np.isfinite(xy).all():
        raise StsrError(f"{file} has rows without coordinates; remove them and save it again")
    genes = choose_genes([str(name) for name in table.var_names], options.genes, file.name)
    counts = _raw(table, genes, file)
    if {"array_row", "array_col"} <= set(table.obs.columns):
        return _as_spots(file, table, xy, counts, genes, options)
    return _as_cells(file, xy, counts, genes, options)


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".h5ad" else None
    return find(path, "*.h5ad") if path.is_dir() else None


def _raw(table: AnnData, genes: list[str], file: Path) -> AnnData:
    """Raw counts of the genes, without any annotation."""
    import anndata
    import pandas as pd

    matrix, names = discovery.raw_counts(table, np.arange(table.n_obs), file.name)
    place = pd.Index(names).get_indexer(genes)
    if (place < 0).any():
        raise StsrError(f"the raw counts in {file} lack genes of X; save both with the same genes")
    if not matrix.nnz:
        raise StsrError(f"{file} holds no counts; check that it is the file of this section")
    obs = pd.DataFrame(index=[str(name) for name in table.obs_names])
    counts = anndata.AnnData(matrix[:, place].astype(np.int32), obs=obs, var=pd.DataFrame(index=genes))
    counts.obs_names_make_unique()
    return counts


# ---------------------------------------------------------------------------------------------------- cells


def _as_cells(file: Path, xy: np.ndarray, counts: AnnData, genes: list[str], options: Options) -> Source:
    xy_um = xy * (options.um_per_px or 1.0)
    apart = median_pitch(xy_um) or 0.0
    size = float(np.ptp(xy_um, axis=0).max())
    if not (_APART_UM[0] <= apart <= _APART_UM[1] and _SECTION_UM[0] <= size <= _SECTION_UM[1]):
        raise StsrError(
            f"cells in {file} lie {apart:.3g} apart and span {size:.3g}: these are not um; give the um per unit of "
            f"the coordinates with --um-per-px"
        )
    warnings = [
        f"the file has no transcripts: the counts of a cell are placed at random in a disc of "
        f"{2 * _CELL_RADIUS_UM:g} um around its centre, and cells are drawn as discs of {apart:.3g} um, the distance "
        f"between neighbours"
    ]
    return Source(
        name=file.stem,
        platform=NAME,
        genes=genes,
        image=_image(file, options, warnings),
        transcripts=_transcripts(xy_um, counts.X.tocsr()),
        cells=Cells(_discs(xy_um, apart / 2, counts.obs_names), counts),
        warnings=warnings,
        facts={"file": file.name, "positions": "drawn within cells"},
    )


def _transcripts(xy_um: np.ndarray, matrix: sp.csr_matrix) -> Transcripts:
    """Every count as a transcript at a random, reproducible position in its cell."""
    radius_um = min(_CELL_RADIUS_UM, (median_pitch(xy_um) or np.inf) / 2)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, matrix.shape[0], _ROWS):
            part = matrix[start : start + _ROWS].tocoo()
            times = part.data.astype(np.int64)
            centre = np.repeat(xy_um[start + part.row], times, axis=0)
            generator = np.random.default_rng(start)
            away = radius_um * np.sqrt(generator.random(len(centre)))
            angle = 2 * np.pi * generator.random(len(centre))
            x, y = centre.T + away * np.stack([np.cos(angle), np.sin(angle)])
            yield Chunk(x, y, np.repeat(part.col, times))

    (x0, y0), (x1, y1) = xy_um.min(0) - radius_um, xy_um.max(0) + radius_um
    bounds = float(x0), float(y0), float(x1), float(y1)
    distance, _ = cKDTree(xy_um).query(xy_um, k=2)
    return Transcripts(
        chunks, bounds, int(matrix.sum()), apart_um=float(np.quantile(distance[:, 1], _SPARSE))
    )


def _discs(xy_um: np.ndarray, radius_um: float, names: pd.Index) -> GeoDataFrame:
    import geopandas as gpd
    import shapely

    return gpd.GeoDataFrame(
        {"radius": float(radius_um)}, geometry=shapely.points(xy_um), index=names.to_numpy()
    )


def _image(file: Path, options: Options, warnings: list[str]) -> Image | None:
    image = options.he or find(file.parent, *_IMAGE)
    if image is None:
        warnings.append(f"no H&E beside {file}: superres needs one; add it with --he and --alignment")
        return None
    alignment = options.alignment or find(image.parent, *_ALIGNMENT) or find(file.parent, *_ALIGNMENT)
    if alignment is not None:
        px_to_um = he.read_alignment(alignment)
    elif options.um_per_px is not None:
        px_to_um = scaling(options.um_per_px)
    else:
        raise StsrError(
            f"{image} has no alignment: he_px_to_um.csv is missing in {file.parent}; give the 3 x 3 affine from "
            f"pixels to um with --alignment, or --um-per-px if coordinates are pixels of this image"
        )
    levels, named_um = he.open_levels(image)
    he.check_pixel(px_to_um, named_um, image.name)
    return Image(levels, px_to_um, path=image)


# ---------------------------------------------------------------------------------------------------- spots


def _as_spots(
    file: Path, table: AnnData, xy: np.ndarray, counts: AnnData, genes: list[str], options: Options
) -> Source:
    """Visium spots; coordinates are pixels of the full-resolution image."""
    import pandas as pd

    positions = pd.DataFrame(
        {
            "array_row": table.obs["array_row"].to_numpy(float),
            "array_col": table.obs["array_col"].to_numpy(float),
            "pxl_row_in_fullres": xy[:, 1],
            "pxl_col_in_fullres": xy[:, 0],
        }
    )
    um_per_px = options.um_per_px or lattice_um_per_px(positions)
    keep = table.obs["in_tissue"].to_numpy(int) == 1 if "in_tissue" in table.obs else np.ones(len(xy), bool)
    if not keep.any():
        raise StsrError(f"no tissue found: no spot in {file} is marked as in tissue; check obs['in_tissue']")
    counts = counts[keep].copy()
    for key in ("array_row", "array_col"):
        counts.obs[key] = table.obs[key].to_numpy()[keep]
    warnings: list[str] = []
    return Source(
        name=file.stem,
        platform=NAME,
        genes=genes,
        image=_image_of_spots(file, table, um_per_px, options, warnings),
        spots=Spots(xy[keep] * um_per_px, "disc", VISIUM_SPOT_UM, counts),
        warnings=warnings,
        facts={"file": file.name, "um_per_fullres_px": round(um_per_px, 6)},
    )


def _image_of_spots(
    file: Path, table: AnnData, um_per_px: float, options: Options, warnings: list[str]
) -> Image | None:
    if options.he is not None:
        levels, _ = he.open_levels(options.he)
        px_to_um = he.read_alignment(options.alignment) if options.alignment else scaling(um_per_px)
        return Image(levels, px_to_um, path=options.he)
    libraries = table.uns.get("spatial") or {}
    for library in libraries.values():
        images, factors = library.get("images", {}), library.get("scalefactors", {})
        if "hires" in images and "tissue_hires_scalef" in factors:
            um = um_per_px / float(factors["tissue_hires_scalef"])
            warnings.append(
                f"the image in {file.name} is small ({um:.3g} um per pixel) and does not resolve cells; give the "
                f"full-resolution image with --he"
            )
            return Image([he.as_level(images["hires"], file)], scaling(um))
    warnings.append(f"no image in {file}: superres needs one; add the full-resolution image with --he")
    return None
