import numpy as np
import pytest

from stsr.diffusion.noise import Noise
from stsr.geometry.grid import add_up
from stsr.spread.dispersion import Dispersion, correlation, kept_variance
from stsr.spread.drawing import drawn_rates
from stsr.spread.fitting import FACTORS, Moments, counting_noise, fit

GENES = [f"G{number}" for number in range(12)]
TRUE = Dispersion(
    (0.05, 0.1, 0.0, 0.02), (0.1, 0.2, 0.1, 0.0), {gene: 0.5 + 0.1 * n for n, gene in enumerate(GENES)}
)


def smooth_maps(side=160, seed=0):
    """Expected counts that change slowly, of genes of different abundance."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 6, side)
    waves = 1 + 0.7 * np.sin(
        x[None] * rng.uniform(0.5, 2, (len(GENES), 1)) + rng.uniform(0, 6, (len(GENES), 1))
    )
    return (
        np.geomspace(0.5, 8, len(GENES))[:, None, None] * waves[:, :, None] * np.ones((1, 1, side))
    ).astype(np.float32)


def sampled(mean, number, corner=(0, 0), dispersion=TRUE, bin_um=10.0):
    sd = dispersion.sd(mean, mean.mean((1, 2)), GENES, bin_um)
    return drawn_rates(mean, sd, GENES, dispersion, bin_um=bin_um, corner=corner, noise=Noise(5, number))


@pytest.fixture(scope="module")
def draws():
    mean = smooth_maps()
    return mean, np.stack([sampled(mean, number) for number in range(24)])


def test_correlation_of_a_field_by_hand():
    # exp(-d^2 / 4 l^2) with l = 1: 1, e^(-1/4), e^(-1)
    assert correlation(1.0, np.array([0, 1, 2])) == pytest.approx([1, np.exp(-0.25), np.exp(-1)])
    # two bins of a row: (1 + e^(-1/4)) / 2, squared over two axes; white noise keeps a quarter
    assert kept_variance((0.0, 10.0), 10.0, 2) == pytest.approx([0.25, ((1 + np.exp(-0.25)) / 2) ** 2])


def test_draws_have_the_mean_and_the_spread_they_are_given(draws):
    mean, rates = draws
    assert (rates > 0).all()
    assert rates.mean((0, 2, 3)) == pytest.approx(mean.mean((1, 2)), rel=0.03)
    sd = TRUE.sd(mean, mean.mean((1, 2)), GENES, 10.0)
    found = np.sqrt(((rates - mean) ** 2).mean((0, 2, 3)) / (sd**2).mean((1, 2)))
    assert found == pytest.approx(np.ones(len(GENES)), abs=0.1)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sums_vary_as_the_closed_form_says(draws, factor):
    mean, rates = draws
    sums, expected = add_up(rates, factor), add_up(mean, factor)
    sd = TRUE.sd(expected, mean.mean((1, 2)) * factor**2, GENES, 10.0 * factor)
    found = np.sqrt(((sums - expected) ** 2).mean() / (sd**2).mean())
    assert found == pytest.approx(1, abs=0.12)
    independent = np.sqrt(add_up(TRUE.sd(mean, mean.mean((1, 2)), GENES, 10.0) ** 2, factor))
    assert (sd**2).mean() > 1.5 * (independent**2).mean()  # errors of neighbours are similar


def test_draws_of_coarse_bins_vary_over_large_areas_as_those_of_fine_bins_do(draws):
    mean, rates = draws
    coarse = add_up(mean, 2)
    rough = np.stack([sampled(coarse, number, bin_um=20.0) for number in range(24)])
    far = add_up(mean, 8)
    fine, other = (
        ((add_up(values, factor) - far) ** 2).mean() for values, factor in ((rates, 8), (rough, 4))
    )
    assert other == pytest.approx(fine, rel=0.25)


def test_genes_share_a_part_of_their_errors(draws):
    mean, rates = draws
    relative = (rates / mean - 1)[:, [0, 11]]
    together = (relative[:, 0] * relative[:, 1]).mean()
    rise = 1 + mean.mean((1, 2))[:, None, None] / mean[:, :, :]
    assert together == pytest.approx(sum(TRUE.shared) * np.sqrt(rise[0] * rise[11]).mean(), rel=0.25)


def test_a_window_is_cut_from_the_same_sample(draws):
    mean, rates = draws
    sd = TRUE.sd(mean, mean.mean((1, 2)), GENES, 10.0)
    part = np.s_[:, 30:70, 50:120]
    window = drawn_rates(mean[part], sd[part], GENES, TRUE, bin_um=10.0, corner=(30, 50), noise=Noise(5, 0))
    np.testing.assert_allclose(window, rates[0][part], rtol=1e-4)
    assert not np.allclose(rates[0], rates[1])


def test_low_expression_is_relatively_less_certain():
    mean = np.array([[[0.1, 1.0, 10.0]]], np.float32)
    sd = TRUE.sd(mean, np.ones(1), ["other gene"], 10.0)[0, 0]
    relative = sd / mean[0, 0]
    assert relative[0] > relative[1] > relative[2]
    shared, own = sum(TRUE.shared), sum(TRUE.own)
    assert relative[1] == pytest.approx(np.sqrt((1 + 2 * shared) * (1 + 2 * own) - 1), rel=1e-4)
    assert TRUE.sd(np.zeros((1, 2, 2), np.float32), np.ones(1), ["other gene"], 10.0).max() == 0


def fitted(tiles=48):
    moments = Moments(len(GENES))
    rng = np.random.default_rng(1)
    mean = smooth_maps(side=60)
    for tile in range(tiles):
        truth = rng.poisson(sampled(mean, tile)).astype(float)
        moments.add(mean, truth, mean.mean((1, 2)), np.ones(len(GENES), bool))
    return fit(moments, GENES, 10.0)


def test_fit_finds_the_dispersion_on_every_scale():
    found = fitted()
    for bin_um in (20.0, 40.0, 80.0):
        for mine, true in zip(found.of_sums(bin_um), TRUE.of_sums(bin_um), strict=True):
            assert mine.sum() == pytest.approx(true.sum(), rel=0.35)
    factors = found.factors(GENES)
    assert np.corrcoef(factors, TRUE.factors(GENES))[0, 1] > 0.7


def test_counts_without_dispersion_have_none():
    moments, mean = Moments(len(GENES)), smooth_maps(side=60)
    rng = np.random.default_rng(2)
    for _ in range(16):
        moments.add(mean, rng.poisson(mean).astype(float), mean.mean((1, 2)), np.ones(len(GENES), bool))
    found = fit(moments, GENES, 10.0)
    assert sum(found.shared) < 0.01
    assert sum(found.own) < 0.02


def test_genes_that_were_not_measured_do_not_count():
    moments, mean = Moments(2), np.ones((2, 16, 16), np.float32)
    truth = np.stack([np.ones((16, 16)), np.zeros((16, 16))])
    moments.add(mean, truth, np.ones(2), np.array([True, False]))
    assert moments.squares[:, 1].tolist() == [0.0] * len(FACTORS)
    assert moments.total.tolist() == [256.0, 0.0]


def test_nothing_to_fit_gives_none():
    assert fit(Moments(3), ["A", "B", "C"], 10.0) is None


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_noise_of_divided_counts_against_simulation(factor):
    """Bins of 8 um, divided by area between bins of 10 um at many positions."""
    rng = np.random.default_rng(0)
    edges = np.arange(0, 200, 8.0)
    ratios = []
    for shift in np.linspace(0, 8, 16, endpoint=False):
        starts = shift + 40 + 10.0 * factor * np.arange(3)
        overlap = np.clip(
            np.minimum(edges[None] + 8, starts[:, None] + 10 * factor)
            - np.maximum(edges[None], starts[:, None]),
            0,
            None,
        )
        parts = overlap / 8  # (blocks, bins) along one axis
        counts = rng.poisson(5.0, (400, len(edges), len(edges)))
        sums = np.einsum("ab,nbc,dc->nad", parts, counts, parts)
        ratios.append(sums.var() / sums.mean())
    assert counting_noise(factor, 0.8) == pytest.approx(np.mean(ratios), rel=0.05)
    assert counting_noise(factor, 0.0) == 1


def test_json_round_trip():
    import json

    assert Dispersion.from_json(json.loads(json.dumps(TRUE.to_json()))) == TRUE
