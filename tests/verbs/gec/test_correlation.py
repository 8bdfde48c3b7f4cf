"""Correlation matrices, p-values corrected for autocorrelation, and correlation by distance, on known cases."""

import numpy as np
import pytest
from scipy import ndimage, stats

from stsr.verbs.gec import matrices
from stsr.verbs.gec.correlogram import Correlogram, effective_places, modified_t_test


@pytest.fixture
def values():
    """40 genes over 300 places: counts with many ties, and fractions."""
    rng = np.random.default_rng(0)
    level = rng.gamma(2, 1, 300)
    counts = rng.poisson(level * rng.uniform(0.1, 2, (20, 1)))
    return np.concatenate([counts, rng.random((20, 300)) * level])


@pytest.mark.parametrize("memory_genes", [16, 32, 1000])
def test_matrices_do_not_depend_on_how_the_genes_are_cut(values, monkeypatch, memory_genes):
    monkeypatch.setattr(matrices, "MEMORY_BYTES", memory_genes * 4 * 300)
    monkeypatch.setattr(matrices, "_PASSING_BYTES", 1)
    most = 0

    def read(part):
        nonlocal most
        most = max(most, part.stop - part.start)
        return values[part]

    seen = []
    pearson = matrices.pearson_matrix(read, 40, 300, lambda done, total, _: seen.append(done / total))
    spearman = matrices.spearman_matrix(read, 40, 300)
    np.testing.assert_allclose(pearson, np.corrcoef(values), atol=1e-5)
    np.testing.assert_allclose(spearman, stats.spearmanr(values.T).statistic, atol=1e-5)
    assert most <= 16 and seen == sorted(seen) and seen[-1] == 1


def test_three_hand_made_genes():
    rows = np.array([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [1.0, 3, 2, 10]])
    pearson = matrices.pearson_matrix(lambda part: rows[part], 3, 4)
    spearman = matrices.spearman_matrix(lambda part: rows[part], 3, 4)
    assert pearson[0, 1] == pytest.approx(-1, abs=1e-6)
    assert pearson[0, 2] == pytest.approx(13 / np.sqrt(5 * 50), abs=1e-6)
    assert spearman[0, 2] == pytest.approx(0.8, abs=1e-6)


def test_a_gene_that_does_not_vary_correlates_with_nothing():
    rows = np.array([[0.1] * 7, [0.0] * 7, [1.0, 2, 3, 4, 5, 6, 7]])
    matrix = matrices.pearson_matrix(lambda part: rows[part], 3, 7)
    np.testing.assert_allclose(matrix[2], [0, 0, 1], atol=1e-6)


def test_midranks_are_those_of_scipy(values):
    np.testing.assert_array_equal(matrices.midranks(values), stats.rankdata(values, axis=1))


def test_moments(values):
    mean, variance = matrices.moments(lambda part: values[part], 40)
    np.testing.assert_allclose(mean, values.mean(1))
    np.testing.assert_allclose(variance, values.var(1, ddof=1))


# ------------------------------------------------------------------------------------------- counting noise


def test_counting_noise_is_taken_out_of_the_correlation():
    """Raw counts correlate less than their intensities; corrected ones correlate as the intensities do."""
    rng = np.random.default_rng(1)
    shared, own = rng.gamma(1, 1, 40_000), rng.gamma(1, 1, (3, 40_000))
    intensity = np.stack([0.4 * shared + 0.2 * own[0], 0.3 * shared + 0.1 * own[1], 0.5 * own[2]])
    counts = rng.poisson(np.concatenate([intensity, np.full((1, 40_000), 0.5)]))
    raw = np.corrcoef(counts)
    corrected = matrices.without_counting_noise(raw, counts.mean(1), counts.var(1, ddof=1))
    known = np.corrcoef(intensity)
    assert raw[0, 1] < 0.5 * known[0, 1]
    np.testing.assert_allclose(corrected[:3, :3], known, atol=0.06)
    assert np.isnan(corrected[3]).all(), "a gene of noise alone has no correlation to be corrected"


def test_distance_of_matrices():
    truth = np.array([[1, 0.1, 0.2], [0.1, 1, 0.5], [0.2, 0.5, 1]])
    more = truth + 0.1 * (1 - np.eye(3))
    found = matrices.matrix_distance(more, truth)
    assert found["rmse"] == pytest.approx(0.1) and found["bias"] == pytest.approx(0.1)
    assert found["frobenius"] == pytest.approx(np.linalg.norm(more - truth))
    assert found["pattern"] == pytest.approx(1) and found["pairs"] == 3
    holes = truth.copy()
    holes[0, 1] = holes[1, 0] = np.nan
    assert matrices.matrix_distance(holes, truth)["pairs"] == 2


# --------------------------------------------------------------------------------------------------- results


def test_strongest_pairs_and_those_that_share_no_gene():
    matrix = np.eye(5)
    for (i, j), r in {(0, 1): 0.9, (0, 2): -0.95, (1, 2): 0.8, (3, 4): 0.3}.items():
        matrix[i, j] = matrix[j, i] = r
    i, j = matrices.strongest_pairs(matrix, 3)
    assert list(zip(i, j, strict=True)) == [(0, 2), (0, 1), (1, 2)]
    assert len(matrices.strongest_pairs(matrix, 100)[0]) == 10
    assert matrices.separate_pairs(matrix, 5) == [(0, 1), (3, 4)]
    assert matrices.separate_pairs(-matrix, 5) == [(0, 2)]


