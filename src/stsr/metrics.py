"""How well a super-resolved map matches measured counts per bin, for each gene.

Maps are (g, y, x) counts per bin. Every score is computed per gene over the whole section, never per tile, and nothing
is rescaled by the minimum and maximum of the data being scored. Undefined scores (for example of a gene without any
counts) are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import xlogy

from stsr.geometry.grid import add_up

_MIN_MEAN = 1e-6  # counts per bin: predicting exactly zero where something was counted has infinite deviance
_SSIM_SIGMA_BINS = 1.5  # Gaussian window of Wang et al. 2004


def pearson(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson correlation (g,) of each gene, from values (g, n) or (g, y, x)."""
    a, b = _centred(prediction), _centred(truth)
    return _ratio((a * b).sum(1), np.sqrt((a * a).sum(1) * (b * b).sum(1)))


def spearman(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Spearman rank correlation (g,) of each gene; ties share their mean rank."""
    return pearson(*(stats.rankdata(_flat(values), axis=1) for values in (prediction, truth)))


def rmse(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean squared error (g,), counts per bin."""
    return np.sqrt(np.square(_flat(prediction) - _flat(truth)).mean(1))


def deviance_explained(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Fraction (g,) of the Poisson deviance that the prediction explains.

    A perfect prediction scores 1, the gene's mean in every bin scores 0. Unlike correlation, it penalises a wrong
    expression level as well as wrong places.
    """
    mean, counts = np.maximum(_flat(prediction), _MIN_MEAN), _flat(truth)
    plain = np.maximum(counts.mean(1, keepdims=True), _MIN_MEAN)
    left, whole = (2 * (xlogy(counts, counts / mu) - (counts - mu)).sum(1) for mu in (mean, plain))
    return 1 - _ratio(left, whole)


def ssim(
    prediction: np.ndarray,
    truth: np.ndarray,
    value_range: np.ndarray | float | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Structural similarity (g,) with a fixed data range (Wang et al. 2004; Gaussian window, sigma 1.5 bins).

    Parameters
    ----------
    prediction, truth
        (g, y, x) counts per bin.
    value_range
        Data range, per gene (g,) or one for all. By default the gene's largest true count in the section, so that the
        range is the same for every method.
    mask
        Bins to average over, (y, x) bool; all by default.
    """
    from skimage.metrics import structural_similarity

    top = np.asarray(truth, float).max((1, 2)) if value_range is None else value_range
    top = np.broadcast_to(np.asarray(top, float), (len(truth),))
    scores = np.full(len(truth), np.nan)
    for gene in np.flatnonzero(top > 0):
        _, similarity = structural_similarity(
            np.asarray(prediction[gene], float),
            np.asarray(truth[gene], float),
            win_size=1,  # the window comes from sigma; this only keeps the edges, and small maps, in the result
            data_range=top[gene],
            gaussian_weights=True,
            sigma=_SSIM_SIGMA_BINS,
            use_sample_covariance=False,
            full=True,
        )
        scores[gene] = similarity.mean() if mask is None else similarity[mask].mean()
    return scores


def noise_ceiling(truth: np.ndarray, rng: np.random.Generator | int = 0) -> np.ndarray:
    """Highest correlation (g,) that a perfect prediction can reach with noisy counts.

    Counts are split at random into two halves with independent noise (binomial thinning). Their correlation r gives
    the reliability of the full counts, ``2 r / (1 + r)`` (Spearman-Brown). The square root of the reliability is the
    correlation between counts and their true expectation.

    Parameters
    ----------
    truth
        (g, y, x) or (g, n) raw counts per bin.
    rng
        Random generator or seed for the split.
    """
    counts = np.rint(_flat(truth)).astype(np.int64)
    half = np.random.default_rng(rng).binomial(counts, 0.5)
    r = np.clip(pearson(half, counts - half), 0, 1)
    return np.sqrt(2 * r / (1 + r))


def table(
    prediction: np.ndarray,
    truth: np.ndarray,
    genes: Sequence[str],
    factors: Sequence[int] = (1, 2, 4),
    bin_um: float = 10.0,
    mask: np.ndarray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute all scores of a map, per gene and bin size.

    Parameters
    ----------
    prediction, truth
        (g, y, x) counts per bin.
    genes
        Names (g,).
    factors
        Coarser bin sizes to score: bins are summed in blocks of this many per side.
    bin_um
        Bin size of the maps, um.
    mask
        Bins to score, such as tissue, (y, x) bool. A coarser bin is scored if all of it lies in the mask.
    seed
        Seed of the random split behind the noise ceiling.

    Returns
    -------
    scores
        Columns gene, bin_um, mean_count (truth, per bin), pcc, spearman, rmse, deviance_explained, ssim, noise_ceiling.

    Raises
    ------
    ValueError
        If the shapes of maps and genes do not match.
    """
    if prediction.shape != truth.shape or len(genes) != len(truth):
        raise ValueError(
            f"maps of shape {prediction.shape} and {truth.shape} do not match {len(genes)} genes"
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
    """Crop a map to whole coarse bins."""
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


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
