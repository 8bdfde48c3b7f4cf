"""One section as training reads it: counts, image and simulated spots in memory, tiles cut in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.geometry.measurement import Measurement
from stsr.methods.batch import Requirements, lr_mean

SPOT_KINDS = {"square": Measurement.squares, "visium": Measurement.hexagonal}
"""How spots can be simulated from counts per bin."""

_GENES_AT_ONCE = 16  # the chunks of stores


class SparseCounts:
    """Counts of all genes per bin, as memory-thrifty as transcripts: 3 to 5 bytes per non-empty (bin, gene).

    Parameters
    ----------
    matrix
        (bins, genes) non-negative whole numbers.
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
            (side * side,) where each bin of the window goes, which turns and mirrors it.
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
        """The counts of a section of which each transcript was caught with probability ``part``."""
        matrix = self.matrix
        matrix.data = rng.binomial(self._count, part).astype(np.float32)
        matrix.eliminate_zeros()
        return SparseCounts(matrix, self.width)

    def update(self, digest) -> None:
        """Feed everything to a hash."""
        for array in (self._first, self._gene, self._count):
            digest.update(np.ascontiguousarray(array).data)


@dataclass(frozen=True)
class Raster:
    """Simulated spots as a low-resolution raster that starts at bin (row, column) of the section's grid.

    Attributes
    ----------
    lr, mask
        (g, h, w) and (1, h, w) float32, as `Measurement.raster` gives them.
    mean
        (g,) float32, as `Batch.lr_mean`.
    """

    row: int
    column: int
    lr: np.ndarray
    mask: np.ndarray
    mean: np.ndarray


@dataclass(frozen=True)
class TrainingSection:
    """A section in memory.

    Attributes
    ----------
    name
        Its name.
    grid
        Its bins.
    image
        (3, H, W) uint8 over the grid.
    counts
        Counts per bin.
    rasters
        ``rasters[phase][kind]``: spots at every shift of the low-resolution raster.
    """

    name: str
    grid: Grid
    image: np.ndarray
    counts: SparseCounts
    rasters: list[list[Raster]]

    def update(self, digest: hashlib._Hash) -> None:
        """Feed everything that training sees to a hash."""
        digest.update(repr((self.name, self.grid)).encode())
        digest.update(np.ascontiguousarray(self.image).data)
        self.counts.update(digest)


def check_section(section, requirements: Requirements) -> None:
    """Refuse a section that nothing can be learned from.

    Raises
    ------
    StsrError
        If it lacks counts per bin, or an image, or its bins do not add up to the wanted ones.
    """
    if section.hr is None:
        raise StsrError(
            f"{section.name} has no high-resolution counts to learn from; prepare a Xenium folder: stsr prepare FOLDER"
        )
    if section.image is None:
        raise StsrError(
            f"no H&E image in {section.name}; run: stsr prepare FOLDER --he he.ome.tif --overwrite"
        )
    factor = requirements.bin_um / section.hr.grid.bin_um
    if abs(factor - round(factor)) > 1e-6 or round(factor) < 1:
        raise StsrError(
            f"{section.name} has bins of {section.hr.grid.bin_um:g} um and the method learns "
            f"{requirements.bin_um:g} um; run: stsr prepare FOLDER --bin-um {requirements.bin_um:g} --overwrite"
        )


def read_counts(section, genes: Sequence[str], grid: Grid) -> SparseCounts:
    """Counts of some genes on the grid, a few genes at a time.

    Raises
    ------
    StsrError
        If they are not raw counts.
    """
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
    """Spots of every kind at every shift; as in `prepare`, only those that lie in tissue.

    Parameters
    ----------
    shifts
        First bin (row, column) of each raster.
    seen
        (height, width) bool: bins that may enter the section's mean counts, by whole low-resolution pixels.
    tissue
        (height, width) bool.
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
