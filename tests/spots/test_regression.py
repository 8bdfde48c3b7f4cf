import numpy as np
import pytest
from scipy.special import logsumexp

from stsr.spots import regression
from stsr.spots.regression import Design, fit, gradient


def _problem(spots=80, components=4, genes=6, seed=0, level=8.0):
    """Counts (g, n) from known coefficients (g, 1 + k), and the design."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((spots, components)) / np.sqrt(components)
    design = Design(rng.uniform(0.3, 2, spots), factors)
    true = np.column_stack([np.full(genes, np.log(level)), rng.standard_normal((genes, components))])
    return rng.poisson(design.rates(true)).astype(float), design, true


def test_coefficients_are_found():
    counts, design, true = _problem(spots=2000, level=50)
    found = fit(counts @ design.columns, design)
    np.testing.assert_allclose(found.coefficients, true, atol=0.05)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_the_gradient_is_zero_at_the_mode(sigma):
    counts, design, _ = _problem()
    sums = counts @ design.columns
    found = fit(sums, design, (sigma,))
    slope = gradient(sums, design, sigma, found.coefficients, design.rates(found.coefficients))
    assert np.abs(slope).max() < 1e-4 * np.abs(sums).max()
    assert np.abs(found.coefficients[:, 1:]).max() > 0.1


def test_the_gradient_is_the_derivative_of_the_posterior():
    counts, design, true = _problem(genes=1)

    def posterior(at):
        rates = design.rates(at)
        return (counts * np.log(rates) - rates).sum() - (at[:, 1:] ** 2).sum() / 2 / 0.6**2

    slope = gradient(counts @ design.columns, design, 0.6, true, design.rates(true))
    for column, step in enumerate(np.eye(5)[:, None] * 1e-5):
        difference = (posterior(true + step) - posterior(true - step)) / 2e-5
        assert slope[0, column] == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_the_mode_is_found_from_afar():
    """All counts in one of many spots: the first full Newton step would multiply that rate by e^100."""
    factors = np.zeros((300, 1))
    factors[0] = np.sqrt(300)
    design = Design(np.ones(300), factors)
    sums = np.array([[5000.0]]) * np.r_[1.0, factors[0]]
    found = fit(sums, design, (2.5,))
    rates = design.rates(found.coefficients)
    assert rates[0, 0] == pytest.approx(5000, rel=0.01)
    assert rates.sum() == pytest.approx(5000, rel=1e-3)


def test_the_curvature_is_that_of_the_plain_formula(monkeypatch):
    _, design, true = _problem()
    rates = design.rates(true)
    plain = np.einsum("gn,ni,nj->gij", rates, design.columns, design.columns)
    np.testing.assert_allclose(design.curvature(rates), plain, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(regression, "_PRODUCTS", 100)
    np.testing.assert_allclose(design.curvature(rates), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("level", [20, 100])
def test_the_evidence_is_the_integral_over_intercept_and_coefficient(level):
    rng = np.random.default_rng(1)
    design = Design(np.array([0.5, 1, 1.5, 1, 0.8, 1.2]), rng.standard_normal((6, 1)))
    counts = rng.poisson(design.rates(np.array([[np.log(level), 0.4]]))).astype(float)
    sums = counts @ design.columns
    intercept = np.linspace(np.log(level) - 3, np.log(level) + 2, 701)[:, None, None]
    weight = np.linspace(-4, 4, 801)[None, :, None]
    cell = np.log((intercept[1] - intercept[0]) * (weight[0, 1] - weight[0, 0])).item()
    free = np.log(2 * np.pi) / 2 - np.log(sums[0, 0]) / 2  # what the intercept adds for every sigma
    for sigma in (0.3, 1.0, 2.5):
        log_share = intercept + sigma * weight * design.factors[:, 0]
        values = (counts * log_share - design.exposure * np.exp(log_share)).sum(-1) - weight[..., 0] ** 2 / 2
        whole = logsumexp(values) + cell - np.log(2 * np.pi) / 2
        assert fit(sums, design, (sigma,)).evidence[0] == pytest.approx(whole - free, abs=0.05)
    log_share = intercept[:, 0, 0]
    values = sums[0, 0] * log_share - design.exposure.sum() * np.exp(log_share)
    whole = logsumexp(values) + np.log(log_share[1] - log_share[0])
    assert fit(sums, design, (0.0,)).evidence[0] == pytest.approx(whole - free, abs=0.05)


def test_the_scale_with_the_largest_evidence_is_taken():
    counts, design, _ = _problem()
    sums = counts @ design.columns
    each = np.stack([fit(sums, design, (scale,)).evidence for scale in regression.SCALES])
    found = fit(sums, design)
    np.testing.assert_array_equal(found.sigma, np.array(regression.SCALES)[each.argmax(0)])
    np.testing.assert_allclose(found.evidence, each.max(0), atol=1e-4)


def test_the_scale_follows_the_truth():
    """Genes of small and large variation over the same factors; Poisson noise alone gets 0."""
    rng = np.random.default_rng(0)
    design = Design(np.ones(400), rng.standard_normal((400, 10)) / np.sqrt(10))
    true = np.repeat([0.0, 0.4, 2.0], 30)
    coefficients = np.column_stack([np.full(90, 2.0), rng.standard_normal((90, 10)) * true[:, None]])
    found = fit(rng.poisson(design.rates(coefficients)) @ design.columns, design)
    assert (found.sigma[:30] == 0).mean() > 0.9
    assert set(found.sigma[30:60]) <= {0.3, 0.6}
    assert set(found.sigma[60:]) <= {1.0, 1.5, 2.5} and np.median(found.sigma[60:]) >= 1.5
