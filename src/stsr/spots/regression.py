"""Poisson regression of many genes on the same spot factors, with the Laplace evidence of each prior scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SCALES = (0.0, 0.3, 0.6, 1.0, 1.5, 2.5)
"""Candidate standard deviations of a gene's log rate over the spots; 0 is a constant share of the spot's total."""

_STEPS = 12  # Newton steps at most; two to five from the mode of the next smaller scale
_LOG_STEP = 1.5  # largest change of a log rate per step: a full step from a low rate overshoots
_CONVERGED = 1e-4  # change of every log rate; the error after such a step is its square
_PRODUCTS = 2**22  # products of factors held at once, for bounded memory


@dataclass(frozen=True)
class Regression:
    """Log rates of genes as linear functions of spot factors.

    ``rate = exposure * exp(coefficients[0] + factors @ coefficients[1:])``

    Parameters
    ----------
    coefficients
        (g, 1 + k): intercept, and one coefficient for each factor.
    sigma
        (g,) prior standard deviation of the coefficients of factors.
    evidence
        (g,) log of the marginal likelihood, without terms that do not depend on sigma.
    """

    coefficients: np.ndarray
    sigma: np.ndarray
    evidence: np.ndarray


@dataclass(frozen=True)
class Design:
    """What all genes share: the exposure of each spot, and its factors.

    Parameters
    ----------
    exposure
        (n,) not negative; rates are proportional to it.
    factors
        (n, k).
    """

    exposure: np.ndarray
    factors: np.ndarray

    @cached_property
    def columns(self) -> np.ndarray:
        """Intercept and factors (n, 1 + k)."""
        return np.column_stack([np.ones(len(self.factors)), self.factors])

    def rates(self, coefficients: np.ndarray) -> np.ndarray:
        """Expected counts (g, n)."""
        return self.exposure * np.exp(coefficients @ self.columns.T)

    def curvature(self, rates: np.ndarray) -> np.ndarray:
        """Negative second derivative of the log likelihood, X' diag(rates) X, for rates (g, n): (g, 1 + k, 1 + k).

        One matrix product of the rates with the products of columns, which all genes share.
        """
        columns = self.columns.astype(np.float32)
        size = columns.shape[1]
        left, right = np.triu_indices(size)
        packed = np.zeros((len(rates), len(left)))
        step = max(1, _PRODUCTS // len(left))
        for first in range(0, len(columns), step):
            part = columns[first : first + step]
            packed += rates[:, first : first + step].astype(np.float32) @ (part[:, left] * part[:, right])
        full = np.empty((len(rates), size, size))
        full[:, left, right] = full[:, right, left] = packed
        return full


def fit(sums: np.ndarray, design: Design, scales: tuple[float, ...] = SCALES) -> Regression:
    """Fit each gene with the prior scale of the largest Laplace evidence.

    Parameters
    ----------
    sums
        (g, 1 + k) counts times the columns of the design, summed over spots: all that Poisson regression needs of the
        counts. ``sums[:, 0]``, the counts of a gene, must be positive.
    design
        Exposures and factors.
    scales
        Candidates, ascending; without factors all are alike.
    """
    flat = np.zeros_like(sums)
    flat[:, 0] = np.log(sums[:, 0] / design.exposure.sum())
    best = flat.copy()
    sigma = np.zeros(len(sums))
    highest = sums[:, 0] * flat[:, 0] - sums[:, 0] if 0 in scales else np.full(len(sums), -np.inf)
    mode = flat
    for scale in scales if sums.shape[1] > 1 else ():
        if scale == 0:
            continue
        mode = _mode(sums, design, scale, mode)
        evidence = _evidence(sums, design, scale, mode)
        better = evidence > highest
        best[better], sigma[better], highest[better] = mode[better], scale, evidence[better]
    return Regression(best, sigma, highest)


def _precision(sigma: float, size: int) -> np.ndarray:
    """Of the prior, (1 + k,): none for the intercept."""
    return np.concatenate([[0.0], np.full(size - 1, sigma**-2)])


def gradient(
    sums: np.ndarray, design: Design, sigma: float, coefficients: np.ndarray, rates: np.ndarray
) -> np.ndarray:
    """Derivative (g, 1 + k) of log likelihood plus log prior by the coefficients."""
    return sums - rates @ design.columns - _precision(sigma, sums.shape[1]) * coefficients


def _mode(sums: np.ndarray, design: Design, sigma: float, start: np.ndarray) -> np.ndarray:
    """Most probable coefficients (g, 1 + k), by Newton's method."""
    found, prior = start.copy(), np.diag(_precision(sigma, sums.shape[1]))
    active, columns = np.arange(len(sums)), design.columns
    for _ in range(_STEPS):
        here = found[active]
        rates = design.rates(here)
        slope = gradient(sums[active], design, sigma, here, rates)
        step = np.linalg.solve(design.curvature(rates) + prior, slope[..., None])[..., 0]
        change = np.abs(step @ columns.T).max(1)  # of the log rates
        found[active] = here + step * np.minimum(1, _LOG_STEP / np.maximum(change, 1e-12))[:, None]
        active = active[change > _CONVERGED]
        if not len(active):
            break
    return found


def _evidence(sums: np.ndarray, design: Design, sigma: float, mode: np.ndarray) -> np.ndarray:
    """Laplace approximation (g,) of the log marginal likelihood, intercept and coefficients integrated out."""
    rates, precision = design.rates(mode), _precision(sigma, sums.shape[1])
    likelihood = (sums * mode).sum(1) - rates.sum(1)
    curvature = design.curvature(rates)
    volume = np.linalg.slogdet(curvature + np.diag(precision))[1] - np.log(curvature[:, 0, 0])
    volume += 2 * np.log(sigma) * (sums.shape[1] - 1)  # of the coefficients in units of sigma
    return likelihood - (precision * mode**2).sum(1) / 2 - volume / 2
