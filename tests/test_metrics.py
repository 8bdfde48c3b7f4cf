"""Scores against closed forms and hand-made cases."""

import numpy as np
import pytest
from scipy import stats

from stsr import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_pearson_is_signed_and_blind_to_scale():
    truth = np.array([[0.0, 1.0, 2.0, 5.0]])
    assert metrics.pearson(3 * truth + 7, truth) == pytest.approx([1.0])
    assert metrics.pearson(-truth, truth) == pytest.approx([-1.0])
    assert np.isnan(metrics.pearson(np.ones_like(truth), truth))


def test_spearman_agrees_with_scipy_on_ties(rng):
    a, b = rng.poisson(1.0, (2, 3, 200))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert metrics.spearman(a, b) == pytest.approx(expected)


def test_rmse_of_a_known_error():
    assert metrics.rmse(np.array([[1.0, 5.0]]), np.array([[1.0, 2.0]])) == pytest.approx([np.sqrt(4.5)])


def test_deviance_explained_is_0_for_the_mean_1_for_the_truth_and_below_0_for_a_wrong_level():
    truth = np.array([[0.0, 1.0, 3.0, 4.0]])
    assert metrics.deviance_explained(np.full_like(truth, 2.0), truth) == pytest.approx([0.0])
    assert metrics.deviance_explained(truth, truth) == pytest.approx([1.0], abs=1e-4)
    assert metrics.deviance_explained(truth * 10, truth) < 0


def test_deviance_explained_by_hand():
    truth, prediction = np.array([[1.0, 3.0]]), np.array([[1.5, 2.5]])
    left = 1 * np.log(1 / 1.5) + 3 * np.log(3 / 2.5)
    whole = 1 * np.log(1 / 2) + 3 * np.log(3 / 2)
    assert metrics.deviance_explained(prediction, truth) == pytest.approx([1 - left / whole])


def test_ssim_of_flat_maps_is_the_luminance_term_at_any_size():
    truth = np.full((1, 5, 8), 2.0)  # smaller than the window of 11 bins
    c1 = (0.01 * 2) ** 2
    expected = (2 * 2 * 3 + c1) / (2**2 + 3**2 + c1)
    assert metrics.ssim(np.full((1, 5, 8), 3.0), truth) == pytest.approx([expected])
    assert np.isnan(metrics.ssim(truth, np.zeros_like(truth)))


def test_ssim_by_hand_in_the_middle_of_a_map(rng):
    """Means, variances and covariance under the Gaussian window around one bin (Wang et al. 2004, eq. 13)."""
    a, b = rng.poisson(2.0, (2, 21, 21)).astype(float)
    step = np.arange(-5, 6)
    window = np.exp(-(step[:, None] ** 2 + step[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (values[5:16, 5:16] for values in (a, b))
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x, var_y = (window * x**2).sum() - mean_x**2, (window * y**2).sum() - mean_y**2
    both = (window * x * y).sum() - mean_x * mean_y
    c1, c2 = (0.01 * b.max()) ** 2, (0.03 * b.max()) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    middle = np.zeros((21, 21), bool)
    middle[10, 10] = True
    assert metrics.ssim(a[None], b[None], mask=middle) == pytest.approx([expected])
    assert metrics.ssim(b[None], b[None]) == pytest.approx([1.0])


def test_ssim_has_one_range_whatever_the_prediction(rng):
    truth = rng.poisson(2.0, (1, 30, 30)).astype(float)
    faint = truth / 100  # min-max scaling of both would call this perfect
    assert metrics.ssim(faint, truth)[0] < 0.2


def test_noise_ceiling_is_what_the_true_expectation_reaches(rng):
    mean = rng.gamma(1.0, 1.0, (1, 200, 200))
    counts = rng.poisson(mean)
    assert metrics.noise_ceiling(counts)[0] == pytest.approx(metrics.pearson(mean, counts)[0], abs=0.01)
    assert metrics.noise_ceiling(counts)[0] == pytest.approx(
        np.sqrt(1 / 2), abs=0.01
    )  # var(mean) / var(counts)


def test_noise_ceiling_of_pure_noise_is_near_zero(rng):
    assert metrics.noise_ceiling(rng.poisson(1.0, (1, 300, 300)))[0] < 0.15


def test_table_adds_bins_up_and_keeps_to_the_mask(rng):
    truth = rng.poisson(1.0, (2, 21, 23)).astype(float)
    mask = np.zeros((21, 23), bool)
    mask[:9, :10] = True
    scores = metrics.table(truth, truth, ["A", "B"], factors=(1, 2), bin_um=10, mask=mask)
    assert list(scores.bin_um) == [10, 10, 20, 20]
    assert list(scores.gene) == ["A", "B"] * 2
    assert scores.pcc.to_numpy() == pytest.approx(np.ones(4))
    assert scores.mean_count[0] == pytest.approx(truth[0, :9, :10].mean())
    coarse = truth[0, :8, :10].reshape(4, 2, 5, 2).sum((1, 3))  # row 8 is not wholly inside
    assert scores.mean_count[2] == pytest.approx(coarse.mean())


def test_table_refuses_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="do not match"):
        metrics.table(np.ones((1, 4, 4)), np.ones((1, 4, 5)), ["A"])
