"""Samplers, against the exact solution for Gaussian data and against DDPM and DDIM as written."""

import pytest
import torch

from stsr.diffusion.noise import Noise
from stsr.diffusion.precond import beta_sigmas, epsilon_denoiser, guided, linear_betas
from stsr.diffusion.samplers import SAMPLERS, ancestral, ddpm_sigmas, karras_sigmas, sampler

MEAN, SD = 1.5, 0.5  # of the data
SIGMA_MAX = 20.0


def gaussian_denoise(x, sigma):
    """E[x0 | x] for data N(MEAN, SD^2)."""
    return (SD**2 * x + sigma**2 * MEAN) / (SD**2 + sigma**2)


def exact(x):
    """The ODE's solution at 0: quantiles go to quantiles."""
    return MEAN + (x - MEAN) * SD / (SD**2 + SIGMA_MAX**2) ** 0.5


def error(name, steps):
    x = torch.linspace(-30, 40, 15, dtype=torch.float64).reshape(3, 5)
    sigmas = karras_sigmas(steps, 1e-4, SIGMA_MAX)
    return (sampler(name)(gaussian_denoise, x, sigmas) - exact(x)).abs().max().item()


# schedules


def test_karras_by_hand():
    assert karras_sigmas(3, 1.0, 9.0, rho=2).tolist() == pytest.approx([9.0, 4.0, 1.0, 0.0])
    assert karras_sigmas(1, 1.0, 9.0).tolist() == pytest.approx([9.0, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 999, 1000])
def test_ddpm_sigmas_and_their_parts(steps):
    table = beta_sigmas(linear_betas(0.00085, 0.012, 1000))
    sigmas = ddpm_sigmas(steps)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == table[-1]
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert torch.isin(sigmas[:-1], table).all()
    assert steps == 1 or sigmas[-2] == table[0]


def test_ddpm_sigmas_takes_all_steps_unless_told():
    assert torch.equal(ddpm_sigmas(), ddpm_sigmas(1000))
    assert len(ddpm_sigmas(total=50)) == 51


@pytest.mark.parametrize(
    "make",
    [
        lambda: karras_sigmas(0),
        lambda: karras_sigmas(5, 2.0, 1.0),
        lambda: ddpm_sigmas(0),
        lambda: ddpm_sigmas(1001),
    ],
)
def test_impossible_schedules(make):
    with pytest.raises(ValueError, match=r"step|sigma_min"):
        make()


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.5], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
def test_samplers_refuse_what_is_no_schedule(values):
    with pytest.raises(ValueError, match="decrease"):
        sampler("euler")(gaussian_denoise, torch.ones(1), torch.tensor(values))


# ODE samplers


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_converges_with_its_order(name, order):
    coarse, fine = error(name, 40), error(name, 80)
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_second_order_is_better_at_equal_evaluations():
    euler, heun, dpmpp = error("euler", 80), error("heun", 40), error("dpmpp_2m", 80)
    assert euler < 0.05
    assert heun < euler / 3
    assert dpmpp < euler / 4


def test_dpmpp_by_hand():
    # log-sigma steps of ln 2 and ln 8: the second extrapolates 1, 3 by 3/2 of their difference, to 6
    def denoise(x, sigma):
        return {4.0: torch.tensor(1.0), 2.0: torch.tensor(3.0), 0.25: x}[sigma.item()]

    result = sampler("dpmpp_2m")(denoise, torch.tensor(7.0), torch.tensor([4.0, 2.0, 0.25, 0.0]))
    assert result.item() == pytest.approx((7 / 2 + 1 / 2) / 8 + 6 * 7 / 8)


def test_one_step_is_one_denoising():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for name in ("euler", "heun", "dpmpp_2m", "ancestral"):
        result = sampler(name)(gaussian_denoise, x, karras_sigmas(1, 0.1, 2.0), lambda step: 0 / 0)
        assert torch.allclose(result, gaussian_denoise(x, 2.0))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_keeps_the_type_and_calls_denoise_with_a_scalar_tensor(name):
    def denoise(x, sigma):
        assert isinstance(sigma, torch.Tensor)
        assert sigma.shape == ()
        assert sigma.dtype == x.dtype == torch.float32
        assert sigma > 0
        return 0.5 * x

    result = sampler(name)(
        denoise, torch.ones(2, 1, 4, 4), karras_sigmas(5), lambda step: torch.ones(2, 1, 4, 4)
    )
    assert result.shape == (2, 1, 4, 4)
    assert result.dtype == torch.float32


def test_evaluations():
    counts = {}
    for name in ("euler", "heun", "dpmpp_2m"):

        def denoise(x, sigma, name=name):
            counts[name] = counts.get(name, 0) + 1
            return 0.5 * x

        sampler(name)(denoise, torch.ones(1), karras_sigmas(10))
    assert counts == {"euler": 10, "heun": 19, "dpmpp_2m": 10}


