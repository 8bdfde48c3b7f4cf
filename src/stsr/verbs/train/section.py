"""A section in memory for training: counts, image and simulated spots, from which tiles are cut quickly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.geometry.measurement import Measurement
from stsr.methods.batch import Requirements, lr_mean
from stsr.store.section import Section

SPOT_KINDS: dict[str, Callable[[Grid], Measurement]] = {
    "square": Measurement.squares,
    "visium": Measurement.hexagonal,
}
"""Kinds of spots that can be simulated from counts per bin."""

_GENES_AT_ONCE = 16  # chunk size of stores


class SparseCounts:
    """Sparse counts of all genes per bin, 3 to 5 bytes per non-zero entry.

    Parameters
    ----------
    matrix
        (bins, genes), non-negative whole numbers.
    width
        Bins per row of the grid.
    """

    def __init__(self, matrix: sp.csr_matrix, width: int):
        self.width = width
        self.genes = matrix.shape[1]
        self._first = matrix.indptr.astype(np.int64)
        self._gene = matrix.indices.astype(np.uint16 if self.genes < 2**16 else np.int32)
        highest = matrix.data.max(initial=0)
        self._count = matrix.data.astype(
            np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.uint32
        )

    @property
    def matrix(self) -> sp.csr_matrix:
        """(bins, genes) float32."""
        shape = (len(self._first) - 1, self.genes)
        return sp.csr_matrix(
            (self._count.astype(np.float32), self._gene.astype(np.int32), self._first), shape
        )

    def cut(self, row: int, column: int, order: np.ndarray, out: np.ndarray) -> None:
        """Write a window into ``out`` (genes, side, side), which is zero.

        Parameters
        ----------
        row, column
            First bin.
        order
            (side * side,) new position of each bin, which rotates and mirrors the window.
        """
        side = out.shape[-1]
        corners = (row + np.arange(side)) * self.width + column
        edges = self._first[corners[:, None] + np.arange(side + 1)]  # (side, side + 1)
        runs = list(zip(edges[:, 0].tolist(), edges[:, -1].tolist(), strict=True))
        gene = np.concatenate([self._gene[first:last] for first, last in runs]).astype(np.int64)
        place = np.repeat(order, np.diff(edges, axis=1).ravel())
        out.reshape(-1)[gene * side**2 + place] = np.concatenate(
            [self._count[first:last] for first, last in runs]
        )

    def thinned(self, part: float, rng: np.random.Generator) -> SparseCounts:
        """Keep each transcript with probability ``part``, as in a shallower section."""
        matrix = self.matrix
        matrix.data = rng.binomial(self._count, part).astype(np.float32)
        matrix.eliminate_zeros()
        return SparseCounts(matrix, self.width)

    def update(self, digest: hashlib._Hash) -> None:
        """Add all counts to a hash."""
        for array in (self._first, self._gene, self._count):
            digest.update(np.ascontiguousarray(array).data)


@dataclass(frozen=True)
class Raster:
    """Simulated spots as a low-resolution raster that starts at bin (row, column) of the section's grid."""

    row: int
    column: int
    lr: np.ndarray
    """(g, h, w) float32, from `Measurement.raster`."""
    mask: np.ndarray
    """(1, h, w) float32, likewise."""
    mean: np.ndarray
    """(g,) float32, mean counts as in `Batch.lr_mean`."""


@dataclass(frozen=True)
class TrainingSection:
    """A training section in memory."""

    name: str
    """Name of the section."""
    grid: Grid
    """Bins."""
    image: np.ndarray
    """(3, H, W) uint8 over the grid."""
    counts: SparseCounts
    """Counts per bin."""
    rasters: list[list[Raster]]
    """``rasters[phase][kind]``: simulated spots for every shift of the low-resolution raster."""

    def update(self, digest: hashlib._Hash) -> None:
        """Add everything that training uses to a hash."""
        digest.update(repr((self.name, self.grid)).encode())
        digest.update(np.ascontiguousarray(self.image).data)
        self.counts.update(digest)


