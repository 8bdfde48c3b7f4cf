"""Scores against closed forms and hand-made cases."""

import numpy as np
import pytest
from scipy import stats

from stsr import metrics
from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement


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


def test_ssim_agrees_with_scikit_image(rng):
    from skimage.metrics import structural_similarity

    a, b = rng.poisson(2.0, (2, 1, 40, 50)).astype(float)
    other = structural_similarity(
        a[0],
        b[0],
        data_range=b.max(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert metrics.ssim(a, b) == pytest.approx([other.mean()])
    assert metrics.ssim(b, b) == pytest.approx([1.0])


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


def test_spots_added_up():
    grid = Grid(0, 0, 10, 20, 20)
    measurement = Measurement.squares(grid)  # four spots
    maps = np.ones((2, 20, 20))
    counts = np.array([[100, 50], [100, 50], [100, 50], [100, 50.0]])
    assert metrics.spots_error(maps, measurement, counts) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("samples", [8, 39])
def test_intervals_cover_what_they_say(rng, samples):
    draws = rng.normal(size=(samples + 1, 1, 150, 150))
    expected = 0.9 if samples >= 19 else (samples - 1) / (samples + 1)
    assert metrics.coverage(draws[1:], draws[0])[0] == pytest.approx(expected, abs=0.01)


def test_coverage_of_counts_needs_counting_noise(rng):
    samples = np.full((39, 1, 100, 100), 4.0)
    counts = rng.poisson(4.0, (1, 100, 100))
    assert metrics.coverage(samples, counts)[0] < 0.3
    assert metrics.coverage(samples, counts, counting=rng)[0] > 0.88


def test_crps_of_a_normal_is_its_closed_form_for_any_number_of_samples(rng):
    truth = np.zeros((1, 200, 200))
    exact = (np.sqrt(2) - 1) / np.sqrt(np.pi)  # standard normal against its own centre
    for count in (2, 5, 20):
        assert metrics.crps(rng.normal(size=(count, 1, 200, 200)), truth)[0] == pytest.approx(exact, abs=0.01)


def test_crps_by_hand():
    samples = np.array([1.0, 4.0]).reshape(2, 1, 1, 1)
    assert metrics.crps(samples, np.full((1, 1, 1), 2.0)) == pytest.approx([(1 + 2) / 2 - 3 / 2])
    assert metrics.crps(samples[:1], np.full((1, 1, 1), 2.0)) == pytest.approx([1.0])


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
    with pytest.raises(ValueError, match="do not fit"):
        metrics.table(np.ones((1, 4, 4)), np.ones((1, 4, 5)), ["A"])
