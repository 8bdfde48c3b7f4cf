"""Which spots are hidden together: scattered ones, or blocks of neighbours."""

from __future__ import annotations

import numpy as np

SIDES_PITCHES = (5.0, 4.0, 3.0, 2.0)
"""Sides of a block, in distances between spots: the middle of a large one has no visible spot near."""

LEAST_BLOCKS = 20
"""Small slides have smaller blocks, so that there are enough to hide in turn and to resample."""


def scattered(spots: int, folds: int, seed: int) -> np.ndarray:
    """Random folds of equal size: (spots,) numbers from 0 to folds - 1."""
    return np.random.default_rng(seed).permutation(spots) % folds


def blocks(centres_um: np.ndarray, pitch_um: float) -> np.ndarray:
    """Number (spots,) of the square block that each spot (spots, 2) lies in; spots alone if there are very few."""
    for side in SIDES_PITCHES:
        cells = np.floor((centres_um - centres_um.min(0)) / (side * pitch_um)).astype(int)
        number = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
        if number.max() + 1 >= LEAST_BLOCKS:
            return number
    return np.arange(len(centres_um))


def in_blocks(centres_um: np.ndarray, pitch_um: float, folds: int, seed: int) -> np.ndarray:
    """Folds (spots,) of whole blocks of neighbours, in random order."""
    block = blocks(centres_um, pitch_um)
    return scattered(int(block.max(initial=-1)) + 1, folds, seed)[block]