def test_false_discovery_rates_count_each_pair_once():
    p = np.zeros((3, 3))
    p[np.triu_indices(3, 1)] = [0.01, 0.04, 0.03]
    q = matrices.adjusted(p + p.T)
    np.testing.assert_allclose(q[np.triu_indices(3, 1)], [0.03, 0.04, 0.04])
    np.testing.assert_array_equal(q, q.T)


# ------------------------------------------------------------------------------------------------ by distance


def _smooth(rng, shape, sigma_bins):
    around = int(5 * sigma_bins) + 1
    wide = rng.standard_normal([size + 2 * around for size in shape])
    return ndimage.gaussian_filter(wide, sigma_bins)[around:-around, around:-around]


def _rasters(mask, fields):
    standard = matrices.standardised(np.stack([field[mask] for field in fields]))
    rasters = np.zeros((len(fields), *mask.shape))
    rasters[:, mask] = standard
    return rasters, float(standard[0].astype(float) @ standard[1])


def test_correlation_by_distance_is_the_mean_over_all_pairs_of_places():
    rng = np.random.default_rng(2)
    number = rng.integers(0, 4, (6, 7))  # up to three cells in a bin
    rows, columns = (np.repeat(index.ravel(), number.ravel()) for index in np.indices(number.shape))
    a, b = matrices.standardised(rng.random((2, len(rows)))).astype(float)
    gather = np.zeros((2, *number.shape))
    for values, raster in zip((a, b), gather, strict=True):
        np.add.at(raster, (rows, columns), values)
    found = Correlogram(number, 10.0)
    curve = found.cross(*gather, float(a @ b))
    distance = np.rint(np.hypot(rows[:, None] - rows, columns[:, None] - columns)) * 10.0
    distance[(distance == 0) & ~np.eye(len(rows), dtype=bool)] = 5.0  # others in the same bin
    assert found.pairs.sum() == len(rows) ** 2
    for lag_um, pairs, value in zip(found.lags_um, found.pairs, curve, strict=True):
        there = distance == lag_um
        assert there.sum() == pairs
        assert value == pytest.approx(np.outer(a, b)[there].mean() * len(rows), abs=1e-6)


def test_a_shifted_copy_is_found_at_its_distance():
    field = np.random.default_rng(3).standard_normal((80, 80))
    mask = np.zeros((80, 80), bool)
    mask[5:75, 10:60] = True
    rasters, r = _rasters(mask, [field, np.roll(field, 4, axis=1)])
    found = Correlogram(mask, 10.0)
    curve = found.cross(*rasters, r)
    near = found.lags_um < 250  # half of the tissue: few pairs are farther apart
    assert found.lags_um[near][np.argmax(curve[near])] == 40.0 and abs(r) < 0.1


def test_without_autocorrelation_the_test_is_the_usual_one():
    rng = np.random.default_rng(4)
    mask = np.ones((40, 40), bool)
    rasters, r = _rasters(mask, rng.standard_normal((2, 40, 40)))
    found = Correlogram(mask, 10.0)
    auto = found.auto(rasters)
    assert effective_places(auto[:1], auto[1:], found.pairs)[0, 0] == pytest.approx(1600, rel=0.15)
    usual = stats.pearsonr(rasters[0].ravel(), rasters[1].ravel()).pvalue
    assert modified_t_test(np.array(r), np.array(1600.0)) == pytest.approx(usual, rel=1e-3)
    assert modified_t_test(np.array(0.9), np.array(2.5)) == 1


@pytest.fixture(scope="module")
def ragged():
    """Tissue with a bay and a hole."""
    y, x = np.mgrid[:56, :56]
    whole = ((y - 28) ** 2 + (x - 28) ** 2 < 27**2) & ~((y < 20) & (x > 40))
    return whole & ((y - 35) ** 2 + (x - 20) ** 2 > 25)


def test_independent_fields_are_rarely_called_correlated(ragged):
    """At 5 %, naive p-values call most independent smooth genes correlated; corrected ones about 5 %."""
    rng = np.random.default_rng(5)
    found, results = Correlogram(ragged, 10.0), []
    for _ in range(200):
        rasters, r = _rasters(ragged, [_smooth(rng, ragged.shape, 3) for _ in range(2)])
        auto = found.auto(rasters)
        effective = effective_places(auto[:1], auto[1:], found.pairs)[0, 0]
        naive = modified_t_test(np.array(r), np.array(float(found.places)))
        results.append([naive, modified_t_test(np.array(r), effective), found.shift_test(*rasters)])
    naive, modified, shifted = (np.array(results) < 0.05).mean(0)
    assert naive > 0.5
    assert 0.005 <= modified <= 0.1 and 0.005 <= shifted <= 0.1  # 200 trials: 0.05 +- 3 standard errors


def test_fields_that_share_something_are_called_correlated(ragged):
    rng = np.random.default_rng(6)
    found = Correlogram(ragged, 10.0)
    shared, a, b = (_smooth(rng, ragged.shape, 2) for _ in range(3))
    rasters, r = _rasters(ragged, [2 * shared + a, 2 * shared + b])
    auto = found.auto(rasters)
    effective = effective_places(auto[:1], auto[1:], found.pairs)[0, 0]
    assert 10 < effective < found.places / 5
    assert modified_t_test(np.array(r), effective) < 1e-4 and found.shift_test(*rasters) < 1e-2
