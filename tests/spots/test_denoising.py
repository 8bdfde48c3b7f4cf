import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import xlogy

from stsr.errors import StsrError
from stsr.spots import denoising
from stsr.spots.denoising import denoise, negative_binomial_size
from stsr.spots.factors import residuals, scaled, spot_factors
from stsr.spots.splitting import split


def _tissue(spots=300, genes=60, rank=3, level=1.5, spread=1.0, seed=0):
    """Expected counts (n, g) of low rank on the log scale, and Poisson counts."""
    rng = np.random.default_rng(seed)
    depth = rng.lognormal(0, 0.3, (spots, 1))
    log_rate = rng.standard_normal((spots, rank)) @ rng.standard_normal((rank, genes)) / np.sqrt(rank)
    expected = level * depth * np.exp(spread * log_rate + rng.normal(0, 0.7, genes))
    return expected, sp.csr_matrix(rng.poisson(expected).astype(float))


def _flat(counts):
    """Constant share of each gene."""
    return np.asarray(counts.sum(1)) * np.asarray(counts.sum(0)) / counts.sum()


def _deviance(predicted, expected):
    predicted = np.maximum(np.asarray(predicted, float), 0.05)
    return 2 * (xlogy(expected, expected / predicted) - expected + predicted).sum()


def test_denoised_counts_are_nearer_the_truth():
    expected, counts = _tissue()
    made = denoise(counts)
    error = _deviance(made.expected(), expected)
    assert error < 0.2 * _deviance(_flat(counts), expected)
    assert error < 0.2 * _deviance(counts.toarray(), expected)
    assert made.expected().dtype == np.float32
    assert (made.factors**2).sum(1).mean() == pytest.approx(1)


def test_poisson_noise_alone_becomes_flat():
    _, counts = _tissue(genes=100, spread=0)
    made = denoise(counts)
    assert made.components <= 2
    assert (made.sigma == 0).mean() > 0.9
    assert np.median(made.size) >= 64
    np.testing.assert_allclose(np.median(made.expected() / _flat(counts)), 1, atol=0.02)
    noise = np.corrcoef(made.expected().ravel(), (counts - _flat(counts)).A1)[0, 1]
    assert noise < 0.2


def test_totals_of_genes_are_kept():
    _, counts = _tissue(level=4)
    made, totals = denoise(counts), np.asarray(counts.sum(0)).ravel()
    np.testing.assert_allclose(made.rates().sum(0), totals, rtol=1e-4)
    np.testing.assert_allclose(made.expected().sum(0), totals, rtol=0.05)


def test_the_order_of_genes_does_not_matter():
    _, counts = _tissue()
    order = np.random.default_rng(5).permutation(counts.shape[1])
    one, other = denoise(counts), denoise(counts[:, order].tocsr())
    assert one.components == other.components
    np.testing.assert_allclose(other.expected(), one.expected()[:, order], rtol=1e-4)


@pytest.mark.parametrize(("rank", "allowed"), [(2, {2, 5}), (15, {10, 20})])
def test_components_follow_the_rank(rank, allowed):
    _, counts = _tissue(spots=400, genes=150, rank=rank, level=6, spread=0.4)
    assert denoise(counts, genes=np.arange(3)).components in allowed


def test_some_genes_are_fitted_as_among_all(monkeypatch):
    _, counts = _tissue()
    whole = denoise(counts, components=5)
    some = denoise(counts, genes=np.array([40, 3]), components=5)
    np.testing.assert_allclose(some.expected(), whole.expected(np.array([40, 3])), rtol=1e-5)
    np.testing.assert_array_equal(some.sigma, whole.sigma[[40, 3]])
    monkeypatch.setattr(denoising, "_BLOCK", 7 * counts.shape[0])
    blocks = denoise(counts, components=5)
    np.testing.assert_allclose(blocks.expected(), whole.expected(), rtol=1e-5)


def test_a_spots_own_count_weighs_by_the_overdispersion():
    """A gene that varies by itself keeps its counts, one that follows the others takes their rate."""
    expected, counts = _tissue(level=4, spread=0.4)
    alone = np.random.default_rng(1).gamma(0.5, 20, (len(expected), 1))
    counts = sp.hstack([counts, np.random.default_rng(2).poisson(alone)]).tocsr()
    made = denoise(counts, components=5)
    assert made.size[-1] <= 2 < 32 <= np.median(made.size[:-1])
    last = np.array([counts.shape[1] - 1])
    assert _deviance(made.expected(last), alone) < 0.5 * _deviance(made.rates(last), alone)
    rate, own = made.rates(last), counts[:, -1].toarray()
    hand = rate * (own + made.size[-1]) / (rate + made.size[-1])
    np.testing.assert_allclose(made.expected(last), hand, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 8.0, 1e5])
def test_the_size_of_a_negative_binomial_is_found(size):
    rng = np.random.default_rng(0)
    rates = np.full((4, 3000), 6.0)
    counts = rng.poisson(rates * rng.gamma(size, 1 / size, rates.shape))
    found = negative_binomial_size(sp.csr_matrix(counts.astype(float)), rates)
    assert set(found) <= ({size} if size < 100 else {128.0, 1e5})


