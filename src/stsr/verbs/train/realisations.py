"""Denoised spots for training: a section's spots are simulated from one half of its counts and denoised together.

Denoising a spot needs all spots of its section, so tiles cannot draw their halves one by one. Each realisation fixes
one split of the transcripts for the whole section: one half gives the spots, the other one the truth of its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.methods.batch import Requirements, cut, lr_mean
from stsr.spots.denoising import denoise
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.counts import BinCounts, on_disk
from stsr.verbs.train.sampling import drawn_depth
from stsr.verbs.train.section import TrainingSection
from stsr.verbs.train.spots import spots_over

FACTOR_GENES = 1000
"""Genes of a section that take part in denoising: the panel, and the most counted others. Prediction uses all genes."""

_KEYS = 16  # distance of the keys of two stores; a multiple of 2, so that both take the same fixed half
_SIDE = 128  # bins along a side of the windows that are read, for bounded memory


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a realisation is drawn."""

    kind: str
    """Of spots."""
    lattice: int
    """Number of the lattice of that kind."""
    depth: float
    """Fraction of the transcripts that is used."""
    corner: tuple[int, int]
    """First bin of the low-resolution raster, row and column."""
    key: int
    """Of the halves, see `Window.split`."""


@dataclass(frozen=True, kw_only=True)
class Realisation:
    """Denoised spots of a section on the low-resolution raster, as a prediction would read them."""

    split: Split
    lr: np.ndarray
    """(g, h, w) float32, on disk."""
    mask: np.ndarray
    """(1, h, w) float32."""
    mean: np.ndarray
    """(g,) float32, `stsr.methods.batch.lr_mean`."""
    per_lr: int
    """Bins along a low-resolution pixel."""
    starts: np.ndarray
    """First bins (n, 2) of the training tiles that lie on its raster."""

    def nearest(self, row: int, column: int) -> tuple[int, int]:
        """First bin of the training tile on the raster that is nearest to the one at ``row``, ``column``."""
        distance = np.abs(self.starts - np.array([row, column])).sum(1)
        near, across = self.starts[int(distance.argmin())].tolist()
        return near, across

    def cut(self, row: int, column: int, side_lr: int) -> tuple[np.ndarray, np.ndarray]:
        """Raster (g, h, w) and mask (1, h, w) of a tile on the raster, by its first bin."""
        top, left = (
            (start - first) // self.per_lr
            for start, first in zip((row, column), self.split.corner, strict=True)
        )
        lr, mask = (cut(array, top, left, side_lr, side_lr) for array in (self.lr, self.mask))
        return lr, mask


def training_splits(
    section: TrainingSection, starts: np.ndarray, config: TrainConfig, *, per_lr: int, seed: Sequence[int]
) -> list[Split]:
    """Draw the realisations of a section: kinds of spots in turn, and for each kind depths over the whole range.

    Parameters
    ----------
    starts
        First bins (n, 2) of its training tiles, on whose rasters the realisations lie.
    seed
        Whole numbers that determine what is drawn.
    """
    kinds, count = len(config.spots), config.realisations
    corners = np.unique(starts % per_lr, axis=0)
    splits = []
    for number in range(count if len(starts) else 0):
        rng = np.random.default_rng([*seed, number])
        kind = number % kinds
        quantile = (number // kinds + rng.random()) / -((kind - count) // kinds)  # of those of this kind
        row, column = rng.choice(corners).tolist()
        depth = drawn_depth(config, float(section.per_spot[kind]), float(quantile))
        splits.append(_split(config.spots[kind], depth, (row, column), rng))
    return splits


def validation_splits(config: TrainConfig, seed: Sequence[int]) -> list[Split]:
    """Draw one realisation for each kind of spots, with as many transcripts as there are."""
    rngs = (np.random.default_rng([*seed, number]) for number in range(len(config.spots)))
    depth = max(config.depths)
    return [_split(kind, depth, (0, 0), rng) for kind, rng in zip(config.spots, rngs, strict=True)]


def _split(kind: str, depth: float, corner: tuple[int, int], rng: np.random.Generator) -> Split:
    lattice, key = (int(rng.integers(2**bits)) for bits in (16, 62))
    return Split(kind=kind, lattice=lattice, depth=depth, corner=corner, key=key)


def realise(
    section: TrainingSection, split: Split, *, area: np.ndarray, starts: np.ndarray, needs: Requirements
) -> Realisation:
    """Simulate the spots of a section from one half of its counts, and denoise them.

    Parameters
    ----------
    section
        The section; its ``others`` take part in denoising.
    split
        What was drawn.
    area
        (height, width) bool, bins from which spots are made: those that are measured wholly inside.
    starts
        First bins (n, 2) of the section's training tiles.
    needs
        Raster of the method.

    Raises
    ------
    StsrError
        If no spot lies in the area, or its counts cannot be denoised.
    """
    grid = _raster_grid(section.grid, split.corner, needs.per_lr)
    window = (*split.corner, *grid.shape)
    tissue, usable = (cut(mask, *window) for mask in (section.tissue, area))
    measurement = spots_over(split.kind, grid, tissue, usable, split.lattice)
    if not measurement.spots:
        raise StsrError(
            f"no simulated spot lies inside the tissue of {section.name} that training may use; "
            "train with --set denoised=0"
        )
    genes = len(section.measured)
    stores = [section.counts] if section.others is None else [section.counts, section.others]
    matrix = measurement.matrix.astype(np.float32).tocsc()
    parts = [
        _simulated(counts, matrix, grid=grid, split=split, key=split.key + _KEYS * number)
        for number, counts in enumerate(stores)
    ]
    spots = denoise(sp.hstack(parts, format="csr"), genes=np.arange(genes)).expected()
    lr, mask = measurement.raster(spots, needs.lr_um)
    return Realisation(
        split=split,
        lr=on_disk(lr),
        mask=mask,
        mean=lr_mean(lr, mask),
        per_lr=needs.per_lr,
        starts=starts[(starts % needs.per_lr == split.corner).all(1)],
    )


def _raster_grid(grid: Grid, corner: tuple[int, int], per_lr: int) -> Grid:
    """The whole low-resolution pixels of a section from a first bin on."""
    height, width = (
        (side - start) // per_lr * per_lr for side, start in zip(grid.shape, corner, strict=True)
    )
    return grid.window(*corner, height, width)


def _simulated(
    counts: BinCounts, matrix: sp.csc_matrix, *, grid: Grid, split: Split, key: int
) -> sp.csr_matrix:
    """Counts (spots, genes) of one half, by the measurement's ``matrix`` (spots, bins of the grid)."""
    total = sp.csr_matrix((matrix.shape[0], counts.genes), dtype=np.float32)
    for top in range(0, grid.height, _SIDE):
        for left in range(0, grid.width, _SIDE):
            height, width = min(_SIDE, grid.height - top), min(_SIDE, grid.width - left)
            window = counts.cut(split.corner[0] + top, split.corner[1] + left, height, width)
            seen, _ = window.split(key, split.depth)
            bins = ((top + np.arange(height))[:, None] * grid.width + left + np.arange(width)).ravel()
            total = total + matrix[:, bins] @ window.matrix(seen, counts.genes)
    return total
