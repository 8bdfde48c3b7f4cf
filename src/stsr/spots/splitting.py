"""Count splitting: two parts of the same counts, with independent noise."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

_RNG_OF_ORDER = 20231  # weights of spots that put genes into an order of their own


def split(
    counts: sp.csr_matrix, rng: np.random.Generator, *, fraction: float = 0.5, size: np.ndarray | None = None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Split counts (n, genes) at random into two parts that are independent, given the expected counts.

    Binomial thinning makes parts of Poisson counts independent. Parts of overdispersed counts share what made the
    whole count large. Those of negative binomial counts are independent if the probability of a count to fall into the
    first part is itself drawn, from ``Beta(fraction size, (1 - fraction) size)``; they are negative binomial with these
    sizes (Neufeld, Popp, Gao, Battle and Witten 2023, arXiv:2307.12985; a beta-binomial is their Dirichlet-multinomial
    of two parts).

    Parameters
    ----------
    counts
        Not negative. Fractions are rounded up with the probability of their size.
    rng
        Source of the split, which does not depend on the order of genes.
    fraction
        Expected share of the first part, between 0 and 1.
    size
        Size (genes,) of each gene's negative binomial, of variance ``mean + mean^2 / size``, such as
        `stsr.spots.denoising.Denoised.size`; Poisson counts by default.

    Returns
    -------
    first, second
        (n, genes), which add up to the counts.

    Raises
    ------
    ValueError
        If the fraction is not between 0 and 1, or a size is not positive.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"counts are split by a fraction between 0 and 1, not {fraction}")
    if size is not None and not (np.asarray(size) > 0).all():
        raise ValueError("the size of a negative binomial must be positive")
    columns = counts.tocsc()
    weights = np.random.default_rng(_RNG_OF_ORDER).random(counts.shape[0])
    order = np.lexsort((columns.T @ weights, np.asarray(columns.sum(0)).ravel()))
    columns = columns[:, order]
    whole = np.floor(columns.data + rng.random(columns.nnz)).astype(np.int64)
    share: float | np.ndarray = fraction
    if size is not None:
        own = np.repeat(np.asarray(size, float)[order], np.diff(columns.indptr))
        share = rng.beta(fraction * own, (1 - fraction) * own)
    back = np.argsort(order)
    parts = []
    for data in (first := rng.binomial(whole, share), whole - first):
        part = sp.csc_matrix((data.astype(float), columns.indices, columns.indptr), shape=columns.shape)
        part = part[:, back].tocsr()
        part.eliminate_zeros()
        parts.append(part)
    return parts[0], parts[1]
