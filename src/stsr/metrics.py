"""How good a super-resolved map is, per gene and in counts, against measured counts per bin.

Maps are (g, y, x) counts per bin. Every score is of a gene over the section, never of a tile, and nothing is scaled by
a minimum and a maximum of what is scored. Where a score does not exist (a gene that was not measured at all) it is nan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import ndimage, stats
from scipy.special import xlogy

from stsr.geometry.grid import add_up
from stsr.geometry.measurement import Measurement

_LEAST_MEAN = (
    1e-6  # counts per bin: a prediction of exactly zero where something was counted would be infinitely wrong
)
_SSIM_SIGMA_BINS = 1.5  # Wang et al. 2004: the window, and the constants as parts of the range
_SSIM_K1, _SSIM_K2 = 0.01, 0.03


def pearson(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Signed Pearson correlation (g,) of each gene, from values (g, n) or (g, y, x)."""
    a, b = _centred(prediction), _centred(truth)
    return _ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def spearman(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank correlation (g,) of each gene, ties sharing their mean rank."""
    return pearson(*(stats.rankdata(_flat(values), axis=1) for values in (prediction, truth)))


def rmse(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root of the mean squared error (g,), counts per bin."""
    return np.sqrt(np.square(_flat(prediction) - _flat(truth)).mean(1))


def deviance_explained(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Part (g,) of the Poisson deviance that the prediction explains: 1 perfect, 0 like the gene's mean everywhere.

    Poisson deviance is the error of counts as counts: it asks for the right level as well as the right places.
    """
    mean, counts = np.maximum(_flat(prediction), _LEAST_MEAN), _flat(truth)
    plain = np.maximum(counts.mean(1, keepdims=True), _LEAST_MEAN)
    left, whole = (2 * (xlogy(counts, counts / mu) - (counts - mu)).sum(1) for mu in (mean, plain))
    return 1 - _ratio(left, whole)


def ssim(
    prediction: np.ndarray,
    truth: np.ndarray,
    value_range: np.ndarray | float | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Structural similarity (g,) with a fixed range (Wang et al. 2004, Gaussian window of 1.5 bins).

    Parameters
    ----------
    prediction, truth
        (g, y, x) counts per bin.
    value_range
        What counts as the whole range, for each gene (g,) or all. By default the truth's largest count of the gene in
        the whole section: one range for both maps and for every method.
    mask
        (y, x) bool, bins to average over; all by default.
    """
    top = np.asarray(truth, float).max((1, 2)) if value_range is None else value_range
    top = np.broadcast_to(np.asarray(top, float), (len(truth),))
    scores = np.full(len(truth), np.nan)
    for gene in np.flatnonzero(top > 0):
        similar = _ssim_map(np.asarray(prediction[gene], float), np.asarray(truth[gene], float), top[gene])
        scores[gene] = similar.mean() if mask is None else similar[mask].mean()
    return scores


def _ssim_map(a: np.ndarray, b: np.ndarray, value_range: float) -> np.ndarray:
    def blur(values):
        return ndimage.gaussian_filter(values, _SSIM_SIGMA_BINS, truncate=3.5)

    c1, c2 = (_SSIM_K1 * value_range) ** 2, (_SSIM_K2 * value_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )


def noise_ceiling(truth: np.ndarray, rng: np.random.Generator | int = 0) -> np.ndarray:
    """Highest correlation (g,) that the best possible prediction can have with these counts.

    Counts are split into binomial halves, which share their expectation and nothing else. Their correlation r gives
    the reliability of the whole counts, ``2 r / (1 + r)`` (Spearman-Brown), and the correlation of the expectation with
    the counts is its root.

    Parameters
    ----------
    truth
        (g, y, x) or (g, n) raw counts per bin.
    rng
        Generator or seed of the split.
    """
    counts = np.rint(_flat(truth)).astype(np.int64)
    half = np.random.default_rng(rng).binomial(counts, 0.5)
    r = np.clip(pearson(half, counts - half), 0, 1)
    return np.sqrt(2 * r / (1 + r))


def spots_error(prediction: np.ndarray, measurement: Measurement, counts) -> np.ndarray:
    """How far the map added up over spots is from what was measured (g,): sum of absolute errors / sum of counts.

    Parameters
    ----------
    prediction
        (g, y, x) counts per bin on the measurement's grid.
    measurement
        Which part of each bin each spot sees.
    counts
        (spots, g) measured counts, dense or sparse.
    """
    measured = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, float)
    return _ratio(np.abs(measurement.add_up(prediction) - measured).sum(0), measured.sum(0))


def coverage(
    samples: np.ndarray,
    truth: np.ndarray,
    level: float = 0.9,
    counting: np.random.Generator | None = None,
) -> np.ndarray:
    """Part of the bins (g,) whose truth lies in the samples' central interval of this level.

    The interval runs between quantiles at k / (n + 1), so that a truth that is drawn like the n samples is covered with
    the asked probability; n below ``2 / (1 - level) - 1`` (19 for 90 %) cannot reach it and cover (n - 1) / (n + 1).

    Parameters
    ----------
    samples
        (n, g, y, x) expected counts per bin.
    truth
        (g, y, x).
    level
        Of the interval.
    counting
        Where the truth are measured counts: draws the Poisson noise that samples of the expectation lack.
    """
    samples = _counted(samples, counting)
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="weibull")
    return _flat((low <= truth) & (truth <= high)).mean(1)


