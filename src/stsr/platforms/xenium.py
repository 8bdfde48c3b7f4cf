"""10x Genomics Xenium output folders, XOA 1.x to 4.x."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.histology import files as he
from stsr.platforms.source import Cells, Chunk, Options, Source, Transcripts, choose_genes, control
from stsr.platforms.tenx import read_matrix

NAME = "xenium"
_ROWS = 500_000  # a batch: large enough that numpy's calls cost nothing, small enough for a laptop
_CELL_UM = (2.0, 100.0)
_SECTION_UM = (50.0, 50_000.0)
_HE = ("*he_image*.ome.tif", "*he*image*.ome.tif", "*he*image*.tif*", "*[Hh]&[Ee]*.tif*")
_ALIGNMENTS = ("*he_imagealignment.csv", "*he*alignment*.csv", "*imagealignment.csv")
_SAME_PANEL = 0.5  # of the transcripts' genes; fewer in common: another experiment's matrix


def recognises(path: Path) -> bool:
    """Whether the folder is a Xenium output."""
    return path.is_dir() and (
        (path / "experiment.xenium").exists()
        or any((path / name).exists() for name in ("transcripts.parquet", "transcripts.csv.gz"))
    )


def read(path: Path, options: Options) -> Source:
    """Read a Xenium output folder.

    Parameters
    ----------
    path
        The folder with ``experiment.xenium``.
    options
        H&E, alignment, least quality, genes.

    Returns
    -------
    Source
        Coordinates are the instrument's own, um.

    Raises
    ------
    StsrError
        If a file is missing or damaged, sizes are implausible, or the H&E has no alignment.
    """
    experiment = _experiment(path)
    warnings: list[str] = []
    _check_zips(path)
    counts = read_matrix(need(path, "cell_feature_matrix.h5", what="counts per cell"))
    file = need(path, "transcripts.parquet", "transcripts.csv.gz", what="positions of transcripts")
    panel = _panel(file, list(counts.var_names), warnings)
    genes = choose_genes(panel, options.genes, file.name)
    transcripts = _transcripts(file, genes, options.min_qv)
    return Source(
        name=path.name,
        platform=NAME,
        genes=genes,
        picture=_picture(path, options, experiment, warnings),
        transcripts=transcripts,
        cells=_cells(path, counts, genes, warnings),
        warnings=warnings,
        facts={
            "software": str(experiment.get("analysis_sw_version", "unknown")),
            "panel": str(experiment.get("panel_name", "unknown")),
            "min_qv": options.min_qv,
            "folder": path.name,
        },
    )


def _experiment(path: Path) -> dict:
    file = need(path, "experiment.xenium", what="the description of the run")
    with reading(file):
        experiment = json.loads(file.read_text())
        if not isinstance(experiment, dict):
            raise ValueError("not a JSON object")
    return experiment


def _pixel_um(path: Path, experiment: dict) -> float:
    pixel = experiment.get("pixel_size")
    if not isinstance(pixel, int | float) or not 0.05 <= pixel <= 2.0:
        raise StsrError(
            f"experiment.xenium in {path} gives a pixel size of {pixel}; correct it to the 0.2125 um of the instrument"
        )
    return float(pixel)


def _check_zips(path: Path) -> None:
    """A zip that is cut short means that the copy of the folder stopped half-way."""
    for file in sorted(path.glob("*.zarr.zip")):
        with reading(file), zipfile.ZipFile(file) as archive:
            archive.infolist()


# ---------------------------------------------------------------------------------------------- transcripts


def _panel(file: Path, named: list[str], warnings: list[str]) -> list[str]:
    """Genes in the matrix's order; those of the transcripts themselves if the matrix is of something else.

    Names that are in no matrix are controls, whatever the version of the software calls them.
    """
    known = set(named)
    seen = _names(file, batches=1)
    if not seen or sum(name in known for name in seen) >= _SAME_PANEL * len(seen):
        return named
    genes = sorted(_names(file))
    warnings.append(
        f"cell_feature_matrix.h5 names other genes than {file.name}: it is not used, and the panel is the "
        f"{len(genes)} genes of {file.name}"
    )
    return genes


def _names(file: Path, batches: int | None = None) -> set[str]:
    """Names of features that do not look like controls, in the first batches or in all."""
    names: set[str] = set()
    for number, (kinds, code, _) in enumerate(_batches(file, ())):
        if number == batches:
            break
        used = np.unique(code)
        names.update(kinds[k] for k in used[used < len(kinds)])
    return {name for name in names if not control(name)}


def _transcripts(file: Path, genes: list[str], min_qv: float) -> Transcripts:
    index = {gene: number for number, gene in enumerate(genes)}

    def chunks() -> Iterator[Chunk]:
        for kinds, code, (x, y, qv) in _batches(file, ("x_location", "y_location", "qv")):
            # One look-up per batch; the last entry is for rows without a name.
            gene_of = np.array([*(index.get(kind, -1) for kind in kinds), -1], np.int32)
            gene = gene_of[code]
            good = qv >= min_qv
            keep = good & (gene >= 0)
            low = len(qv) - int(good.sum())
            yield Chunk(x[keep], y[keep], gene[keep], low, int(good.sum()) - int(keep.sum()))

    bounds, rows = _bounds(file)
    size = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
    if not _SECTION_UM[0] <= size <= _SECTION_UM[1]:
        raise StsrError(
            f"{file} spans {size:.3g} um, which no Xenium slide does; its coordinates must be in um, not in pixels"
        )
    return Transcripts(chunks, bounds, rows)


def _batches(
    file: Path, columns: tuple[str, ...]
) -> Iterator[tuple[list[str], np.ndarray, list[np.ndarray]]]:
    """Yield names of features, a code into them for each row, and the other columns; never a string per row."""
    import pyarrow as pa

    with reading(file):
        for batch in _record_batches(file, ("feature_name", *columns)):
            names = batch.column(0)
            names = names if pa.types.is_dictionary(names.type) else names.dictionary_encode()
            kinds = [k.decode() if isinstance(k, bytes) else str(k) for k in names.dictionary.to_pylist()]
            code = names.indices.cast(pa.int32()).fill_null(len(kinds)).to_numpy(zero_copy_only=False)
            yield kinds, code, [column.to_numpy(zero_copy_only=False) for column in batch.columns[1:]]


def _record_batches(file: Path, columns: tuple[str, ...]):
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file, read_dictionary=["feature_name"], pre_buffer=False) as parquet:
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                raise StsrError(
                    f"{file} has no column {sorted(missing)[0]}; give the file as the instrument wrote it"
                )
            yield from parquet.iter_batches(_ROWS, columns=list(columns), use_threads=False)
        return
    import pyarrow as pa
    from pyarrow import csv

    types = {name: pa.float32() for name in columns if name != "feature_name"}
    types["feature_name"] = pa.dictionary(pa.int32(), pa.string())
    convert = csv.ConvertOptions(include_columns=list(columns), column_types=types)
    with csv.open_csv(file, csv.ReadOptions(block_size=32 << 20), convert_options=convert) as reader:
        yield from reader


def _bounds(file: Path) -> tuple[tuple[float, float, float, float], int | None]:
    """Bounds of all rows, um, and their number: from the file's statistics where it has them, else by a pass."""
    rows = None
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with reading(file), pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            ranges = [_statistics(parquet, name) for name in ("x_location", "y_location")]
        if all(ranges):
            return (ranges[0][0], ranges[1][0], ranges[0][1], ranges[1][1]), rows
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for _, _, (x, y) in _batches(file, ("x_location", "y_location")):
        if len(x):
            low = np.minimum(low, [x.min(), y.min()])
            high = np.maximum(high, [x.max(), y.max()])
    if not np.isfinite(low).all():
        raise StsrError(f"{file} holds no transcripts; check that the run finished")
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1])), rows


