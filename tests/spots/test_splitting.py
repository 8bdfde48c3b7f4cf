import numpy as np
import pytest
import scipy.sparse as sp

from stsr.spots.denoising import negative_binomial_size
from stsr.spots.splitting import split


def _counts(size, mean=4.0, spots=4000, genes=20, seed=0):
    """Negative binomial counts (n, g), or Poisson for an infinite size."""
    rng = np.random.default_rng(seed)
    rates = np.full((spots, genes), mean)
    if np.isfinite(size):
        rates = rng.gamma(size, mean / size, rates.shape)
    return sp.csr_matrix(rng.poisson(rates).astype(float))


def _correlation(parts):
    return np.corrcoef(*(part.toarray().ravel() for part in parts))[0, 1]


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_parts_of_poisson_counts_are_independent_and_add_up(fraction):
    counts = _counts(np.inf)
    parts = split(counts, np.random.default_rng(0), fraction=fraction)
    np.testing.assert_array_equal(sum(parts).toarray(), counts.toarray())
    assert abs(_correlation(parts)) < 0.015
    assert parts[0].sum() / counts.sum() == pytest.approx(fraction, abs=0.01)


@pytest.mark.parametrize("fraction", [0.5, 0.8])
@pytest.mark.parametrize("size", [0.5, 4.0])
def test_parts_of_overdispersed_counts_are_independent_with_their_size_only(size, fraction):
    counts = _counts(size)
    thinned = split(counts, np.random.default_rng(0), fraction=fraction)
    mean, share = 4.0, np.array([fraction, 1 - fraction]) * 4.0
    shared = np.prod(share) / size / np.sqrt(np.prod(share + share**2 / size))  # of gamma rates in common
    assert _correlation(thinned) == pytest.approx(shared, abs=0.02) and shared > 0.2
    parts = split(counts, np.random.default_rng(0), fraction=fraction, size=np.full(20, size))
    np.testing.assert_array_equal(sum(parts).toarray(), counts.toarray())
    assert abs(_correlation(parts)) < 0.015
    for part, own in zip(parts, (fraction, 1 - fraction), strict=True):  # each is negative binomial
        values = part.toarray()
        assert values.mean() == pytest.approx(own * mean, rel=0.05)
        assert values.var() == pytest.approx(own * mean + own * mean**2 / size, rel=0.1)
    if (size, fraction) == (4.0, 0.5):
        found = negative_binomial_size(parts[0].T.tocsr(), np.full((20, 4000), 2.0))
        assert np.median(found) == 2.0


def test_each_gene_has_its_own_size_whatever_their_order():
    counts = sp.hstack([_counts(0.5, genes=3), _counts(np.inf, genes=3, seed=1)]).tocsr()
    size = np.repeat([0.5, 1e5], 3)
    parts = split(counts, np.random.default_rng(0), size=size)
    assert (
        max(abs(_correlation([part[:, genes] for part in parts])) for genes in np.eye(6, dtype=bool)) < 0.06
    )
    order = np.array([4, 0, 3, 5, 2, 1])
    again = split(counts[:, order].tocsr(), np.random.default_rng(0), size=size[order])
    np.testing.assert_array_equal(again[0].toarray(), parts[0][:, order].toarray())


def test_fractions_are_rounded_at_random():
    fractions = sp.csr_matrix(np.full((200, 50), 0.3))
    one, other = split(fractions, np.random.default_rng(0))
    assert one.sum() + other.sum() == pytest.approx(fractions.sum(), rel=0.05)
    assert set(one.data) == {1.0}


@pytest.mark.parametrize(("fraction", "size"), [(0.0, None), (1.0, None), (0.5, np.zeros(20))])
def test_what_cannot_be_split_is_refused(fraction, size):
    with pytest.raises(ValueError, match=r"between 0 and 1|must be positive"):
        split(_counts(1.0, spots=3), np.random.default_rng(0), fraction=fraction, size=size)
