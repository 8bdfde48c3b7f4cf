"""Count transcripts in bounded memory: chunks of transcripts in, blocks of genes out."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from stsr.errors import StsrError
from stsr.geometry.grid import Grid

GENES_PER_BLOCK = 16  # as the store's chunks: a block is written once
LOST = 1e-6
"""Largest relative difference between the total of a gene in the bins and that of its counts."""
_KEY_LIMIT = 2**32


class Counter:
    """Counts of genes in places (bins or spots).

    Each transcript becomes a 4-byte key in an unlinked temporary file, sorted by blocks of genes. A block is counted
    on demand. Memory holds one chunk and one block, independent of the number of transcripts and genes. The
    temporary file disappears with the process.

    Parameters
    ----------
    genes, places
        Their numbers.

    Raises
    ------
    ValueError
        If there are more pairs of a gene of a block and a place than 4-byte keys.
    """

    def __init__(self, genes: int, places: int):
        if places * GENES_PER_BLOCK >= _KEY_LIMIT:
            raise ValueError(f"{places} places are too many; use larger bins")
        self.genes = genes
        self.places = places
        self.blocks = -(-genes // GENES_PER_BLOCK)
        self.per_place = np.zeros(places, np.int64)
        self.per_gene = np.zeros(genes, np.int64)
        self._spool = tempfile.TemporaryFile(prefix="stsr-")  # noqa: SIM115 - lives with self
        weakref.finalize(self, self._spool.close)
        self._ends: list[np.ndarray] = []  # of each block in each chunk, in keys from the start of the file
        self._written = 0

    def add(self, gene: np.ndarray, place: np.ndarray) -> None:
        """Count one transcript for each pair of a gene index and a place index (n,)."""
        gene = gene.astype(np.uint32, copy=False)
        np.add.at(self.per_place, place, 1)
        self.per_gene += np.bincount(gene, minlength=self.genes)
        key = (gene % GENES_PER_BLOCK) * np.uint32(self.places) + place.astype(np.uint32)
        # For 8 and 16 bits numpy's stable sort is a radix sort, ten times faster than sorting the keys.
        block = (gene // GENES_PER_BLOCK).astype(np.uint8 if self.blocks <= 256 else np.uint16)
        order = np.argsort(block, kind="stable")
        try:
            self._spool.write(key[order].data)
            self._spool.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise StsrError(
                f"no space for temporary files in {where}; set TMPDIR to a folder on a larger disk"
            ) from error
        self._ends.append(self._written + np.cumsum(np.bincount(block, minlength=self.blocks)))
        self._written += len(key)

    def block(self, number: int, dtype: type = np.uint32) -> np.ndarray:
        """Counts of block ``number``: (genes in block, places). Safe to call from several threads."""
        counts: np.ndarray = np.zeros((self._genes_in(number), self.places), dtype)
        flat = counts.reshape(-1)
        for keys in self.keys(number):
            np.add.at(flat, keys, dtype(1))
        return counts

    def grouped(self, number: int, group: np.ndarray, groups: int) -> np.ndarray:
        """Counts of a block summed over groups of places: (genes in block, groups) uint32.

        Parameters
        ----------
        number
            Number of the block.
        group
            Group of each place (places,), below ``groups``.
        groups
            Number of groups.
        """
        counts = np.zeros((self._genes_in(number), groups), np.uint32)
        flat, places = counts.reshape(-1), np.uint32(self.places)
        group = group.astype(np.uint32)
        for keys in self.keys(number):
            gene = keys // places
            np.add.at(flat, gene * np.uint32(groups) + group[keys - gene * places], np.uint32(1))
        return counts

    def keys(self, number: int) -> Iterator[np.ndarray]:
        """Keys of block ``number``, one for each count, in pieces: gene in block * places + place, uint32."""
        start = 0
        for ends in self._ends:
            first = ends[number - 1] if number else start
            size = int(ends[number] - first) * 4
            if size:
                yield np.frombuffer(os.pread(self._spool.fileno(), size, int(first) * 4), np.uint32)
            start = ends[-1]

    @property
    def dtype(self) -> type:
        """Type that holds every count: 16 bits if no place has more transcripts in total."""
        return _integer(self.per_place)

    def _genes_in(self, number: int) -> int:
        return min(GENES_PER_BLOCK, self.genes - number * GENES_PER_BLOCK)


def _integer(per_place: np.ndarray) -> type:
    """Type of counts, given those of all genes per place."""
    return np.uint16 if per_place.max(initial=0) < 2**16 else np.uint32


class Split:
    """Division of bins by area between the larger bins of another grid, which covers them.

    Parameters
    ----------
    fine, grid
        The bins to divide, and those that take their parts.
    """

    def __init__(self, fine: Grid, grid: Grid):
        self.fine, self.grid = fine, grid
        ratio = fine.bin_um / grid.bin_um
        self._rows = _shares(fine.height, (fine.y0_um - grid.y0_um) / grid.bin_um, ratio)
        self._columns = _shares(fine.width, (fine.x0_um - grid.x0_um) / grid.bin_um, ratio)

    def parts(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The up to four parts of each place (n,) of the fine grid.

        Yields
        ------
        which, bins, shares
            Indices into ``places``, the bin of the grid, and the share of the place's area in it; (m,) each.
        """
        row, column = np.divmod(places, np.uint32(self.fine.width))
        for row_bin, row_share in self._rows:
            for column_bin, column_share in self._columns:
                share = row_share[row] * column_share[column]
                which = np.flatnonzero(share)
                bins = row_bin[row[which]] * self.grid.width + column_bin[column[which]]
                yield which, bins, share[which]

    def divide(self, values: np.ndarray) -> np.ndarray:
        """Values of the fine bins (n,) as sums over the bins of the grid, float64."""
        divided = np.zeros(self.grid.height * self.grid.width)
        for which, bins, share in self.parts(np.arange(len(values), dtype=np.uint32)):
            divided += np.bincount(bins, share * values[which], len(divided))
        return divided