def test_guidance_moves_the_sample():
    x = torch.full((4,), 10.0)
    sigmas = karras_sigmas(20, 0.01, SIGMA_MAX)

    def unconditional(x, sigma):
        return (x + sigma**2 * 0.0) / (1 + sigma**2)  # N(0, 1)

    results = {
        w: sampler("heun")(guided(gaussian_denoise, unconditional, w), x, sigmas) for w in (0.0, 1.0, 3.0)
    }
    assert torch.equal(results[1.0], sampler("heun")(gaussian_denoise, x, sigmas))
    assert (results[3.0] > results[1.0] + 0.1).all()  # away from the unconditional mean
    assert (results[0.0] < results[1.0] - 0.1).all()


# DDPM and DDIM, as written


BETAS = linear_betas(0.001, 0.2, 40)


def eps_network(x_t, t):
    """Any function of both will do."""
    return torch.tanh(0.7 * x_t) + 0.01 * t.reshape(-1, 1) * torch.cos(x_t)


def textbook_ddpm(x, noises):
    """Ho et al. 2020, algorithm 2, in x_t's own scale; steps counted from 0."""
    alphas, abar = 1 - BETAS, (1 - BETAS).cumprod(0)
    for t in reversed(range(len(BETAS))):
        eps = eps_network(x, torch.full((x.shape[0],), float(t), dtype=x.dtype))
        x = (x - BETAS[t] / (1 - abar[t]).sqrt() * eps) / alphas[t].sqrt()
        if t > 0:
            variance = (1 - abar[t - 1]) / (1 - abar[t]) * BETAS[t]
            x = x + variance.sqrt() * noises[len(BETAS) - t]
    return x


def textbook_ddim(x, steps):
    """Song et al. 2021, equation 12 with eta 0, over some of the steps."""
    abar = (1 - BETAS).cumprod(0)
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        eps = eps_network(x, torch.full((x.shape[0],), float(t), dtype=x.dtype))
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = x0 if s is None else abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    return x


@pytest.fixture
def start():
    """x_T, and the same in sigma space: divided by sqrt(abar_T)."""
    x_t = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x_t, x_t / (1 - BETAS).prod().sqrt()


def test_ancestral_is_ddpm(start):
    x_t, x_sigma = start
    noises = torch.randn(41, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise = epsilon_denoiser(eps_network, beta_sigmas(BETAS))
    sigmas = ddpm_sigmas(None, 0.001, 0.2, 40)
    result = ancestral(denoise, x_sigma, sigmas, lambda step: noises[step])
    assert torch.allclose(result, textbook_ddpm(x_t, noises), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [40, 14])
def test_ddim_is_ddim(start, steps):
    x_t, x_sigma = start
    denoise = epsilon_denoiser(eps_network, beta_sigmas(BETAS))
    result = sampler("ddim")(denoise, x_sigma, ddpm_sigmas(steps, 0.001, 0.2, 40))
    taken = list(range(39, -1, -1 if steps == 40 else -3))
    assert torch.allclose(result, textbook_ddim(x_t, taken), rtol=1e-9, atol=1e-9)


# ancestral sampling


def test_ancestral_samples_have_the_right_mean_and_spread():
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    x = MEAN + (SD**2 + SIGMA_MAX**2) ** 0.5 * torch.randn(n, generator=generator)
    sigmas = karras_sigmas(
        800, 0.002, SIGMA_MAX
    )  # beta-tilde is too narrow at first order: by 2.4 % at 200 steps
    result = ancestral(gaussian_denoise, x, sigmas, lambda step: torch.randn(n, generator=generator))
    assert result.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert result.std().item() == pytest.approx(SD, rel=0.015)


def test_ancestral_asks_for_steps_from_one():
    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(1)

    ancestral(gaussian_denoise, torch.ones(1), karras_sigmas(4), noise)
    assert asked == [1, 2, 3]  # 0 made x, and the last step draws nothing


def test_ancestral_needs_noise():
    with pytest.raises(ValueError, match="needs noise"):
        ancestral(gaussian_denoise, torch.ones(1), karras_sigmas(4))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_tiles_agree_where_they_overlap(name):
    # a denoiser that acts on each bin alone must give the same bins in both windows
    sigmas = karras_sigmas(6, 0.01, SIGMA_MAX)

    def sample(y0, x0):
        draw = Noise(5).source(["A", "B"], [(y0, x0)], 40, 40)
        return sampler(name)(gaussian_denoise, SIGMA_MAX * draw(0), sigmas, draw)

    left, right = sample(0, 0), sample(-7, 30)
    assert torch.equal(left[..., :33, 30:], right[..., 7:, :10])


def test_unknown_name_names_the_known():
    with pytest.raises(ValueError, match="dpmpp_2m"):
        sampler("plms")
