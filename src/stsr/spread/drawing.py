"""Samples of expression around a map: its expected counts times correlated log-normal fields."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import correlate1d

from stsr.diffusion.noise import Noise
from stsr.spread.dispersion import Dispersion

_REACH = 3.0  # of a smoothing kernel, in standard deviations


def drawn_rates(
    mean: np.ndarray,
    sd: np.ndarray,
    genes: Sequence[str],
    dispersion: Dispersion,
    *,
    bin_um: float,
    corner: tuple[int, int],
    noise: Noise,
) -> np.ndarray:
    """Draw the expected counts per bin (g, y, x) once.

    A window of a map gives the same values as the whole map: noise belongs to positions.

    Parameters
    ----------
    mean, sd
        (g, y, x) the map and its spread, as `Dispersion.sd` gives it.
    genes
        Names (g,), which key the noise.
    dispersion
        Of which ``sd`` was made.
    bin_um
        Side of the bins, um.
    corner
        First row and column of the window.
    noise
        Seed and number of the sample.
    """
    shared, own = dispersion.of_sums(bin_um)
    lengths = dispersion.lengths_in_bins(bin_um)
    common, single = dispersion.totals(genes, bin_um)
    u = _field("all genes", mean.shape[1:], lengths, shared, corner, noise)
    rates = np.empty(mean.shape, np.float32)
    for number, gene in enumerate(genes):
        relative = (sd[number] / np.maximum(mean[number], 1e-30)).astype(np.float64) ** 2
        rise = _rise(relative, common, float(single[number]))
        v = _field(f"gene {gene}", mean.shape[1:], lengths, own, corner, noise)
        rates[number] = mean[number] * _log_normal(u, common * rise) * _log_normal(v, single[number] * rise)
    return rates


def _rise(relative: np.ndarray, shared: float, own: float) -> np.ndarray:
    """Solve ``(1 + shared rise) (1 + own rise) = 1 + relative`` for the rise of variances at low levels."""
    both, product = shared + own, shared * own
    if product < 1e-12:
        return relative / max(both, 1e-30)
    return (np.sqrt(both**2 + 4 * product * relative) - both) / (2 * product)


def _log_normal(field: np.ndarray, variance: np.ndarray | float) -> np.ndarray:
    """Log-normal variables of mean 1 and given variance, from standard normal ones."""
    log_variance = np.log1p(variance)
    return np.exp(np.sqrt(log_variance) * field - log_variance / 2)


def _field(
    key: str,
    shape: tuple[int, ...],
    lengths: np.ndarray,
    variances: np.ndarray,
    corner: tuple[int, int],
    noise: Noise,
) -> np.ndarray:
    """Standard normal field (y, x): the sum of fields of these lengths (bins), in proportion to their variances."""
    total = np.zeros(shape)
    if not variances.sum() > 0:
        return total
    for number, (length, part) in enumerate(zip(lengths, variances / variances.sum(), strict=True)):
        if part > 0:
            kernel = _kernel(length)
            margin = len(kernel) // 2
            white = noise.window(
                [f"{key}, field {number}"],
                corner[0] - margin,
                corner[1] - margin,
                shape[0] + 2 * margin,
                shape[1] + 2 * margin,
            )[0].numpy()
            smooth = correlate1d(correlate1d(white, kernel, 0), kernel, 1)
            total += np.sqrt(part) * smooth[margin : margin + shape[0], margin : margin + shape[1]]
    return total


def _kernel(length: float) -> np.ndarray:
    """Gaussian kernel that turns white noise into a field of unit variance with this length (bins)."""
    if length == 0:
        return np.ones(1)
    reach = int(np.ceil(_REACH * length))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * length**2))
    return kernel / np.sqrt((kernel**2).sum())