@pytest.mark.parametrize("level", [1.0, 800.0])
def test_residuals_of_sparse_counts_are_those_of_the_formula(level):
    rng = np.random.default_rng(0)
    dense = rng.poisson(level, (12, 9)) * (rng.random((12, 9)) < 0.7)
    total, share = dense.sum(1), dense.sum(0) / dense.sum()
    mean = np.outer(total, share)
    expected = np.clip((dense - mean) / np.sqrt(mean), -np.sqrt(12), np.sqrt(12))
    assert level == 1 or (np.abs(expected) == np.sqrt(12)).any()  # zeros are clipped, too
    stored, left, right = residuals(sp.csr_matrix(dense.astype(float)), total, share)
    np.testing.assert_allclose(stored.toarray() - np.outer(left, right), expected, atol=1e-9)


@pytest.mark.parametrize("most", [4, 40])
def test_factors_are_principal_components_of_the_residuals(most):
    _, counts = _tissue(spots=100, genes=45)
    rare = sp.csr_matrix(([19.0], ([0], [0])), shape=(100, 1))
    total, share = np.asarray(counts.sum(1)).ravel() + rare.toarray()[:, 0], np.asarray(counts.sum(0)).ravel()
    stored, left, right = residuals(counts, total, share / (share.sum() + 19))
    plain = stored.toarray() - np.outer(left, right)
    vectors, lengths, _ = np.linalg.svd(plain - plain.mean(0), full_matrices=False)
    factors = spot_factors(sp.hstack([rare, counts]).tocsr(), most)
    expected = vectors[:, :most] * lengths[:most]
    np.testing.assert_allclose(np.abs((factors * expected).sum(0)), lengths[:most] ** 2, rtol=1e-6)
    assert (scaled(factors) ** 2).sum(1).mean() == pytest.approx(1)


def test_there_are_no_more_factors_than_dimensions():
    two = np.random.default_rng(0).poisson(9.0, (100, 2)).astype(float)
    assert spot_factors(sp.csr_matrix(np.tile(two, 10)), 8).shape == (100, 1)
    assert spot_factors(sp.csr_matrix(np.full((100, 30), 5.0)), 8).shape == (100, 0)


def test_counts_given_are_not_changed():
    _, counts = _tissue(spots=40)
    single = counts.astype(np.float32)
    for row in range(40):  # columns in descending order, as after a sparse product
        part = slice(single.indptr[row], single.indptr[row + 1])
        single.indices[part], single.data[part] = single.indices[part][::-1], single.data[part][::-1].copy()
    unsorted = sp.csr_matrix((single.data, single.indices, single.indptr), shape=counts.shape)
    data, indices = unsorted.data.copy(), unsorted.indices.copy()
    made = denoise(unsorted, components=2)
    np.testing.assert_array_equal(unsorted.data, data)
    np.testing.assert_array_equal(unsorted.indices, indices)
    np.testing.assert_allclose(made.expected(), denoise(counts, components=2).expected(), rtol=1e-3)


def test_spots_and_genes_without_counts_stay_empty():
    _, counts = _tissue(level=3)
    dense = counts.toarray()
    dense[:15], dense[:, [2, 8]] = 0, 0
    made = denoise(sp.csr_matrix(dense)).expected()
    assert np.isfinite(made).all()
    assert not made[:15].any() and not made[:, [2, 8]].any()
    assert (made[15:, 3] > 0).all()


@pytest.mark.parametrize(
    "dense",
    [
        np.full((100, 30), 5.0),
        np.full((4, 3), 0.4),
        np.arange(1.0, 21)[None],
        np.eye(3),
        np.random.default_rng(0).poisson(20, (50, 3)),
        np.random.default_rng(0).poisson(90, (2, 20)),
    ],
    ids=["equal counts", "equal fractions", "one spot", "few counts", "three genes of noise", "two spots"],
)
def test_too_little_to_learn_from_gives_constant_shares(dense):
    made = denoise(sp.csr_matrix(dense))
    assert not made.sigma.any()
    np.testing.assert_allclose(made.rates(), _flat(sp.csr_matrix(dense)), rtol=1e-5)
    assert np.isfinite(made.expected()).all()


def test_a_half_without_counts_does_not_matter():
    pair = sp.csr_matrix(np.eye(2))
    assert not all(split(pair, np.random.default_rng(seed))[0].nnz for seed in range(9))
    for seed in range(9):
        np.testing.assert_allclose(denoise(pair, seed=seed).expected(), 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (np.ones((9, 1)), "1 of 1 have counts in the spots; pass all measured genes"),
        (np.zeros((9, 5)), "0 of 5 have counts"),
        (np.zeros((0, 5)), "0 of 5 have counts"),
        (-np.ones((9, 5)), "needs raw counts"),
        (np.full((9, 5), np.nan), "needs raw counts"),
    ],
)
def test_what_cannot_be_denoised_is_refused(dense, message):
    with pytest.raises(StsrError, match=message):
        denoise(sp.csr_matrix(dense))


@pytest.mark.real
def test_denoising_real_spots_predicts_the_other_half_of_their_counts(real_data):
    with h5py.File(real_data / "breast/visium/filtered_feature_bc_matrix.h5") as file:
        stored = file["matrix"]
        parts = tuple(stored[name][:] for name in ("data", "indices", "indptr"))
        counts = sp.csc_matrix(parts, shape=tuple(stored["shape"][:])).T.tocsr()
    common = np.sort(np.argsort(-np.asarray(counts.sum(0)).ravel())[300:600])
    one, other = split(counts[:, common], np.random.default_rng(0))
    truth = other.toarray()
    error = _deviance(denoise(one).expected(), truth)
    assert error < 0.85 * _deviance(_flat(one), truth)
    assert error < 0.65 * _deviance(one.toarray(), truth)