def _statistics(parquet, name: str) -> tuple[float, float] | None:
    column = parquet.schema_arrow.names.index(name)
    found = [parquet.metadata.row_group(i).column(column).statistics for i in range(parquet.num_row_groups)]
    if not found or any(s is None or not s.has_min_max for s in found):
        return None
    return float(min(s.min for s in found)), float(max(s.max for s in found))


# ---------------------------------------------------------------------------------------------------- cells


def _cells(path: Path, counts, genes: list[str], warnings: list[str]) -> Cells | None:
    """Outlines, with counts where the ids of both files join."""
    file = find(path, "cells.parquet", "cells.csv.gz")
    if file is None:
        warnings.append(f"cells.parquet is missing in {path}: the section has no cells")
        return None
    cells = _table(file, ("cell_id", "x_centroid", "y_centroid", "cell_area")).drop_duplicates("cell_id")
    outlines = _outlines(path, cells, warnings)
    diameter = float(np.median(2 * np.sqrt(outlines.area / np.pi)))
    if not _CELL_UM[0] <= diameter <= _CELL_UM[1]:
        raise StsrError(
            f"cells in {path} have a diameter of {diameter:.3g} um, which no cell has; coordinates must be in um, "
            f"check pixel_size in experiment.xenium"
        )
    joined = outlines.index.intersection(counts.obs_names, sort=False)
    if len(joined) < 0.5 * min(len(outlines), counts.n_obs) or not set(genes) <= set(counts.var_names):
        warnings.append(
            f"{len(joined)} of {len(outlines)} cells of {file.name} are in cell_feature_matrix.h5: its counts are not "
            f"used and cells have outlines only"
        )
        return Cells(outlines)
    return Cells(outlines.loc[joined], counts[joined, genes].copy())


