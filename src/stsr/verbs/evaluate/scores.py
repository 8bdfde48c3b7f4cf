"""Scores of predicted spots, with intervals from resampled blocks of neighbouring spots.

Neighbouring spots are alike, so intervals from single spots would be too narrow. All scores follow from sums over
spots; the sums of each block are computed once and weighted anew in every resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import xlogy

RESAMPLES = 500
_LEAST_MEAN = (
    1e-6  # counts per spot: predicting exactly zero where something was counted has infinite deviance
)
_LEVEL = 0.95
_NEWTON_STEPS = 15


@dataclass(frozen=True)
class Sums:
    """Sums over the spots of each block, per gene: (terms, blocks, g).

    Terms: 1, p, y, p^2, y^2, p y, deviance of p, deviance of the gene's mean; p is the prediction and y the counts.
    """

    values: np.ndarray

    @classmethod
    def of(cls, predicted: np.ndarray, counts: np.ndarray, block: np.ndarray) -> Sums:
        """Sum over blocks.

        Parameters
        ----------
        predicted, counts
            (spots, g).
        block
            (spots,) number of the block of each spot.
        """
        p, y = np.maximum(predicted, _LEAST_MEAN), counts
        mean = np.maximum(y.mean(0), _LEAST_MEAN)
        deviances = [2 * (xlogy(y, y / rate) - (y - rate)) for rate in (p, np.broadcast_to(mean, y.shape))]
        terms = [np.ones_like(y), predicted, y, predicted**2, y**2, predicted * y, *deviances]
        values = np.zeros((len(terms), int(block.max(initial=-1)) + 1, counts.shape[1]))
        for term, each in zip(values, terms, strict=True):
            np.add.at(term, block, each)
        return cls(values)

    def pcc(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Pearson correlation (g,); NaN for genes whose counts do not vary, 0 where only the prediction is constant."""
        n, p, y, pp, yy, py = self._weighted(weights)[:6]
        covariance = n * py - p * y
        spread_p, spread_y = np.maximum(n * pp - p * p, 0), np.maximum(n * yy - y * y, 0)
        norm = np.sqrt(spread_p * spread_y)
        small = spread_p <= 1e-9 * np.maximum(n * pp, 1e-30)
        found = np.divide(covariance, norm, out=np.zeros_like(norm), where=(norm > 0) & ~small)
        return np.where(spread_y > 0, found, np.nan)

    def deviance_explained(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Fraction (g,) of the Poisson deviance that the prediction explains; NaN for genes without counts."""
        _, _, counted, *_, own, plain = self._weighted(weights)
        return np.where((counted > 0) & (plain > 0), 1 - own / np.maximum(plain, 1e-12), np.nan)

    def _weighted(self, weights: np.ndarray | None) -> np.ndarray:
        return self.values.sum(1) if weights is None else np.einsum("tbg,b->tg", self.values, weights)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """The same resamples of blocks for every way, so that differences are paired.

    Parameters
    ----------
    blocks
        Number of blocks.
    seed
        Of the resamples.
    """

    def __init__(self, blocks: int, seed: int):
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES).astype(float)

    def mean(self, sums: Sums, score: str) -> Interval:
        """Mean over genes of ``"pcc"`` or ``"deviance_explained"``."""
        return _interval(_mean(getattr(sums, score)()), self._draws(sums, score))

    def difference(self, sums: Sums, other: Sums, score: str) -> Interval:
        """Difference of two ways in the mean over genes, from the same resamples."""
        value = _mean(getattr(sums, score)()) - _mean(getattr(other, score)())
        return _interval(value, self._draws(sums, score) - self._draws(other, score))

    def genes_ahead(self, sums: Sums, other: Sums) -> np.ndarray:
        """Genes (g,) bool whose deviance is lower than the other's in 97.5 % of the resamples."""
        gain = np.einsum("bg,rb->rg", other.values[6] - sums.values[6], self.weights)
        return (gain > 0).mean(0) >= 1 - (1 - _LEVEL) / 2

    def _draws(self, sums: Sums, score: str) -> np.ndarray:
        return np.array([_mean(getattr(sums, score)(weights)) for weights in self.weights])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _interval(value: float, draws: Sequence[float] | np.ndarray) -> Interval:
    low, high = np.nanquantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(value, float(low), float(high))


def slope(predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Calibration slope (g,): b of ``log E[y] = a + b log p``, by Poisson regression over spots (spots, g).

    1 if differences between spots are as large as predicted; less if the prediction exaggerates them. NaN where the
    prediction does not vary or nothing was counted.
    """
    x = np.log(np.maximum(predicted, _LEAST_MEAN))
    x = x - x.mean(0)
    spread = (x**2).mean(0)
    usable = (spread > 1e-9) & (counts.sum(0) > 0)
    a, b = np.log(np.maximum(counts.mean(0), _LEAST_MEAN)), np.zeros(x.shape[1])
    for _ in range(_NEWTON_STEPS):
        rate = np.exp(np.clip(a + b * x, -30, 30))
        left = counts - rate
        s0, s1, s2 = rate.sum(0), (rate * x).sum(0), (rate * x**2).sum(0)
        g0, g1 = left.sum(0), (left * x).sum(0)
        determinant = np.maximum(s0 * s2 - s1 * s1, 1e-12)
        step = np.clip(np.stack([s2 * g0 - s1 * g1, s0 * g1 - s1 * g0]) / determinant, -1, 1)
        a, b = a + step[0], b + step[1]
    return np.where(usable, b, np.nan)
