"""Preconditioning, training sigmas, the DDPM world and guidance, against the papers' own formulas."""

import math

import pytest
import torch

from stsr.diffusion.precond import (
    Preconditioning,
    beta_sigmas,
    epsilon_denoiser,
    guided,
    linear_betas,
    lognormal_sigmas,
    step_of_sigma,
    uniform_sigmas,
)


def test_three_hand_made_values():
    scales = Preconditioning(sigma_data=3.0)
    sigma = torch.tensor([4.0], dtype=torch.float64)  # 3, 4, 5
    assert scales.c_skip(sigma).item() == pytest.approx(9 / 25)
    assert scales.c_out(sigma).item() == pytest.approx(12 / 5)
    assert scales.c_in(sigma).item() == pytest.approx(1 / 5)
    assert scales.c_noise(sigma).item() == pytest.approx(math.log(4) / 4)
    assert scales.loss_weight(sigma).item() == pytest.approx(25 / 144)


def test_input_and_target_have_unit_variance():
    scales = Preconditioning(sigma_data=0.7)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.7 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    for sigma in torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64):
        x = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        target = (x0 - scales.c_skip(sigma) * x) / scales.c_out(sigma)  # what the network must predict
        assert (scales.c_in(sigma) * x).std().item() == pytest.approx(1, abs=0.01)
        assert target.std().item() == pytest.approx(1, abs=0.01)
        # a network's error of 1 has weight 1 at every sigma
        assert (scales.loss_weight(sigma) * scales.c_out(sigma) ** 2).item() == pytest.approx(1)


def test_denoised_is_optimal_for_gaussians_with_a_silent_network():
    # for N(0, sigma_data^2) the best estimate is c_skip x: nothing is left for the network to predict
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    result = Preconditioning(2.0).denoised(lambda x, c_noise: torch.zeros_like(x), x, sigma)
    assert torch.allclose(result, x * (4 / (4 + sigma**2)).reshape(3, 1, 1, 1))


def test_denoised_hands_over_what_the_network_needs():
    seen = {}

    def network(x, c_noise, features, scale=1.0):
        seen.update(x=x, c_noise=c_noise, features=features)
        return scale * x

    x = torch.ones(3, 2, 4, 4)
    result = Preconditioning(3.0).denoised(network, x, torch.tensor(4.0), "features", scale=2.0)
    assert torch.allclose(seen["x"], x / 5)
    assert seen["c_noise"].shape == (3,)
    assert torch.allclose(seen["c_noise"], torch.full((3,), math.log(4) / 4))
    assert seen["features"] == "features"
    assert torch.allclose(result, torch.full_like(x, 9 / 25 + 12 / 5 * 2 / 5))


def test_sigma_data_must_be_positive():
    with pytest.raises(ValueError, match="sigma_data"):
        Preconditioning(0.0)


def test_lognormal_sigmas():
    logs = lognormal_sigmas(100_000, torch.Generator().manual_seed(0), p_mean=-0.5, p_std=1.5).log()
    assert logs.mean().item() == pytest.approx(-0.5, abs=0.02)
    assert logs.std().item() == pytest.approx(1.5, abs=0.02)
    again = lognormal_sigmas(100_000, torch.Generator().manual_seed(0), p_mean=-0.5, p_std=1.5).log()
    assert torch.equal(logs, again)


def test_linear_betas():
    assert linear_betas(0.1, 0.3, 3).tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert linear_betas(0.01, 0.09, 3, power=2).tolist() == pytest.approx([0.01, 0.04, 0.09])
    with pytest.raises(ValueError, match="beta_start"):
        linear_betas(0.5, 0.1, 3)


def test_beta_sigmas_by_hand():
    # abar: 0.9, 0.72
    assert beta_sigmas(torch.tensor([0.1, 0.2])).tolist() == pytest.approx(
        [math.sqrt(0.1 / 0.9), math.sqrt(0.28 / 0.72)]
    )


def test_uniform_sigmas_takes_every_step_alike():
    table = beta_sigmas(linear_betas(0.01, 0.2, 4))
    drawn = uniform_sigmas(40_000, table, torch.Generator().manual_seed(0))
    counts = (drawn[:, None] == table.float()).sum(0)
    assert counts.sum() == 40_000
    assert (counts - 10_000).abs().max() < 500


def test_step_of_sigma_inverts_the_table():
    table = beta_sigmas(linear_betas(0.00085, 0.012, 1000))
    steps = step_of_sigma(table.float(), table)
    assert torch.allclose(steps, torch.arange(1000.0), atol=1e-3)
    between = (table[10] * table[11]).sqrt()
    assert step_of_sigma(between, table).item() == pytest.approx(10.5)
    assert step_of_sigma(torch.tensor([1e-6, 1e6]), table).tolist() == [0.0, 999.0]


def test_epsilon_denoiser_finds_x0_from_the_true_noise():
    betas = linear_betas(0.001, 0.02, 100)
    abar = (1 - betas).cumprod(0)
    table = beta_sigmas(betas)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([5, 80])
    seen = {}

    def network(x_t, step):
        seen.update(x_t=x_t, step=step)
        return eps

    result = epsilon_denoiser(network, table)(x0 + table[t].reshape(2, 1, 1, 1) * eps, table[t])
    a = abar[t].reshape(2, 1, 1, 1)
    assert torch.allclose(seen["x_t"], a.sqrt() * x0 + (1 - a).sqrt() * eps)  # DDPM, equation 4
    assert torch.allclose(seen["step"], t.double())
    assert torch.allclose(result, x0)


def test_guidance_is_the_papers_on_epsilon():
    x, sigma, w = torch.tensor([[5.0]]), torch.tensor(2.0), 3.0
    denoise = guided(lambda x, s: torch.tensor([[1.0]]), lambda x, s: torch.tensor([[2.0]]), w)
    eps = w * (x - 1.0) / sigma + (1 - w) * (x - 2.0) / sigma
    assert torch.allclose(denoise(x, sigma), x - sigma * eps)
    assert denoise(x, sigma).item() == pytest.approx(-1.0)


def test_guidance_evaluates_only_what_counts():
    def conditional(x, sigma):
        return x

    def never(x, sigma):
        raise AssertionError("this branch has no weight")

    x = torch.ones(1)
    assert torch.equal(guided(conditional, never, 1.0)(x, x), x)
    assert torch.equal(guided(never, conditional, 0.0)(x, x), x)
