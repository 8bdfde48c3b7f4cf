"""Counts of Visium HD bins, streamed from the feature-barcode matrix in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from stsr.errors import StsrError
from stsr.files import reading
from stsr.platforms.source import BinChunk, check_raw, choose_genes
from stsr.platforms.tenx import read_genes
from stsr.platforms.visium_hd.positions import Positions

ENTRIES = 2_000_000  # per chunk: large enough for numpy to be efficient, small enough for a laptop

Stream = Callable[[], Iterator[BinChunk]]

_PATTERN = b"s_000um_00000_00000"  # of a barcode: bin size, row, column; a digit for each 0


def open_stream(
    file: Path, positions: Positions, bin_um: float, in_tissue: np.ndarray, wanted: tuple[str, ...] | None
) -> tuple[Stream, list[str], int]:
    """Open a matrix of bins; nothing but its features and row pointers is read yet.

    Parameters
    ----------
    file
        ``filtered_feature_bc_matrix.h5`` of a ``square_*`` folder.
    positions
        For matrices whose barcodes do not contain the row and column.
    bin_um
        Size of the bins, um.
    in_tissue
        (rows, columns) bool; other bins, which only a raw matrix has, are skipped.
    wanted
        Genes to keep; all by default.

    Returns
    -------
    stream, genes, entries
        Chunks, the panel, and the number of counts.

    Raises
    ------
    StsrError
        If the file is damaged, is not raw, or does not fit the array; while it is read, too.
    """
    import h5py

    with reading(file), h5py.File(file) as h5:
        features, names = read_genes(h5["matrix"], file)
        total = int(h5["matrix/shape"][0])
        indptr = h5["matrix/indptr"][:].astype(np.int64)
        if len(indptr) != len(h5["matrix/barcodes"]) + 1 or (np.diff(indptr) < 0).any():
            raise ValueError("its pointers do not fit its barcodes")
        if indptr[-1] != len(h5["matrix/data"]) or indptr[-1] != len(h5["matrix/indices"]):
            raise ValueError("its counts do not fit its pointers")
        places = _Places(h5["matrix/barcodes"][:1], file, positions, bin_um)
    genes = choose_genes(names, wanted, file.name)
    gene_of = gene_index(features, names, genes, total)

    def chunks() -> Iterator[BinChunk]:
        with reading(file), h5py.File(file) as h5:
            group = h5["matrix"]
            for first, last in runs(indptr):
                part = slice(int(indptr[first]), int(indptr[last]))
                row, column = places.of(group["barcodes"][first:last])
                each = np.diff(indptr[first : last + 1])
                yield binned(
                    np.repeat(row, each),
                    np.repeat(column, each),
                    gene_of[group["indices"][part]],
                    group["data"][part],
                    in_tissue,
                    file,
                )

    return chunks, genes, int(indptr[-1])


def gene_index(features: np.ndarray, names: list[str], genes: list[str], total: int) -> np.ndarray:
    """Index into the panel of each of ``total`` features (total,) int32; -1 for those that are not in it."""
    index = {gene: number for number, gene in enumerate(genes)}
    gene_of = np.full(total, -1, np.int32)
    gene_of[features] = [index.get(name, -1) for name in names]
    return gene_of


def runs(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of runs of rows with about `ENTRIES` entries, given the rows' pointers (rows + 1,)."""
    first, rows = 0, len(indptr) - 1
    while first < rows:
        last = int(np.searchsorted(indptr, indptr[first] + ENTRIES, side="right")) - 1
        last = min(max(last, first + 1), rows)
        yield first, last
        first = last


def binned(
    row: np.ndarray,
    column: np.ndarray,
    gene: np.ndarray,
    count: np.ndarray,
    in_tissue: np.ndarray,
    file: Path,
) -> BinChunk:
    """A checked chunk, without bins outside the tissue.

    Raises
    ------
    StsrError
        If counts are not raw, or a bin lies outside the array.
    """
    if count.dtype.kind not in "ui" or (len(count) and count.min() < 0):
        check_raw(count, str(file))
    height, width = in_tissue.shape
    if len(row) and not (min(row.min(), column.min()) >= 0 and row.max() < height and column.max() < width):
        raise StsrError(
            f"{file} has bins outside the array of its table of positions; give files of the same section"
        )
    keep = in_tissue[row, column]
    if not keep.all():
        row, column, gene, count = row[keep], column[keep], gene[keep], count[keep]
    return BinChunk(row, column, gene, count.astype(np.int64, copy=False))


class _Places:
    """Rows and columns of barcodes."""

    def __init__(self, first: np.ndarray, file: Path, positions: Positions, bin_um: float):
        self._file, self._bin_um = file, bin_um
        self._index = None if _parsed(first) is not None else _index(positions)

    def of(self, barcodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (n,) of barcodes (n,)."""
        if self._index is not None:
            return self._joined(barcodes)
        parsed = _parsed(barcodes)
        if parsed is None:
            raise StsrError(
                f"{self._file} has barcodes of several patterns; give the original file of Space Ranger"
            )
        size, row, column = parsed.T
        if (size != self._bin_um).any():
            raise StsrError(
                f"{self._file} holds bins of {size[0]} um, but its folder is that of {self._bin_um:g} um; give the "
                f"original folder of Space Ranger"
            )
        return row, column

    def _joined(self, barcodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self._index is not None
        names, row, column = self._index
        found = names.get_indexer([_text(barcode) for barcode in barcodes])
        if (found < 0).any():
            raise StsrError(
                f"{(found < 0).sum()} of {len(found)} barcodes of {self._file} are missing in the table of positions; "
                f"give files of the same section"
            )
        return row[found], column[found]


def _parsed(barcodes: np.ndarray) -> np.ndarray | None:
    """Bin size, row and column (n, 3) from barcodes ``s_008um_00012_00345-1``; None if they are named otherwise.

    Whatever follows the column is ignored: some writers cut barcodes to 20 bytes.
    """
    if barcodes.dtype.kind != "S":
        barcodes = np.asarray(
            [value if isinstance(value, bytes) else str(value).encode() for value in barcodes]
        )
    if not len(barcodes) or barcodes.dtype.itemsize < len(_PATTERN):
        return None if len(barcodes) else np.zeros((0, 3), int)
    letters = np.ascontiguousarray(barcodes).view(np.uint8).reshape(len(barcodes), -1)[:, : len(_PATTERN)]
    pattern = np.frombuffer(_PATTERN, np.uint8)
    digit = pattern == ord("0")
    if (letters[:, ~digit] != pattern[~digit]).any() or (letters[:, digit] - ord("0") > 9).any():
        return None
    values = letters[:, digit].astype(np.int64) - ord(
        "0"
    )  # (n, 13): three of the size, five of row and column
    powers = 10 ** np.arange(5)[::-1]
    return np.stack([values[:, :3] @ powers[2:], values[:, 3:8] @ powers, values[:, 8:] @ powers], 1)


def _index(positions: Positions):
    """Barcodes of the table of positions as an index, and their rows and columns."""
    import pandas as pd

    with reading(positions.file):
        table = pd.read_parquet(positions.file, columns=["barcode", "array_row", "array_col"])
        names = pd.Index([_text(name) for name in table["barcode"]])
        return names, table["array_row"].to_numpy(np.int64), table["array_col"].to_numpy(np.int64)


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