def crps(samples: np.ndarray, truth: np.ndarray, counting: np.random.Generator | None = None) -> np.ndarray:
    """Fair continuous ranked probability score (g,), counts per bin: 0 is perfect.

    ``mean |x_i - y| - sum_ij |x_i - x_j| / (2 n (n - 1))`` over n samples, which unlike the plain estimate does not
    depend on n on average (Ferro 2014). One sample gives the mean absolute error. Parameters are those of `coverage`.
    """
    samples = np.sort(_counted(samples, counting), axis=0)  # (n, g, y, x)
    count = len(samples)
    error = np.abs(samples - truth[None]).mean(0)
    if count > 1:
        # In sorted order the sum of all differences is a weighted sum.
        weights = 2 * np.arange(count) - count + 1
        error = error - np.tensordot(weights, samples, 1) / (count * (count - 1))
    return _flat(error).mean(1)


def table(
    prediction: np.ndarray,
    truth: np.ndarray,
    genes: Sequence[str],
    factors: Sequence[int] = (1, 2, 4),
    bin_um: float = 10.0,
    mask: np.ndarray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """All scores of a map, per gene and bin size.

    Parameters
    ----------
    prediction, truth
        (g, y, x) counts per bin of ``bin_um``.
    genes
        Names (g,).
    factors
        Bins are added up this many times along a side before they are compared.
    bin_um
        Of the maps.
    mask
        (y, x) bool: bins to score, such as tissue; coarser bins count where they lie in it wholly.
    seed
        Of the split that gives the noise ceiling.

    Returns
    -------
    scores
        Columns gene, bin_um, mean_count (truth, per bin), pcc, spearman, rmse, deviance_explained, ssim, noise_ceiling.

    Raises
    ------
    ValueError
        If shapes do not fit together.
    """
    if prediction.shape != truth.shape or len(genes) != len(truth):
        raise ValueError(
            f"maps {prediction.shape} and {truth.shape} of {len(genes)} genes do not fit together"
        )
    parts = []
    for factor in factors:
        a, b = (add_up(_whole(values, factor), factor) for values in (prediction, truth))
        inside = _inside(mask, factor, b.shape[1:])
        chosen_a, chosen_b = a[:, inside], b[:, inside]  # (g, n)
        scores = {
            "gene": list(genes),
            "bin_um": bin_um * factor,
            "mean_count": chosen_b.mean(1),
            "pcc": pearson(chosen_a, chosen_b),
            "spearman": spearman(chosen_a, chosen_b),
            "rmse": rmse(chosen_a, chosen_b),
            "deviance_explained": deviance_explained(chosen_a, chosen_b),
            "ssim": ssim(a, b, mask=inside),
            "noise_ceiling": noise_ceiling(chosen_b, seed),
        }
        parts.append(pd.DataFrame(scores))
    return pd.concat(parts, ignore_index=True)


def _whole(values: np.ndarray, factor: int) -> np.ndarray:
    """The part of a map that whole coarse bins fill."""
    height, width = (size // factor * factor for size in values.shape[-2:])
    return np.asarray(values)[..., :height, :width]


def _inside(mask: np.ndarray | None, factor: int, shape: tuple[int, int]) -> np.ndarray:
    if mask is None:
        return np.ones(shape, bool)
    return add_up(_whole(mask.astype(np.int64), factor), factor) == factor**2


def _flat(values: np.ndarray) -> np.ndarray:
    """(g, ...) -> (g, n) float64."""
    values = np.asarray(values, np.float64)
    return values.reshape(len(values), -1)


def _centred(values: np.ndarray) -> np.ndarray:
    values = _flat(values)
    return values - values.mean(1, keepdims=True)


def _counted(samples: np.ndarray, counting: np.random.Generator | None) -> np.ndarray:
    samples = np.asarray(samples, np.float64)
    return samples if counting is None else counting.poisson(np.maximum(samples, 0)).astype(np.float64)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
