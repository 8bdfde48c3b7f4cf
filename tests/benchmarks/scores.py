"""Scores that only benchmarks compute: errors at the spots, and calibration of samples.

Every score is (g,), one value per gene, NaN where it is undefined.
"""

from __future__ import annotations

import numpy as np

from stsr.geometry.measurement import Measurement


def spots_error(prediction: np.ndarray, measurement: Measurement, counts) -> np.ndarray:
    """Relative error of a map summed over the spots: sum of absolute errors / sum of counts.

    Parameters
    ----------
    prediction
        (g, y, x) counts per bin on the measurement's grid.
    measurement
        Fraction of each bin that each spot covers.
    counts
        (spots, g) measured counts, dense or sparse.
    """
    measured = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, float)
    error, total = np.abs(measurement.add_up(prediction) - measured).sum(0), measured.sum(0)
    return np.divide(error, total, out=np.full(len(total), np.nan), where=total > 0)


def coverage(
    samples: np.ndarray,
    truth: np.ndarray,
    level: float = 0.9,
    counting: np.random.Generator | None = None,
) -> np.ndarray:
    """Fraction of bins whose true value lies in the central interval of the samples.

    Quantiles are placed at k / (n + 1), so that a truth drawn from the same distribution as the samples is covered with
    probability ``level``. Fewer than ``2 / (1 - level) - 1`` samples (19 for 90 %) cannot reach it and cover
    (n - 1) / (n + 1).

    Parameters
    ----------
    samples
        (n, g, y, x) expected counts per bin.
    truth
        (g, y, x).
    level
        Probability of the interval.
    counting
        Random generator of the Poisson noise to add to the samples, if the truth are measured counts.
    """
    samples = _counted(samples, counting)
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="weibull")
    return _per_gene((low <= truth) & (truth <= high))


def crps(samples: np.ndarray, truth: np.ndarray, counting: np.random.Generator | None = None) -> np.ndarray:
    """Fair continuous ranked probability score, counts per bin; 0 is perfect.

    ``mean |x_i - y| - sum_ij |x_i - x_j| / (2 n (n - 1))`` over n samples, an estimate without bias in n (Ferro 2014).
    One sample gives the mean absolute error. Parameters as for `coverage`.
    """
    samples = np.sort(_counted(samples, counting), axis=0)  # (n, g, y, x)
    count = len(samples)
    error = np.abs(samples - truth[None]).mean(0)
    if count > 1:
        # The sum of all pairwise differences is a weighted sum of the sorted samples.
        weights = 2 * np.arange(count) - count + 1
        error = error - np.tensordot(weights, samples, 1) / (count * (count - 1))
    return _per_gene(error)


def _counted(samples: np.ndarray, counting: np.random.Generator | None) -> np.ndarray:
    samples = np.asarray(samples, np.float64)
    return samples if counting is None else counting.poisson(np.maximum(samples, 0)).astype(np.float64)


def _per_gene(values: np.ndarray) -> np.ndarray:
    """Mean (g,) over the bins of (g, y, x)."""
    return values.reshape(len(values), -1).mean(1)