def _table(file: Path, columns: tuple[str, ...]):
    """Some columns of a parquet or csv.gz file, cell ids as text (XOA 1.x: integers or bytes)."""
    import pandas as pd

    with reading(file):
        if file.suffix == ".parquet":
            table = pd.read_parquet(file, columns=list(columns))
        else:
            table = pd.read_csv(file, usecols=list(columns))[list(columns)]
        ids = table["cell_id"]
        if len(ids) and isinstance(ids.iloc[0], bytes):
            ids = ids.str.decode("utf-8")
        table["cell_id"] = ids.astype(str)
    return table


def _outlines(path: Path, cells, warnings: list[str]):
    """GeoDataFrame of polygons (index: cell id), um; discs of each cell's area where there are no boundaries."""
    import geopandas as gpd
    import shapely

    file = find(path, "cell_boundaries.parquet", "cell_boundaries.csv.gz")
    if file is None:
        warnings.append(
            f"cell_boundaries.parquet is missing in {path}: cells are drawn as discs of their area"
        )
        radius = np.sqrt(cells["cell_area"].to_numpy(float) / np.pi)
        points = shapely.points(cells["x_centroid"], cells["y_centroid"])
        return gpd.GeoDataFrame(geometry=shapely.buffer(points, radius), index=cells["cell_id"].to_numpy())
    vertices = _table(file, ("cell_id", "vertex_x", "vertex_y"))
    ids = vertices["cell_id"].to_numpy()
    with reading(file):
        ring = np.concatenate([[0], np.cumsum(ids[1:] != ids[:-1])])
        enough = np.bincount(ring)[ring] >= 3  # fewer vertices enclose nothing
        _, first, ring = np.unique(ring[enough], return_index=True, return_inverse=True)
        xy = vertices[["vertex_x", "vertex_y"]].to_numpy(float)[enough]
        polygons = shapely.polygons(shapely.linearrings(xy, indices=ring))
    frame = gpd.GeoDataFrame(geometry=polygons, index=ids[enough][first])
    return frame[~frame.index.duplicated()]


# ---------------------------------------------------------------------------------------------------- image


def _picture(path: Path, options: Options, experiment: dict, warnings: list[str]) -> he.Picture | None:
    """The H&E where its alignment puts it: image pixels -> pixels of the instrument -> um."""
    image = options.he or find(path, *_HE)
    if image is None:
        warnings.append(f"no H&E in {path}: superres needs one; add it with --he and --alignment")
        return None
    alignment = options.alignment or find(image.parent, *_ALIGNMENTS) or find(path, *_ALIGNMENTS)
    if alignment is None:
        raise StsrError(
            f"{image} has no alignment: he_imagealignment.csv is missing in {path}; export it from Xenium Explorer or "
            f"give it with --alignment"
        )
    levels, named_um = he.open_levels(image)
    px_to_um = he.scaling(_pixel_um(path, experiment)) @ he.read_alignment(alignment)
    he.check_pixel(px_to_um, options.um_per_px or named_um, image.name)
    return he.Picture(levels, px_to_um, image)
