"""Random choice of training tiles, balanced over organs and sections, by tissue within a section; and of depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stsr.verbs.train.config import TrainConfig

_OVERLAP = 0.5  # largest fraction of its area that a tile of a minibatch shares with another
_TRIES = 30  # draws in a section before larger overlaps are accepted, and before another section is drawn


@dataclass(frozen=True)
class Places:
    """Positions of the training tiles of a section."""

    organ: str
    starts: np.ndarray
    """First bins (n, 2)."""
    tissue: np.ndarray
    """(n,) fraction of each tile in tissue."""


class Sampler:
    """Draws the tiles of minibatches.

    Each tile's organ is drawn uniformly, then a section of the organ in proportion to the square root of its number of
    tiles, then a tile in proportion to its fraction of tissue. So an organ with many sections, or one large section,
    does not dominate, while a section with more tissue is still seen more often than a small one.

    Parameters
    ----------
    places
        Of each section; a section without tiles is never drawn.
    side
        Side of a tile, bins.
    """

    def __init__(self, places: Sequence[Places], side: int):
        self.places = places
        self._side = side
        self.count = sum(len(each.starts) for each in places)
        self.weights = section_weights(places)
        self._tissue = [np.cumsum(np.maximum(each.tissue, 1e-3)) for each in places]  # a tile may have none

    def draw(self, size: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Draw different tiles (section, first row, first column), which share at most half of their area.

        Larger overlaps are accepted where a section is too small.
        """
        chosen: list[tuple[int, int, int]] = []
        while len(chosen) < size:
            section = int(np.searchsorted(np.cumsum(self.weights), rng.random() * self.weights.sum()))
            tile = self._tile(section, [(y, x) for other, y, x in chosen if other == section], rng)
            if tile is not None:  # else all tiles of the section are in the batch
                chosen.append((section, *tile))
        return chosen

    def _tile(
        self, section: int, others: list[tuple[int, int]], rng: np.random.Generator
    ) -> tuple[int, int] | None:
        summed, starts = self._tissue[section], self.places[section].starts
        for attempt in range(2 * _TRIES):
            number = int(np.searchsorted(summed, rng.random() * summed[-1], side="right"))
            row, column = starts[min(number, len(starts) - 1)].tolist()
            most = _OVERLAP if attempt < _TRIES else 1 - 1e-9
            if all(self._overlap((row, column), other) <= most for other in others):
                return row, column
        return None

    def _overlap(self, start: tuple[int, int], other: tuple[int, int]) -> float:
        """Fraction of a tile's area that it shares with another tile."""
        rows, columns = (max(0, self._side - abs(a - b)) for a, b in zip(start, other, strict=True))
        return rows * columns / self._side**2


def section_weights(places: Sequence[Places]) -> np.ndarray:
    """Fraction of the tiles that each section gives: (sections,), summing to 1."""
    root = np.sqrt([len(each.starts) for each in places])
    organs = np.unique([each.organ for each in places], return_inverse=True)[1]
    per_organ = np.bincount(organs, root)
    return np.where(root > 0, root / np.maximum(per_organ[organs], 1e-9), 0) / (per_organ > 0).sum()


def drawn_depth(config: TrainConfig, per_spot: float, quantile: float) -> float:
    """The fraction to which transcripts are thinned.

    Parameters
    ----------
    config
        Its ``depths`` or ``spot_counts``.
    per_spot
        Counts of the mean spot without thinning.
    quantile
        What was drawn, at least 0 and below 1; with ``spot_counts``, larger ones are shallower.
    """
    least = _least_depth(config, per_spot)
    return config.depths[int(quantile * len(config.depths))] if least is None else least**quantile


def mean_depth(config: TrainConfig, per_spot: float) -> float:
    """Mean of `drawn_depth`."""
    least = _least_depth(config, per_spot)
    if least is None:
        return float(np.mean(config.depths))
    return 1.0 if least == 1 else (1 - least) / -float(np.log(least))


def _least_depth(config: TrainConfig, per_spot: float) -> float | None:
    """The depth at which spots have the fewest counts that the config allows; None if it lists depths."""
    if not config.spot_counts:
        return None
    return min(1.0, config.spot_counts / per_spot) if per_spot else 1.0
