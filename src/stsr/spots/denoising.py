"""Denoising of spot counts: expected counts of each gene, from the spot's own counts of all genes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from stsr.errors import StsrError
from stsr.spots.factors import scaled, spot_factors
from stsr.spots.regression import Design, fit
from stsr.spots.splitting import split

COMPONENTS = (0, 2, 5, 10, 20, 30, 50)
"""Candidate numbers of components, chosen by count splitting; 0 leaves only the totals of spots and genes."""

SIZES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 1e5)
"""Candidate sizes of the negative binomial: variance = mean + mean^2 / size. The last one is Poisson."""

_PATIENCE = 2  # numbers of components tried after the best one
_SPLIT_GENES = (
    100,
    1000,
)  # fewest and most genes, the most counted, on which the number of components is chosen
_SPLIT_VALUES = 2_500_000  # genes x spots there; more spots need fewer genes
_BLOCK = 2**22  # values of genes x spots held at once, for bounded memory


@dataclass(frozen=True)
class Denoised:
    """Expected counts of spots, as the fitted model; `expected` computes them for the genes that are needed.

    Parameters
    ----------
    counts
        (n, g) counts of the fitted genes.
    genes
        (g,) columns of the original table.
    exposure
        (n,) total of each spot over all genes, divided by the mean total.
    factors
        (n, k) components of the spots, with a mean squared row norm of 1.
    coefficients
        (g, 1 + k) of the log rates: intercept and factors. The intercept of a gene without counts is -inf.
    sigma
        (g,) prior standard deviation of a gene's log rate over the spots; 0 for a constant share of the total.
    size
        (g,) size of the negative binomial about the rates; the smaller, the more the spot's own count weighs.
    """

    counts: sp.csc_matrix
    genes: np.ndarray
    exposure: np.ndarray
    factors: np.ndarray
    coefficients: np.ndarray
    sigma: np.ndarray
    size: np.ndarray

    @property
    def components(self) -> int:
        """Number of components of the spots."""
        return self.factors.shape[1]

    def rates(self, which: np.ndarray | None = None) -> np.ndarray:
        """Rates lambda (n, w) float32 that the components predict, before the spot's own count is added.

        Parameters
        ----------
        which
            Positions (w,) among the fitted genes; all by default.
        """
        chosen = np.arange(len(self.genes)) if which is None else np.asarray(which)
        design = Design(self.exposure, self.factors)
        made = np.empty((len(self.exposure), len(chosen)), np.float32)
        for block in _blocks(len(chosen), len(made)):
            made[:, block] = design.rates(self.coefficients[chosen[block]]).T
        return made

    def expected(self, which: np.ndarray | None = None) -> np.ndarray:
        """Expected counts (n, w) float32: ``rate (y + size) / (rate + size)``, the mean of a gamma posterior.

        Parameters
        ----------
        which
            Positions (w,) among the fitted genes; all by default.
        """
        made = self.rates(which)
        chosen = np.arange(len(self.genes)) if which is None else np.asarray(which)
        for block in _blocks(len(chosen), len(made)):
            size, own = self.size[chosen[block]], self.counts[:, chosen[block]].toarray()
            made[:, block] *= (own + size) / (made[:, block] + size)
        return made


def denoise(
    counts: sp.csr_matrix, *, genes: np.ndarray | None = None, components: int | None = None, seed: int = 0
) -> Denoised:
    """Estimate the expected counts of each gene in each spot.

    Rates are a Poisson regression on the first principal components of the spots, with a prior scale per gene. The
    spot's own count is then added with the weight that the gene's overdispersion gives it.

    Parameters
    ----------
    counts
        (n, genes) raw counts of all measured genes, spots by genes; fractions from split areas are allowed.
    genes
        Columns (g,) to fit; all by default. Totals and components always come from all columns.
    components
        Number of components; by default the one of `COMPONENTS` that predicts one random half of the counts best from
        the other half. Fewer are used where counts have fewer dimensions.
    seed
        Of the random halves.

    Raises
    ------
    StsrError
        If counts are negative or not finite, or fewer than two genes have any: totals and components need the others.
    """
    counts = _checked(counts)
    rng = np.random.default_rng(seed)
    if components is None:
        components = _best_components(counts, rng)
    factors = scaled(spot_factors(counts, components, seed))
    return _fitted(counts, factors, np.arange(counts.shape[1]) if genes is None else np.asarray(genes))


def _checked(counts: sp.csr_matrix) -> sp.csr_matrix:
    counts = sp.csr_matrix(counts, dtype=np.float64, copy=True)  # else sorting indices would change the input
    counts.sum_duplicates()
    if not np.isfinite(counts.data).all() or (counts.data < 0).any():
        raise StsrError("spot counts are negative or not finite; denoising needs raw counts, not log values")
    counted = int((np.asarray(counts.sum(0)).ravel() > 0).sum())
    if counted < 2:
        raise StsrError(
            f"denoising compares genes, but {counted} of {counts.shape[1]} have counts in the spots; "
            "pass all measured genes"
        )
    return counts


def _fitted(counts: sp.csr_matrix, factors: np.ndarray, genes: np.ndarray) -> Denoised:
    """Fit rates and overdispersion of some genes to given factors."""
    total = np.asarray(counts.sum(1)).ravel()
    exposure = total / total.mean()
    design = Design(exposure, factors)
    chosen = counts.tocsc()[:, genes]
    sums = chosen.T @ design.columns  # (g, 1 + k)
    counted = np.flatnonzero(sums[:, 0] > 0)
    coefficients = np.zeros_like(sums)
    coefficients[:, 0] = -np.inf
    sigma, size = np.zeros(len(genes)), np.full(len(genes), SIZES[-1])
    for block in _blocks(len(counted), len(total)):
        here = counted[block]
        found = fit(sums[here], design)
        coefficients[here], sigma[here] = found.coefficients, found.sigma
        size[here] = negative_binomial_size(chosen[:, here].T, design.rates(found.coefficients))
    return Denoised(chosen, genes, exposure, factors, coefficients, sigma, size)


def negative_binomial_size(counts: sp.csr_matrix, rates: np.ndarray) -> np.ndarray:
    """Size (g,) of the negative binomial that makes the counts (g, n) likeliest, given rates (g, n).

    Source: the gamma-Poisson likelihood; spots whose rate is 0 have no counts and no weight.
    """
    gene = np.repeat(np.arange(len(rates)), np.diff(counts.indptr))
    best, highest = np.zeros(len(rates)), np.full(len(rates), -np.inf)
    for size in SIZES:
        weight = np.log1p(rates / size)  # log((rate + size) / size)
        stored = gammaln(counts.data + size) - gammaln(size) - counts.data * np.log(size)
        stored -= counts.data * weight[gene, counts.indices]
        likelihood = np.bincount(gene, stored, len(rates)) - size * weight.sum(1)
        better = likelihood > highest
        best[better], highest[better] = size, likelihood[better]
    return best


def _best_components(counts: sp.csr_matrix, rng: np.random.Generator) -> int:
    """Number of components whose fit to one half of the counts predicts the other half best (Poisson deviance)."""
    fitted_half, other_half = split(counts, rng)
    total = np.asarray(counts.sum(0)).ravel()
    most = int(np.clip(_SPLIT_VALUES // counts.shape[0], *_SPLIT_GENES))
    genes = np.sort(np.argsort(-total, kind="stable")[:most])
    factors = spot_factors(fitted_half, COMPONENTS[-1])
    if not factors.shape[1]:  # too few spots or counts to choose from
        return 0
    tried: list[float] = []
    for components in COMPONENTS:
        if components and COMPONENTS[len(tried) - 1] >= factors.shape[1]:
            break  # nothing more to use
        made = _fitted(fitted_half, scaled(factors[:, :components]), genes)
        tried.append(_deviance(made, other_half[:, genes]))
        if len(tried) > np.argmin(tried) + _PATIENCE:
            break
    return COMPONENTS[int(np.argmin(tried))]


def _deviance(made: Denoised, counts: sp.csr_matrix) -> float:
    """Half the Poisson deviance of the rates, up to a constant, over spots and genes that the fit has seen."""
    seen, counted = made.exposure > 0, np.isfinite(made.coefficients[:, 0])
    total = 0.0
    for block in _blocks(int(counted.sum()), len(made.exposure)):
        which = np.flatnonzero(counted)[block]
        rates = made.rates(which)[seen].astype(float)
        own = counts.tocsc()[:, which][seen].tocoo()
        total += rates.sum() - (own.data * np.log(rates[own.row, own.col])).sum()
    return total


def _blocks(genes: int, spots: int) -> Iterator[slice]:
    """Slices of genes whose values at all spots fit into bounded memory."""
    step = max(1, _BLOCK // max(spots, 1))
    for first in range(0, genes, step):
        yield slice(first, first + step)
