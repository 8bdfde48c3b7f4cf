"""SpatialData stores from any writer: read, checked, and converted to um."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.errors import StsrError
from stsr.histology import files as he
from stsr.histology.image import Image
from stsr.platforms.source import Cells, Chunk, Options, Source, Spots, Transcripts, choose_genes, control
from stsr.platforms.visium_hd import tables
from stsr.store import catalogue, discovery, names

if TYPE_CHECKING:
    import pandas as pd

    from stsr.store.parts import Map
    from stsr.store.section import Section

NAME = "spatialdata"

_POINTS = "transcripts"
_EDGE_UM = 1e-2  # taken off the bounds, so that no bin begins at their edge


def recognises(path: Path) -> bool:
    """Whether the path is a zarr store with SpatialData elements."""
    return path.is_dir() and catalogue.is_store(path) and bool(catalogue.elements(path))


def read(path: Path, options: Options) -> Source:
    """Read a SpatialData store.

    Parameters
    ----------
    path
        A store by ``spatialdata_io.xenium``, ``spatialdata_io.visium``, ``spatialdata_io.visium_hd``, stsr or others.
    options
        ``um_per_px`` is the um per unit of the store's coordinate system, if it cannot be inferred; H&E and its
        alignment (pixels to um) for a store without an image; least quality and genes.

    Returns
    -------
    Source
        Bins from tables of Visium HD; else transcripts from points named ``transcripts``, otherwise from counts per
        bin; spots and cells from shapes.

    Raises
    ------
    StsrError
        If the um per unit cannot be found, or the store holds no image, spots or transcripts.
    """
    from stsr.store.section import open_section

    section = open_section(path, um_per_unit=options.um_per_px)
    warnings: list[str] = []
    found = discovery.find_hd_table(section.sdata)
    if found is not None:
        return tables.read(section, *found, options)
    spots = _spots(section, options)
    transcripts, genes = _transcripts(section, options)
    if transcripts is None and spots is not None:
        genes = list(spots.counts.var_names)
    image = _image(section, options)
    if image is None:
        warnings.append(f"no H&E in {path}: superres needs one; add it with --he and --alignment")
    if transcripts is None and spots is None and image is None:
        raise StsrError(f"{path} holds no image, spots or transcripts; give a store of a section")
    made = section.provenance.get(names.SPOTS, {})
    return Source(
        name=section.name,
        platform=NAME,
        genes=genes,
        image=image,
        transcripts=transcripts,
        spots=spots,
        cells=_cells(section, genes, warnings),
        warnings=warnings,
        facts={
            "store": path.name,
            "um_per_unit": section.frame.um_per_unit,
            "min_qv": options.min_qv,
            "was": made.get("platform", ""),
        },
    )


def _image(section: Section, options: Options) -> Image | None:
    if options.he is not None:
        if options.alignment is None:
            raise StsrError(
                f"{options.he} has no alignment; give the 3 x 3 affine from its pixels to um with --alignment"
            )
        levels, named_um = he.open_levels(options.he)
        px_to_um = he.read_alignment(options.alignment)
        he.check_pixel(px_to_um, named_um, options.he.name)
        return Image(levels, px_to_um, path=options.he)
    import dask.array as da

    images = section.sdata.images
    name = names.HE if names.HE in images else discovery.find_image(section.sdata, section.frame)
    if name is None:
        return None
    px_to_um = section.to_um(images[name])
    he.check_pixel(px_to_um, None, f"image {name} in {section.path.name}")
    # Not through spatialdata: reading damaged data from these arrays raises a StsrError.
    stored = [da.from_array(array, array.chunks, name=False) for array in section.arrays("images", name)]
    return Image([he.as_level(level, section.path, "cyx") for level in stored], px_to_um)


def _spots(section: Section, options: Options) -> Spots | None:
    sdata, spots = section.sdata, section.spots
    found = discovery.find_spots(sdata)
    if found is None or spots is None:
        return None
    import anndata
    import pandas as pd

    table = sdata.tables[found[1]]
    _, rows = discovery.annotated(sdata, *found)
    genes = choose_genes(spots.genes, options.genes, f"the spots of {section.path.name}")
    obs = pd.DataFrame(index=[str(name) for name in table.obs_names[rows]])
    for key in ("array_row", "array_col"):
        if key in table.obs:
            obs[key] = table.obs[key].to_numpy()[rows]
    keep = np.ones(len(rows), bool)
    if "in_tissue" in table.obs:
        keep = table.obs["in_tissue"].to_numpy(int)[rows] == 1
    if not keep.any():
        raise StsrError(
            f"no tissue found: no spot in {section.path.name} is marked as in tissue; check its table"
        )
    chosen = spots.select(genes).astype(np.int32)
    counts = anndata.AnnData(chosen, obs=obs, var=pd.DataFrame(index=genes))[keep].copy()
    counts.obs_names_make_unique()
    origin = section.provenance.get(names.SPOTS, {}).get("origin", names.MEASURED)
    return Spots(spots.centres_um[keep], spots.shape, spots.size_um, counts, origin)


def _cells(section: Section, genes: list[str], warnings: list[str]) -> Cells | None:
    cells = section.cells
    if cells is None:
        return None
    outlines = cells.outlines
    outlines.index = outlines.index.astype(str)
    table = cells.counts
    if table is None:
        return Cells(outlines)
    if not set(genes) <= set(table.var_names):
        warnings.append(
            f"the table of cells in {section.path.name} lacks genes of the panel: only outlines of cells are kept"
        )
        return Cells(outlines)
    matrix, names = discovery.raw_counts(table, np.arange(table.n_obs), section.path.name)
    import anndata
    import pandas as pd

    place = pd.Index(names).get_indexer(genes)
    counts = anndata.AnnData(matrix[:, place].astype(np.int32), var=pd.DataFrame(index=genes))
    counts.obs_names = outlines.index
    return Cells(outlines, counts)


# ---------------------------------------------------------------------------------------------- transcripts


def _transcripts(section: Section, options: Options) -> tuple[Transcripts | None, list[str]]:
    points = section.sdata.points
    if _POINTS in points and {"x", "y"} <= set(points[_POINTS].columns):
        return _from_points(section, options)
    if section.hr is not None:
        return _from_bins(section, section.hr, options)
    return None, []


def _from_points(section: Section, options: Options) -> tuple[Transcripts, list[str]]:
    points = section.sdata.points[_POINTS]
    column = next((name for name in ("feature_name", "gene", "target") if name in points.columns), None)
    if column is None:
        raise StsrError(
            f"transcripts in {section.path.name} have no column feature_name; rename the column with the genes"
        )
    wanted = ["x", "y", column, *(["qv"] if "qv" in points.columns else [])]
    to_um = section.to_um(points)
    parts = [points[wanted].get_partition(number) for number in range(points.npartitions)]
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    seen: set[str] = set()
    for part in parts:
        frame = part.compute()
        if len(frame):
            xy = _moved(frame, to_um)
            low, high = np.minimum(low, xy.min(1)), np.maximum(high, xy.max(1))
            seen.update(str(name) for name in frame[column].unique())
    available = sorted(name for name in seen if not control(name))
    genes = choose_genes(available, options.genes, f"transcripts of {section.path.name}")
    index = {gene: number for number, gene in enumerate(genes)}

    def chunks() -> Iterator[Chunk]:
        for part in parts:
            frame = part.compute()
            names = frame[column].astype("category")
            gene_of = np.array([*(index.get(str(name), -1) for name in names.cat.categories), -1])
            gene = gene_of[
                names.cat.codes.to_numpy()
            ]  # code -1, for rows without a name, takes the last entry
            good = frame["qv"].to_numpy() >= options.min_qv if "qv" in frame else np.ones(len(frame), bool)
            keep = good & (gene >= 0)
            x, y = _moved(frame, to_um)[:, keep]
            yield Chunk(x, y, gene[keep], int((~good).sum()), int(good.sum() - keep.sum()))

    (x0, y0), (x1, y1) = low, high
    return Transcripts(chunks, (float(x0), float(y0), float(x1), float(y1))), genes


def _moved(frame: pd.DataFrame, to_um: np.ndarray) -> np.ndarray:
    """x and y (2, n) of points, um."""
    xy = frame[["x", "y"]].to_numpy(float).T
    return to_um[:2, :2] @ xy + to_um[:2, 2:]


def _from_bins(section: Section, maps: Map, options: Options) -> tuple[Transcripts, list[str]]:
    """Counts per bin as transcripts at the bins' centres: exact for these bins and for coarser ones.

    Raises
    ------
    StsrError
        If they are fractions: counts of Visium HD bins that were divided by area.
    """
    genes = choose_genes(maps.genes, options.genes, f"the map of {section.path.name}")
    if maps.fractional:
        raise StsrError(
            f"the counts per bin of {section.path.name} are fractions, from bins of another size; prepare the "
            f"original folder again, with the --bin-um you want"
        )
    x, y = maps.grid.centres_um()

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(genes), 16):
            counts = maps.read(genes[start : start + 16])
            gene, row, column = np.nonzero(counts)
            times = counts[gene, row, column].astype(np.int64)
            yield Chunk(np.repeat(x[column], times), np.repeat(y[row], times), np.repeat(gene + start, times))

    x0, y0, x1, y1 = maps.grid.bounds_um
    bounds = x0, y0, x1 - _EDGE_UM, y1 - _EDGE_UM
    return Transcripts(chunks, bounds, None, (x0, y0), maps.grid.bin_um), genes
