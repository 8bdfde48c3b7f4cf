"""Counts per bin of a section on disk: read in bounded memory, cut window by window."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.files import disk_errors
from stsr.geometry.grid import Grid, add_up
from stsr.store.section import Section

_BLOCK = 256  # bins along a side of a block: the chunks of stores. Places in a block fit into 16 bits
_GENES_AT_ONCE = 64  # four chunks of a store
_PIECE = 2**22  # entries that are hashed at once
_TOLERANCE = 1e-3  # counts; rounding of fractional halves
_BITS = np.array([2**bits - 1 for bits in range(9)], np.uint8)  # the lowest 0 to 8 bits
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)
_GENE_BITS, _TRANSCRIPT_BITS = 16, 20  # of the number of a transcript; the others are those of its bin


@dataclass(frozen=True)
class _Block:
    """A square of bins, whose entries are stored together in row-major order."""

    rows: slice
    columns: slice
    entries: slice


@dataclass(frozen=True)
class Window:
    """The counts of a window of bins, in row-major order: entries ``first[i]`` to ``first[i + 1]`` are of bin i."""

    first: np.ndarray
    """(bins + 1,)"""
    gene: np.ndarray
    """(n,) int32"""
    count: np.ndarray
    """(n,) unsigned whole numbers, or float32."""
    unseen: np.ndarray | None
    """(n,) float32, the part of the count in the fixed second half; None for whole numbers."""
    bins: np.ndarray | None = None
    """(bins,) number of each bin in the section, for `split`."""

    def halves(self, rng: np.random.Generator, depth: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Split the counts into two halves (n,) float32 with independent noise.

        Whole counts are thinned to the fraction ``depth``, then each transcript goes to either half with probability
        1/2. Fractional counts have two fixed halves, whose order is random; to be thinned, they are first rounded up
        with the probability of their fraction.
        """
        if self.unseen is not None:
            fixed = self.count - self.unseen, self.unseen
            first, second = fixed if rng.random() < 0.5 else fixed[::-1]
            return _thinned(first, depth, rng), _thinned(second, depth, rng)
        count = self.count if depth == 1 else rng.binomial(self.count, depth)
        # The number of ones among n random bits is binomial: 20 times faster than rng.binomial.
        bits = np.frombuffer(rng.bytes(len(count)), np.uint8)
        half = _ONES[bits & _BITS[np.minimum(count, 8)]].astype(np.float32)
        many = np.flatnonzero(count > 8)
        half[many] = rng.binomial(count[many], 0.5)
        return half, count - half

    def split(self, key: int, depth: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """`halves` that are always the same for a key: every window of a section gives the same split of its bins.

        The random number of a transcript is a function of the key, its bin, its gene and its number among theirs.
        """
        assert self.bins is not None, "windows of a section have them"
        entry = (np.repeat(self.bins, np.diff(self.first)) << _GENE_BITS) + self.gene
        if self.unseen is None:
            drawn, owner = _drawn(key, entry, self.count)
            parts = drawn < depth / 2, (drawn >= depth / 2) & (drawn < depth)
            first, second = (np.bincount(owner[part], minlength=len(entry)) for part in parts)
            return first.astype(np.float32), second.astype(np.float32)
        fixed = [self.count - self.unseen, self.unseen]
        if depth < 1:
            for number, half in enumerate(fixed):
                whole = np.floor(half + _uniform(key + 2 * number + 1, entry)).astype(np.int64)
                drawn, owner = _drawn(key + 2 * number + 2, entry, whole)
                fixed[number] = np.bincount(owner[drawn < depth], minlength=len(entry)).astype(np.float32)
        return (fixed[0], fixed[1]) if key % 2 else (fixed[1], fixed[0])

    def matrix(self, counts: np.ndarray, genes: int) -> sp.csr_matrix:
        """Entries (n,) as a matrix (bins, genes)."""
        return sp.csr_matrix((counts, self.gene, self.first), (len(self.first) - 1, genes))


def _thinned(counts: np.ndarray, depth: float, rng: np.random.Generator) -> np.ndarray:
    """Fractional counts (n,) thinned to the fraction ``depth``: whole numbers with the same mean, times it."""
    if depth == 1:
        return counts
    whole = np.floor(counts + rng.random(len(counts))).astype(np.int64)
    return rng.binomial(whole, depth).astype(np.float32)


def _drawn(key: int, entry: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A uniform number for each transcript of entries (n,), and the position of its entry: both (transcripts,)."""
    owner = np.repeat(np.arange(len(entry)), count)
    first = np.cumsum(count, dtype=np.int64) - count
    return _uniform(key, (entry[owner] << _TRANSCRIPT_BITS) + np.arange(len(owner)) - first[owner]), owner


def _uniform(key: int, number: np.ndarray) -> np.ndarray:
    """Uniform random numbers (n,) in [0, 1), each a function of the key and of its own number alone.

    Source: SplitMix64 (Steele, Lea and Flood 2014, OOPSLA), whose state is here a key and a counter.
    """
    x = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class BinCounts:
    """Sparse counts per bin in temporary files, which vanish with the process.

    Entries of a block of bins lie together, bin by bin, so a window is read as a few runs per row.
    """

    genes: int
    """Number of genes."""
    first: np.ndarray
    """(height, width) int64, number of the first entry of each bin."""
    length: np.ndarray
    """(height, width) int32, entries of each bin."""
    gene: np.ndarray
    """(n,) on disk."""
    count: np.ndarray
    """(n,) on disk: unsigned whole numbers, or float32."""
    unseen: np.ndarray | None
    """(n,) on disk, as in `Window`."""
    blocks: tuple[_Block, ...]

    def cut(self, row: int, column: int, height: int, width: int) -> Window:
        """Read a window; bins beyond the grid have no counts."""
        rows, columns = (
            slice(max(start, 0), min(start + side, most))
            for start, side, most in zip((row, column), (height, width), self.first.shape, strict=True)
        )
        length = np.zeros((height, width), np.int64)
        length[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column] = (
            self.length[rows, columns]
        )
        edges = [columns.start, *range((columns.start // _BLOCK + 1) * _BLOCK, columns.stop, _BLOCK)]
        last = np.array([*edges[1:], columns.stop]) - 1
        starts = self.first[rows, edges].ravel().tolist()
        stops = (self.first[rows, last] + self.length[rows, last]).ravel().tolist()
        runs = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]

        def read(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[run] for run in runs])

        first = np.zeros(height * width + 1, np.int32)
        np.cumsum(length.ravel(), out=first[1:])
        return Window(
            first,
            read(self.gene).astype(np.int32),
            read(self.count),
            None if self.unseen is None else read(self.unseen),
            np.add.outer(
                np.arange(row, row + height) * self.first.shape[1], np.arange(column, column + width)
            ).ravel(),
        )

    def weighted(self, weights: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """Weighted sums over bins: weights (k, height, width) -> (k, genes) float64.

        ``counts`` is `unseen` for the sums of the second half.
        """
        counts = self.count if counts is None else counts
        sums = np.zeros((len(weights), self.genes))
        for block in self.blocks:
            if block.entries.start == block.entries.stop:
                continue
            length = self.length[block.rows, block.columns].ravel()
            gene, count = self.gene[block.entries], counts[block.entries]
            for total, own in zip(sums, weights[:, block.rows, block.columns], strict=True):
                weight = np.repeat(own.ravel().astype(np.float64), length)
                total += np.bincount(gene, weight * count, self.genes)
        return sums

    def of_genes(self, columns: np.ndarray, genes: int) -> BinCounts:
        """Give each gene a new number, ``columns`` (genes,), or drop it where that is -1; files become compact."""
        highest = max((self.count[block.entries].max(initial=0) for block in self.blocks), default=0)
        kind = self.count.dtype if self.unseen is not None else np.min_scalar_type(int(highest))
        halves = [] if self.unseen is None else [self.unseen]
        new = np.zeros(self.length.shape, np.int32)
        with _Files(np.min_scalar_type(genes), kind, bool(halves)) as files:
            for block in self.blocks:
                gene = columns[self.gene[block.entries]]
                kept = np.flatnonzero(gene >= 0)
                length = self.length[block.rows, block.columns]
                place = np.repeat(np.arange(length.size), length.ravel())[kept]
                new[block.rows, block.columns] = np.bincount(place, minlength=length.size).reshape(
                    length.shape
                )
                files.add(gene[kept], *(values[block.entries][kept] for values in (self.count, *halves)))
            return files.counts(genes, new, [(block.rows, block.columns) for block in self.blocks])

    def update(self, digest: hashlib._Hash) -> None:
        """Add all counts to a hash, piece by piece."""
        digest.update(np.ascontiguousarray(self.length).data)
        for array in (self.gene, self.count, *([] if self.unseen is None else [self.unseen])):
            for start in range(0, len(array), _PIECE):
                digest.update(np.ascontiguousarray(array[start : start + _PIECE]).data)


class _Files:
    """Temporary files for genes, counts and, of fractional counts, the second half."""

    def __init__(self, gene: np.dtype, count: np.dtype, halves: bool):
        self._kinds = [np.dtype(gene), np.dtype(count)] + [np.dtype(np.float32)] * halves
        with disk_errors(_temporary()):
            self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in self._kinds]  # noqa: SIM115 - see __exit__
        self._stops: list[int] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, *parts: np.ndarray) -> None:
        """Append the entries of a block."""
        with disk_errors(_temporary()):
            for file, kind, part in zip(self._files, self._kinds, parts, strict=True):
                file.write(np.ascontiguousarray(part, kind).data)
        self._stops.append((self._stops or [0])[-1] + len(parts[0]))

    def counts(self, genes: int, length: np.ndarray, places: Sequence[tuple[slice, slice]]) -> BinCounts:
        """The finished counts, from the entries of each bin (height, width) and the blocks in their order."""
        first = np.zeros(length.shape, np.int64)
        blocks, start = [], 0
        for (rows, columns), stop in zip(places, self._stops, strict=True):
            own = length[rows, columns]
            first[rows, columns] = start + (np.cumsum(own.ravel()) - own.ravel()).reshape(own.shape)
            blocks.append(_Block(rows, columns, slice(start, stop)))
            start = stop
        with disk_errors(_temporary()):
            gene, count, *unseen = map(_mapped, self._files, self._kinds)
        return BinCounts(genes, first, length, gene, count, unseen[0] if unseen else None, tuple(blocks))


def on_disk(values: np.ndarray) -> np.ndarray:
    """A copy of an array in a temporary file, which vanishes with the process."""
    with disk_errors(_temporary()), tempfile.TemporaryFile() as file:
        file.write(np.ascontiguousarray(values).data)
        return _mapped(file, values.dtype).reshape(values.shape)


def _temporary() -> Path:
    """A path in the folder of temporary files, for messages."""
    return Path(tempfile.gettempdir()) / "counts"


def _mapped(file: IO[bytes], kind: np.dtype) -> np.ndarray:
    """A file as an array on disk, which stays when the file is closed."""
    file.flush()
    return np.asarray(np.memmap(file, kind, "r")) if file.tell() else np.zeros(0, kind)


def read_counts(section: Section, genes: Sequence[str], grid: Grid) -> BinCounts:
    """Read the counts of some genes of a section on the grid, block by block.

    Raises
    ------
    StsrError
        If they are not raw counts, or fractional without an image of the half that spots do not contain.
    """
    assert section.hr is not None, "check_section comes first"
    halves = section.unseen is not None
    length = np.zeros(grid.shape, np.int32)
    places = list(_blocks(grid))
    whole = True
    with _Files(np.min_scalar_type(len(genes)), np.dtype(np.float32), halves) as files:
        for rows, columns in places:
            shape = rows.stop - rows.start, columns.stop - columns.start
            window = grid.window(rows.start, columns.start, *shape)
            place, gene, *counts = _read_block(section, genes, window)
            whole = whole and bool((counts[0] == np.rint(counts[0])).all())
            if not whole and not halves:
                raise StsrError(
                    f"the high-resolution map of {section.name} does not hold raw counts, or holds fractions of counts "
                    "without their second half; prepare it again"
                )
            length[rows, columns] = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
            order = np.argsort(place, kind="stable")  # genes stay in order
            files.add(gene[order], *(count[order] for count in counts))
        found = files.counts(len(genes), length, places)
    return replace(found, unseen=None) if whole else found


def _blocks(grid: Grid) -> Iterator[tuple[slice, slice]]:
    for row in range(0, grid.height, _BLOCK):
        for column in range(0, grid.width, _BLOCK):
            yield slice(row, min(row + _BLOCK, grid.height)), slice(column, min(column + _BLOCK, grid.width))


def _read_block(section: Section, genes: Sequence[str], window: Grid) -> list[np.ndarray]:
    """Entries of a window: place in it (n,) uint16, gene (n,), count (n,) float32, and unseen count if there is one."""
    assert section.hr is not None
    fine = window.at(section.hr.grid.bin_um)
    factor, bins = fine.height // window.height, window.height * window.width
    maps = [section.hr] if section.unseen is None else [section.hr, section.unseen]
    parts = []
    for start in range(0, len(genes), _GENES_AT_ONCE):
        names = genes[start : start + _GENES_AT_ONCE]
        counts = [add_up(np.asarray(each.read(names, fine)), factor).ravel() for each in maps]
        at = np.flatnonzero(counts[0] != 0)  # a third of the time of nonzero on numbers
        values = [each[at].astype(np.float32) for each in counts]
        _check_counts(section.name, *values)
        gene = (at // bins + start).astype(np.min_scalar_type(len(genes)))
        parts.append([(at % bins).astype(np.uint16), gene, *values])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _check_counts(name: str, count: np.ndarray, unseen: np.ndarray | None = None) -> None:
    """Check that counts (n,) are counts, and that those of the second half are part of them."""
    if not np.isfinite(count).all() or count.min(initial=0) < 0:
        raise StsrError(f"the high-resolution map of {name} does not hold raw counts; prepare it again")
    if unseen is None:
        return
    part = (unseen >= -_TOLERANCE) & (unseen <= count + _TOLERANCE)
    if not part.all():  # NaN is not, either
        raise StsrError(f"the unseen half of the counts of {name} exceeds the counts; prepare it again")
    np.clip(unseen, 0, count, out=unseen)
