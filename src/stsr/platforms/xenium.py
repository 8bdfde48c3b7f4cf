"""10x Genomics Xenium output folders, XOA 1.x to 4.x."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.geometry.outlines import single_rings
from stsr.histology import files as he
from stsr.histology.image import Image, scaling
from stsr.platforms.source import Cells, Chunk, Options, Source, Transcripts, choose_genes, control
from stsr.platforms.tenx import read_matrix

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from geopandas import GeoDataFrame

NAME = "xenium"
_ROWS = 500_000  # per batch: large enough for numpy to be efficient, small enough for the memory of a laptop
_CELL_UM = (2.0, 100.0)
_SECTION_UM = (50.0, 50_000.0)
_HE = ("*he_image*.ome.tif", "*he*image*.ome.tif", "*he*image*.tif*", "*[Hh]&[Ee]*.tif*")
_ALIGNMENTS = ("*he_imagealignment.csv", "*he*alignment*.csv", "*imagealignment.csv")
_SAME_PANEL = 0.5  # least share of the transcripts' genes in the matrix, if both are of one experiment


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
        Folder with ``experiment.xenium``.
    options
        H&E, alignment, least quality, genes.

    Returns
    -------
    Source
        Coordinates are those of the instrument, um.

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
        image=_image(path, options, experiment, warnings),
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
            f"experiment.xenium in {path} gives a pixel size of {pixel}; correct it to the instrument's 0.2125 um"
        )
    return float(pixel)


def _check_zips(path: Path) -> None:
    """Refuse a folder with a truncated zip file: the folder was not copied completely."""
    for file in sorted(path.glob("*.zarr.zip")):
        with reading(file), zipfile.ZipFile(file) as archive:
            archive.infolist()


# ---------------------------------------------------------------------------------------------- transcripts


def _panel(file: Path, named: list[str], warnings: list[str]) -> list[str]:
    """The genes of the matrix, or those of the transcripts if the matrix is of another experiment.

    Features of the transcripts that the matrix does not name are controls, which versions of the software name
    differently.
    """
    known = set(named)
    seen = _names(file, batches=1)
    if not seen or sum(name in known for name in seen) >= _SAME_PANEL * len(seen):
        return named
    genes = sorted(_names(file))
    warnings.append(
        f"cell_feature_matrix.h5 has other genes than {file.name}: it is ignored, and the panel is the "
        f"{len(genes)} genes of {file.name}"
    )
    return genes


def _names(file: Path, batches: int | None = None) -> set[str]:
    """Names of features except controls, in the first batches or in all."""
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
            # One look-up per batch; the last entry is for rows without a feature name.
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
            f"{file} spans {size:.3g} um, which is implausible for Xenium; its coordinates must be in um, not in pixels"
        )
    return Transcripts(chunks, bounds, rows)


def _batches(
    file: Path, columns: tuple[str, ...]
) -> Iterator[tuple[list[str], np.ndarray, list[np.ndarray]]]:
    """Yield per batch the feature names, each row's index into them, and the other columns."""
    import pyarrow as pa

    with reading(file):
        for batch in _record_batches(file, ("feature_name", *columns)):
            names = batch.column(0)
            names = names if pa.types.is_dictionary(names.type) else names.dictionary_encode()
            kinds = [k.decode() if isinstance(k, bytes) else str(k) for k in names.dictionary.to_pylist()]
            code = names.indices.cast(pa.int32()).fill_null(len(kinds)).to_numpy(zero_copy_only=False)
            yield kinds, code, [column.to_numpy(zero_copy_only=False) for column in batch.columns[1:]]


def _record_batches(file: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    """Record batches of some columns of a parquet or csv.gz file."""
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(file, read_dictionary=["feature_name"], pre_buffer=False) as parquet:
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                raise StsrError(
                    f"{file} has no column {sorted(missing)[0]}; give the original file of the instrument"
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
    """Bounds of all rows, um, and their number: from the file's statistics, or by a pass over the file."""
    rows = None
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        with reading(file), pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            x, y = (_statistics(parquet, name) for name in ("x_location", "y_location"))
        if x is not None and y is not None:
            return (x[0], y[0], x[1], y[1]), rows
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for _, _, (xs, ys) in _batches(file, ("x_location", "y_location")):
        if len(xs):
            low = np.minimum(low, [xs.min(), ys.min()])
            high = np.maximum(high, [xs.max(), ys.max()])
    if not np.isfinite(low).all():
        raise StsrError(f"{file} holds no transcripts; check that the run was completed")
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1])), rows


def _statistics(parquet: Any, name: str) -> tuple[float, float] | None:
    """Smallest and largest value of a column from the statistics of a parquet file, None if it has none."""
    column = parquet.schema_arrow.names.index(name)
    found = [parquet.metadata.row_group(i).column(column).statistics for i in range(parquet.num_row_groups)]
    if not found or any(s is None or not s.has_min_max for s in found):
        return None
    return float(min(s.min for s in found)), float(max(s.max for s in found))


# ---------------------------------------------------------------------------------------------------- cells


def _cells(path: Path, counts: AnnData, genes: list[str], warnings: list[str]) -> Cells | None:
    """Outlines of cells, with counts if the ids in both files match."""
    file = find(path, "cells.parquet", "cells.csv.gz")
    if file is None:
        warnings.append(f"cells.parquet is missing in {path}: the section has no cells")
        return None
    cells = _table(file, ("cell_id", "x_centroid", "y_centroid", "cell_area")).drop_duplicates("cell_id")
    outlines = _outlines(path, cells, warnings)
    diameter = float(np.median(2 * np.sqrt(outlines.area / np.pi)))
    if not _CELL_UM[0] <= diameter <= _CELL_UM[1]:
        raise StsrError(
            f"cells in {path} have an implausible diameter of {diameter:.3g} um; coordinates must be in um, check "
            f"pixel_size in experiment.xenium"
        )
    joined = outlines.index.intersection(counts.obs_names, sort=False)
    if len(joined) < 0.5 * min(len(outlines), counts.n_obs) or not set(genes) <= set(counts.var_names):
        warnings.append(
            f"{len(joined)} of {len(outlines)} cells of {file.name} are in cell_feature_matrix.h5: its counts are "
            f"ignored and only outlines of cells are kept"
        )
        return Cells(outlines)
    return Cells(outlines.loc[joined], counts[joined, genes].copy())


def _table(file: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Columns of a parquet or csv.gz file, with cell ids as text (in XOA 1.x they are integers or bytes)."""
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


def _outlines(path: Path, cells: pd.DataFrame, warnings: list[str]) -> GeoDataFrame:
    """Outlines of cells (index: cell id), um; discs of each cell's area if boundaries are missing."""
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
    with reading(file):
        xy = vertices[["vertex_x", "vertex_y"]].to_numpy(float)
        ids, polygons = single_rings(vertices["cell_id"].to_numpy(), xy)
    frame = gpd.GeoDataFrame(geometry=polygons, index=ids)
    return frame[~frame.index.duplicated()]


# ---------------------------------------------------------------------------------------------------- image


def _image(path: Path, options: Options, experiment: dict, warnings: list[str]) -> Image | None:
    """The H&E with its alignment: image pixels -> pixels of the instrument -> um."""
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
    px_to_um = scaling(_pixel_um(path, experiment)) @ he.read_alignment(alignment)
    he.check_pixel(px_to_um, options.um_per_px or named_um, image.name)
    return Image(levels, px_to_um, path=image)
