"""Count transcripts in bounded memory: chunks of transcripts in, blocks of genes out."""

from __future__ import annotations

import os
import tempfile
import weakref

import numpy as np

from stsr.errors import StsrError

GENES_PER_BLOCK = 16  # as the store's chunks: a block is written once
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
        for keys in self._keys(number):
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
        for keys in self._keys(number):
            gene = keys // places
            np.add.at(flat, gene * np.uint32(groups) + group[keys - gene * places], np.uint32(1))
        return counts

    @property
    def dtype(self) -> type:
        """Type that holds every count: 16 bits if no place has more transcripts in total."""
        return np.uint16 if self.per_place.max(initial=0) < 2**16 else np.uint32

    def _genes_in(self, number: int) -> int:
        return min(GENES_PER_BLOCK, self.genes - number * GENES_PER_BLOCK)

    def _keys(self, number: int):
        start = 0
        for ends in self._ends:
            first = ends[number - 1] if number else start
            size = int(ends[number] - first) * 4
            if size:
                yield np.frombuffer(os.pread(self._spool.fileno(), size, int(first) * 4), np.uint32)
            start = ends[-1]