def _shares(bins: int, offset: float, ratio: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Along an axis: the two larger bins that each bin overlaps, and its share in each, float32.

    Bins of 8 um lie in quarters in bins of 10 um, so their shares are exact.
    """
    start = np.round(offset + np.arange(bins) * ratio, 9)
    first = np.floor(start).astype(np.int64)
    share = np.round(np.minimum(1.0, (first + 1 - start) / ratio), 9)
    second = np.where(share < 1, first + 1, first)
    return [(first, share.astype(np.float32)), (second, (1 - share).astype(np.float32))]


class Layer:
    """Counts of genes per bin from one or more counters, with a check that no count is lost.

    Parameters
    ----------
    counters
        Of the same genes and places, which are summed.
    split
        How places are divided between bins; by default places are bins.
    """

    def __init__(self, counters: Sequence[Counter], split: Split | None = None):
        self.genes, self.blocks = counters[0].genes, counters[0].blocks
        self._counters, self._split = counters, split
        self.per_gene = np.sum([counter.per_gene for counter in counters], axis=0)
        per_place = np.sum([counter.per_place for counter in counters], axis=0)
        self.per_place = per_place if split is None else split.divide(per_place)
        self.dtype: type = _integer(per_place) if split is None else np.float32

    def block(self, number: int, dtype: type = np.float32) -> np.ndarray:
        """Counts of block ``number``: (genes in block, bins). Safe to call from several threads.

        Raises
        ------
        StsrError
            If the total of a gene is not that of its counts, within 1e-6 of it.
        """
        whole = self.per_gene[number * GENES_PER_BLOCK : (number + 1) * GENES_PER_BLOCK]
        if self._split is None:
            counts = self._counters[0].block(number, dtype)
            for counter in self._counters[1:]:
                counts += counter.block(number, dtype)
        else:
            counts = np.zeros((len(whole), len(self.per_place)), dtype)
            for counter in self._counters:
                for keys in counter.keys(number):
                    gene, place = np.divmod(keys, np.uint32(counter.places))
                    for which, bins, share in self._split.parts(place):
                        np.add.at(
                            counts.reshape(-1), gene[which].astype(np.int64) * counts.shape[1] + bins, share
                        )
        if np.any(np.abs(counts.sum(1, dtype=np.float64) - whole) > LOST * whole):
            raise StsrError(
                "counts were lost while bins were divided; choose another --bin-um, and report this"
            )
        return counts
