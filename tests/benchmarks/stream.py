"""Write tables of any number of transcripts in bounded memory, for benchmarks of readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stsr.simulate.formats import cell_names, xoa_layout
from stsr.simulate.genes import CELL_TYPES, GeneTable, gene_table

_CELL_UM = 10.0
_DRAWS = 4096  # length of the look-up table of genes; probabilities are accurate to 1 / 4096
_PATCH_UM = 150.0


def write_transcripts(
    path: str | Path,
    n: int,
    width_um: float = 5000.0,
    height_um: float = 5000.0,
    genes: int | list[str] | None = None,
    seed: int | np.random.Generator = 0,
    row_group: int = 1_000_000,
) -> Path:
    """Write `n` transcripts as a Xenium run's `transcripts.parquet`, row group by row group; return the path.

    Cells lie on a jittered lattice of 10 um, in patches of one type, and express the genes of `genes.gene_table`; 5 %
    of the transcripts have a qv below 20. Row groups are bands of the section from top to bottom. Memory is that of
    one row group, about 300 MB by default. There is no image and no truth; see `simulate_tissue` for those.

    Parameters
    ----------
    path : path
        The parquet file to write.
    n : int
    width_um, height_um : float
    genes, seed
        See `simulate_tissue`.
    row_group : int
        Transcripts in one row group.

    Raises
    ------
    ValueError
        If `n`, an extent or `row_group` is not positive, or the genes are invalid.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if min(n, row_group, width_um, height_um) <= 0:
        raise ValueError("the number of transcripts, the extent and the row group must all be positive")
    rng = np.random.default_rng(seed)
    table = gene_table(genes, rng)
    lookup = _lookup(table)
    patch = rng.integers(
        0, len(CELL_TYPES), (int(height_um // _PATCH_UM) + 1, int(width_um // _PATCH_UM) + 1)
    )
    words = pa.array(table.genes)
    schema = _schema()
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
        for start in range(0, n, row_group):
            count = min(row_group, n - start)
            band_um = (start / n * height_um, (start + count) / n * height_um)
            columns = _band(count, band_um, width_um, height_um, lookup, patch, rng)
            cells, index = np.unique(columns.pop("cell"), return_inverse=True)
            names = pa.array(cell_names(cells, xoa_layout("3.0")).astype(str))
            arrays = {
                "transcript_id": np.arange(start, start + count, dtype=np.uint64),
                "cell_id": pa.DictionaryArray.from_arrays(index.astype(np.int32), names),
                "feature_name": pa.DictionaryArray.from_arrays(columns.pop("gene"), words),
                **columns,
            }
            writer.write_table(pa.table(arrays).select(schema.names).cast(schema), row_group_size=count)
    return Path(path)


def _schema():
    import pyarrow as pa

    return pa.schema(
        {
            "transcript_id": pa.uint64(),
            "cell_id": pa.dictionary(pa.int32(), pa.string()),
            "overlaps_nucleus": pa.uint8(),
            "feature_name": pa.dictionary(pa.int16(), pa.string()),
            "x_location": pa.float32(),
            "y_location": pa.float32(),
            "z_location": pa.float32(),
            "qv": pa.float32(),
            "is_gene": pa.bool_(),
        }
    )


def _lookup(table: GeneTable) -> np.ndarray:
    """(type, 4096) int16: genes in proportion to their rates, so that one random number selects one."""
    share = table.rates / table.rates.sum(0)
    middle = (np.arange(_DRAWS) + 0.5) / _DRAWS
    picked = np.stack([np.searchsorted(np.cumsum(column), middle) for column in share.T])
    return np.minimum(picked, len(table.genes) - 1).astype(np.int16)


def _band(count, band_um, width_um, height_um, lookup, patch, rng) -> dict[str, np.ndarray]:
    """Columns of `count` transcripts whose cells' rows lie in a band of the section."""
    across = max(1, int(width_um // _CELL_UM))
    first = int(band_um[0] // _CELL_UM)
    rows = max(1, int(np.ceil(band_um[1] / _CELL_UM)) - first)
    cell = first * across + rng.integers(0, rows * across, count)
    jitter = (cell * 2654435761) % 2**32 / 2**32  # a fixed shift for each cell, whichever row group it is in
    x_um = (cell % across + 0.2 + 0.6 * jitter) * _CELL_UM
    y_um = (cell // across + 0.2 + 0.6 * ((jitter * 97) % 1)) * _CELL_UM
    spread = rng.standard_normal((2, count), dtype=np.float32) * np.float32(_CELL_UM / 4)
    x_um, y_um = (x_um + spread[0]).clip(0, width_um), (y_um + spread[1]).clip(0, height_um)
    kind = patch[(y_um // _PATCH_UM).astype(np.int64), (x_um // _PATCH_UM).astype(np.int64)]
    qv = 20 + 20 * rng.random(count, dtype=np.float32)
    qv[rng.random(count, dtype=np.float32) < 0.05] -= 19.5
    return {
        "cell": cell,
        "gene": lookup[kind, rng.integers(0, _DRAWS, count)],
        "x_location": x_um.astype(np.float32),
        "y_location": y_um.astype(np.float32),
        "z_location": (12 + 8 * rng.random(count, dtype=np.float32)),
        "qv": qv,
        "overlaps_nucleus": (np.hypot(*spread) < _CELL_UM / 4).astype(np.uint8),
        "is_gene": np.ones(count, bool),
    }
