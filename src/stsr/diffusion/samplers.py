"""Noise schedules and samplers.

A schedule is a tensor of sigmas, (steps + 1,) float64 on the CPU, strictly decreasing and ending in 0. A sampler is
``sampler(denoise, x, sigmas, noise=None) -> x0``. It takes ``denoise(x, sigma) -> x0`` with a scalar sigma, x of any
shape, already scaled (``x = sigmas[0] * noise``), and the schedule. Stochastic samplers also need a function
``step -> noise`` shaped like x (``Noise.source``), which they call for steps 1, 2, ...; step 0 gave x.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import expm1, log, sqrt

import torch

from stsr.diffusion.precond import Denoise, beta_sigmas, linear_betas

Draw = Callable[[int], torch.Tensor]
Sampler = Callable[..., torch.Tensor]


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """Sigmas evenly spaced in ``sigma^(1 / rho)``, then 0 (Karras et al. 2022, equation 5, with its values).

    Parameters
    ----------
    steps
        Number of steps.
    sigma_min, sigma_max
        Last sigma above 0 and first sigma, in units of the data.
    rho
        Larger values put more steps near sigma_min.

    Returns
    -------
    torch.Tensor
        (steps + 1,) float64.

    Raises
    ------
    ValueError
        If steps is below 1, or not 0 < sigma_min < sigma_max.
    """
    _at_least_one(steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _to_zero(torch.linspace(*ends, steps, dtype=torch.float64) ** rho)


def ddpm_sigmas(
    steps: int | None = None,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    total: int = 1000,
    power: float = 1.0,
) -> torch.Tensor:
    """Sigmas of all or some steps of DDPM, then 0.

    Parameters
    ----------
    steps
        Number of steps, evenly spaced from the last to the first, both included; None for all. (Common DDIM code leaves
        out the last and so treats pure noise as less noisy than it is: Lin et al., WACV 2024.)
    beta_start, beta_end, total, power
        Parameters of `linear_betas`; ``total`` is its number of steps. The defaults are those of C3-Diff's code, except
        for its power of 2.

    Returns
    -------
    torch.Tensor
        (steps + 1,) float64.

    Raises
    ------
    ValueError
        If steps is not between 1 and total.
    """
    sigmas = beta_sigmas(linear_betas(beta_start, beta_end, total, power)).flip(0)  # (total,)
    if steps is not None:
        _at_least_one(steps)
        if steps > total:
            raise ValueError(f"steps ({steps}) must not exceed the {total} steps of the schedule")
        sigmas = sigmas[torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()]
    return _to_zero(sigmas)


def ancestral(
    denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Draw | None = None
) -> torch.Tensor:
    """DDPM (Ho et al. 2020, algorithm 2) with the posterior variance beta-tilde (equations 6 and 7).

    Divided by sqrt(abar), the posterior of x_s given x_t and x0 is normal with mean ``r x_t + (1 - r) x0``
    and variance ``s^2 (1 - r)``, where ``r = s^2 / t^2`` for sigmas s below t. With all steps of `ddpm_sigmas` this is
    DDPM; with some of them it is DDIM with eta 1 (Song et al. 2021, equation 16).

    Raises
    ------
    ValueError
        If noise is missing.
    """
    if noise is None:
        raise ValueError("the ancestral sampler needs noise, a function of the step")
    for step, (sigma, lower) in enumerate(_pairs(sigmas), start=1):
        ratio = (lower / sigma) ** 2
        x = ratio * x + (1 - ratio) * denoise(x, x.new_tensor(sigma))
        if lower > 0:
            x = x + lower * sqrt(1 - ratio) * noise(step)
    return x


def euler(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Draw | None = None) -> torch.Tensor:
    """Euler's method for the probability-flow ODE: DDIM with eta 0 (Song et al. 2021, equation 13)."""
    for sigma, lower in _pairs(sigmas):
        x0 = denoise(x, x.new_tensor(sigma))
        x = x0 + (lower / sigma) * (x - x0)
    return x


def heun(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Draw | None = None) -> torch.Tensor:
    """Heun's method: second order, two evaluations per step but the last (Karras et al. 2022, algorithm 1)."""
    for sigma, lower in _pairs(sigmas):
        slope = (x - denoise(x, x.new_tensor(sigma))) / sigma
        predicted = x + (lower - sigma) * slope
        if lower > 0:
            slope = (slope + (predicted - denoise(predicted, x.new_tensor(lower))) / lower) / 2
        x = x + (lower - sigma) * slope
    return x


def dpmpp_2m(
    denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Draw | None = None
) -> torch.Tensor:
    """DPM-Solver++(2M): second order, one evaluation per step (Lu et al. 2022, algorithm 2)."""
    previous: tuple[torch.Tensor, float] | None = None  # x0 and h of the step before
    for sigma, lower in _pairs(sigmas):
        x0 = denoise(x, x.new_tensor(sigma))
        if lower == 0:
            return x0  # the step to 0 is infinite in log sigma, so only first order is possible
        h = log(sigma / lower)
        estimate = x0 if previous is None else x0 + (x0 - previous[0]) * h / (2 * previous[1])
        x = (lower / sigma) * x - expm1(-h) * estimate
        previous = x0, h
    return x


SAMPLERS: dict[str, Sampler] = {
    "ancestral": ancestral,
    "ddim": euler,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def sampler(name: str) -> Sampler:
    """Look up a sampler by name.

    Raises
    ------
    ValueError
        If no sampler has this name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"no sampler is called {name!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _pairs(sigmas: torch.Tensor) -> list[tuple[float, float]]:
    """Each sigma with the next, as Python floats, so that coefficients are double for any dtype of x."""
    values = sigmas.tolist()
    if len(values) < 2 or values[-1] != 0 or any(high <= low for high, low in pairwise(values)):
        raise ValueError("a schedule of sigmas must decrease strictly and end in 0")
    return list(pairwise(values))


def _to_zero(sigmas: torch.Tensor) -> torch.Tensor:
    """Append a 0: (steps,) -> (steps + 1,)."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _at_least_one(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