def check_section(section: Section, requirements: Requirements) -> None:
    """Check that a section can be used for training.

    Raises
    ------
    StsrError
        If it has no counts per bin or no image, or its bins do not add up to those of the method.
    """
    if section.hr is None:
        raise StsrError(
            f"{section.name} has no high-resolution counts to train on; prepare a Xenium folder: stsr prepare FOLDER"
        )
    if section.image is None:
        raise StsrError(
            f"no H&E image in {section.name}; run: stsr prepare FOLDER --he he.ome.tif --overwrite"
        )
    factor = requirements.bin_um / section.hr.grid.bin_um
    if abs(factor - round(factor)) > 1e-6 or round(factor) < 1:
        raise StsrError(
            f"{section.name} has bins of {section.hr.grid.bin_um:g} um and the method needs "
            f"{requirements.bin_um:g} um; run: stsr prepare FOLDER --bin-um {requirements.bin_um:g} --overwrite"
        )


def read_counts(section: Section, genes: Sequence[str], grid: Grid) -> SparseCounts:
    """Read the counts of some genes on the grid, a few genes at a time.

    Raises
    ------
    StsrError
        If they are not raw counts.
    """
    assert section.hr is not None, "check_section comes first"
    parts = []
    fine = grid.at(section.hr.grid.bin_um)
    factor = fine.height // grid.height
    for first in range(0, len(genes), _GENES_AT_ONCE):
        block = section.hr.read(genes[first : first + _GENES_AT_ONCE], fine)
        block = add_up(np.asarray(block), factor).reshape(len(block), -1)  # (genes, bins)
        gene, place = np.nonzero(block)
        count = block[gene, place]
        if count.size and (count.min() < 0 or (count.dtype.kind == "f" and (count != np.rint(count)).any())):
            raise StsrError(
                f"the high-resolution map of {section.name} does not hold raw counts; prepare it again"
            )
        parts.append((count.astype(np.uint32), place, gene + first))
    count, place, gene = (np.concatenate(column) for column in zip(*parts, strict=True))
    shape = (grid.height * grid.width, len(genes))
    return SparseCounts(sp.coo_matrix((count, (place, gene)), shape).tocsr(), grid.width)


def simulate_rasters(
    counts: SparseCounts,
    grid: Grid,
    shifts: Sequence[tuple[int, int]],
    kinds: Sequence[str],
    seen: np.ndarray,
    tissue: np.ndarray,
    lr_um: float,
) -> list[list[Raster]]:
    """Simulate spots of every kind for every shift; only spots that lie in tissue, as `prepare` keeps them.

    Parameters
    ----------
    counts, grid
        Counts per bin, and the bins.
    shifts
        First bin (row, column) of each raster.
    kinds
        Names in `SPOT_KINDS`.
    seen
        (height, width) bool: bins that can enter the section's mean counts. A low-resolution pixel enters only if
        all of its bins do.
    tissue
        (height, width) bool.
    lr_um
        Pitch of the low-resolution raster, um.

    Returns
    -------
    list of list of Raster
        ``rasters[shift][kind]``.
    """
    matrix = counts.matrix
    per_lr = grid.height // grid.at(lr_um).height
    every = np.arange(grid.height * grid.width).reshape(grid.shape)
    rasters = []
    for row, column in shifts:
        height, width = (
            (size - start) // per_lr * per_lr for size, start in zip(grid.shape, (row, column), strict=True)
        )
        part = (slice(row, row + height), slice(column, column + width))
        inside = matrix[every[part].ravel()]
        weight = add_up(seen[part].astype(np.int64), per_lr) == per_lr**2  # (h, w)
        phase = []
        for kind in kinds:
            measurement = SPOT_KINDS[kind](grid.window(row, column, height, width))
            measurement = measurement.of_spots(measurement.in_tissue(tissue[part]))
            lr, mask = measurement.raster((measurement.matrix @ inside).tocsr(), lr_um)
            phase.append(Raster(row, column, lr, mask, lr_mean(lr, mask * weight)))
        rasters.append(phase)
    return rasters
