"""Spot factors: principal components of the Pearson residuals of sparse counts."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, eigsh

MIN_COUNTS = 20
"""Fewest counts of a gene that takes part: rarer genes add noise to the components."""

_NEGLIGIBLE = 1e-9  # of the largest eigenvalue; components below are rounding errors


def spot_factors(counts: sp.csr_matrix, most: int, seed: int = 0) -> np.ndarray:
    """Find the principal components (n, k) of what distinguishes spots of equal totals.

    Pearson residuals under a constant share of each gene, ``(y - T p) / sqrt(T p)``, clipped at ``sqrt(n)`` (Lause,
    Berens and Kobak 2021, Genome Biology 22:258). They are never held as a dense matrix: zero counts have the residual
    ``-sqrt(T p)``, of rank one, and only other entries are stored.

    Parameters
    ----------
    counts
        (n, genes), spots by genes; genes with fewer than 20 counts are left out.
    most
        Number of components; fewer are found where counts have fewer dimensions.
    seed
        Of the solver's start.

    Returns
    -------
    factors
        Largest component first. Not scaled: the squared length of a component is its eigenvalue.
    """
    n, gene = counts.shape[0], np.asarray(counts.sum(0)).ravel()
    common = np.flatnonzero(gene >= MIN_COUNTS)
    most = min(most, n - 1, len(common) - 1)
    if most < 1:
        return np.zeros((n, 0))
    spot, share = np.asarray(counts.sum(1)).ravel(), gene[common] / gene.sum()
    operator = _gram(*residuals(counts[:, common], spot, share))
    start = np.random.default_rng(seed).standard_normal(n)
    if np.linalg.norm(operator @ start) < _NEGLIGIBLE * np.linalg.norm(start):  # all spots alike
        return np.zeros((n, 0))
    if n <= 3 * most:  # too few spots for the iterative solver
        values, vectors = np.linalg.eigh(operator @ np.eye(n))
    else:
        values, vectors = eigsh(operator, k=most, v0=start)
    largest = np.argsort(values)[::-1][:most]
    values, vectors = values[largest], vectors[:, largest]
    real = values > max(_NEGLIGIBLE * values[0], _NEGLIGIBLE)
    return vectors[:, real] * np.sqrt(values[real])


def scaled(factors: np.ndarray) -> np.ndarray:
    """Scale factors (n, k) to a mean squared row norm of 1, so that a prior scale means the same for every k."""
    return factors / np.sqrt((factors**2).sum() / len(factors)) if factors.size else factors


def residuals(
    counts: sp.csr_matrix, total: np.ndarray, share: np.ndarray
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Clipped Pearson residuals (n, genes) as ``stored - outer(left, right)``.

    Parameters
    ----------
    counts
        (n, genes).
    total, share
        (n,) and (genes,): the counts expected are their product.
    """
    n = counts.shape[0]
    left, right = np.sqrt(total), np.sqrt(share)
    found = counts.tocoo()
    root = left[found.row] * right[found.col]  # square root of the expected count
    value = np.clip((found.data - root**2) / root, -np.sqrt(n), np.sqrt(n)) + root
    # A zero where more than n counts were expected is clipped, too. Such places are few: at most the mean spot total.
    heavy = np.flatnonzero(left.max() * right > np.sqrt(n))
    row, column = np.nonzero(np.outer(left, right[heavy]) > np.sqrt(n))
    column = heavy[column]
    zero = np.asarray(counts[row, column]).ravel() == 0 if len(row) else np.zeros(0, bool)
    row, column = row[zero], column[zero]
    value = np.concatenate([value, left[row] * right[column] - np.sqrt(n)])
    row, column = np.concatenate([found.row, row]), np.concatenate([found.col, column])
    return sp.csr_matrix((value, (row, column)), shape=counts.shape), left, right


def _gram(stored: sp.csr_matrix, left: np.ndarray, right: np.ndarray) -> LinearOperator:
    """R R' (n, n) of the residuals R with the mean of each gene taken off."""
    n = stored.shape[0]

    def centred(values: np.ndarray) -> np.ndarray:
        return values - values.mean(0)

    def times(values: np.ndarray) -> np.ndarray:
        values = centred(values.reshape(n, -1))
        genes = stored.T @ values - np.outer(right, left @ values)
        return centred(stored @ genes - np.outer(left, right @ genes))

    return LinearOperator((n, n), matvec=times, matmat=times, dtype=np.float64)
