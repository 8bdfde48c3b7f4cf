"""Denoisers from networks: EDM preconditioning, DDPM in sigma space, guidance.

A denoiser is ``denoise(x, sigma) -> x0`` with ``x = x0 + sigma * noise`` of any shape (b, ...) and a positive sigma,
scalar () or one value per sample (b,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Preconditioning:
    """Scale the input and output of a network to unit variance at every sigma.

    Karras et al., "Elucidating the design space of diffusion-based generative models", NeurIPS 2022, table 1.

    Parameters
    ----------
    sigma_data
        Standard deviation of the data, in its own (normalised) units.

    Raises
    ------
    ValueError
        If sigma_data is not positive.
    """

    sigma_data: float = 0.5  # the paper's value, for images in [-1, 1]

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, not {self.sigma_data}")

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the noisy input in the estimate; same shape as sigma."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        """Scale of the network's output; same shape as sigma."""
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        """Scale of the network's input; same shape as sigma."""
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """Noise level as an input of the network, about -1.5 to 1.1; same shape as sigma."""
        return sigma.log() / 4

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error of x0 that gives the network's own error weight 1; same shape as sigma."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def denoised(
        self,
        network: Callable[..., torch.Tensor],
        x: torch.Tensor,
        sigma: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Estimate x0 (equation 7).

        Parameters
        ----------
        network
            ``network(x, c_noise, *args, **kwargs)`` with x (b, ...) of unit variance and c_noise (b,).
        x
            (b, ...) noisy data.
        sigma
            () or (b,), positive.

        Returns
        -------
        torch.Tensor
            Like x.
        """
        sigma = _per_sample(sigma, x)  # (b,)
        wide = _like(sigma, x)  # (b, 1, ...)
        output = network(self.c_in(wide) * x, self.c_noise(sigma), *args, **kwargs)
        return self.c_skip(wide) * x + self.c_out(wide) * output


def lognormal_sigmas(
    count: int, generator: torch.Generator, p_mean: float = -1.2, p_std: float = 1.2
) -> torch.Tensor:
    """Draw training sigmas: ``ln(sigma) ~ N(p_mean, p_std^2)`` (Karras et al. 2022, table 1, with its values).

    Returns
    -------
    torch.Tensor
        (count,) float32, on the generator's device.
    """
    return (p_mean + p_std * torch.randn(count, generator=generator, device=generator.device)).exp()


def linear_betas(beta_start: float, beta_end: float, steps: int, power: float = 1.0) -> torch.Tensor:
    """Linearly increasing variances beta_1 ... beta_T of DDPM (Ho et al. 2020, section 4).

    Parameters
    ----------
    beta_start, beta_end
        beta_1 and beta_T.
    steps
        T.
    power
        2 for linearly increasing square roots of beta, also called "linear" in latent-diffusion code.

    Returns
    -------
    torch.Tensor
        (T,) float64.

    Raises
    ------
    ValueError
        If not 0 < beta_start <= beta_end < 1.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start <= beta_end < 1, not {beta_start} and {beta_end}")
    roots = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), steps, dtype=torch.float64)
    return roots**power


def beta_sigmas(betas: torch.Tensor) -> torch.Tensor:
    """Sigma of each DDPM step: ``sigma_t = sqrt((1 - abar_t) / abar_t)``.

    DDPM's ``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise`` is ``sqrt(abar_t)`` times ``x0 + sigma_t noise``.

    Parameters
    ----------
    betas
        (T,) beta_1 ... beta_T.

    Returns
    -------
    torch.Tensor
        (T,) float64, ascending.
    """
    abar = (1 - betas.double()).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def uniform_sigmas(count: int, sigmas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw training sigmas as DDPM does, with t uniform over the steps (Ho et al. 2020, algorithm 1).

    Parameters
    ----------
    count
        Number of sigmas.
    sigmas
        (T,) from `beta_sigmas`.

    Returns
    -------
    torch.Tensor
        (count,) float32, on the generator's device.
    """
    steps = torch.randint(len(sigmas), (count,), generator=generator, device=generator.device)
    return sigmas.float().to(generator.device)[steps]


def step_of_sigma(sigma: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Continuous DDPM step t of a sigma, from 0: linear in ln(sigma) between the entries of the table.

    Parameters
    ----------
    sigma
        Any shape; clamped to the range of the table.
    sigmas
        (T,) ascending, from `beta_sigmas`; T at least 2.

    Returns
    -------
    torch.Tensor
        In [0, T - 1], like sigma.
    """
    table = (
        sigmas.log().to(sigma.dtype).to(sigma.device)
    )  # in this order, because not every device has float64
    place = sigma.log().clamp(table[0], table[-1])
    above = torch.searchsorted(table, place).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return above - 1 + (place - low) / (high - low)


def epsilon_denoiser(network: Denoise, sigmas: torch.Tensor) -> Denoise:
    """Make a denoiser of a network that predicts noise, ``x0 = x - sigma eps(x_t, t)`` (Ho et al. 2020, eq. 15).

    Parameters
    ----------
    network
        ``network(x_t, t) -> eps`` with x_t (b, ...) in DDPM's scale and t (b,) from 0, of x_t's dtype. At sigmas of the
        table, t is a whole number up to rounding; a network with a table of embeddings must round it.
    sigmas
        (T,) from `beta_sigmas`.
    """

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = _per_sample(sigma, x)  # (b,)
        wide = _like(sigma, x)  # (b, 1, ...)
        scaled = x / (1 + wide**2).sqrt()  # sqrt(abar) = 1 / sqrt(1 + sigma^2)
        return x - wide * network(scaled, step_of_sigma(sigma, sigmas))

    return denoise


def guided(denoise_conditional: Denoise, denoise_unconditional: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance on x0: ``w D(x | c) + (1 - w) D(x)``.

    Because x0 is linear in epsilon at a given x, this equals guidance on epsilon, ``w e(x | c) + (1 - w) e(x)``.
    The w of Ho and Salimans (2021, equation 6) is this w minus 1.

    Parameters
    ----------
    denoise_conditional, denoise_unconditional
        Denoisers with and without the condition.
    weight
        1 for the conditional and 0 for the unconditional denoiser; the other one is then never evaluated.
    """
    if weight == 1:
        return denoise_conditional
    if weight == 0:
        return denoise_unconditional

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.lerp(denoise_unconditional(x, sigma), denoise_conditional(x, sigma), weight)

    return denoise


def _per_sample(sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """Expand sigma to (b,), with the device and dtype of x."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[0])


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape (b,) to (b, 1, ...) with as many axes as x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
