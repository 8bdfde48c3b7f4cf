"""What every diffusion method shares: which noise levels it learns, how they are weighted, how it samples.

Two schedules: ``edm`` (Karras et al. 2022: log-normal sigmas, few steps) and ``ddpm`` (Ho et al. 2020: T steps, t
uniform, the error of the noise), both of them in the engine's sigma space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stsr.diffusion import (
    Preconditioning,
    beta_sigmas,
    ddpm_sigmas,
    karras_sigmas,
    linear_betas,
    lognormal_sigmas,
    uniform_sigmas,
)
from stsr.methods.method import random_normal
from stsr.methods.sampling import Sampling

SCHEDULES = ("edm", "ddpm")


@dataclass(frozen=True)
class DenoisingConfig:
    """Settings of diffusion, the same for each paper.

    Parameters
    ----------
    smooth_bins
        Standard deviation of the Gaussian that smooths the target, bins; 0 for none.
    sigma_data
        Standard deviation of x0.
    schedule
        ``edm`` or ``ddpm``.
    p_mean, p_std
        ``edm`` learns ``ln(sigma) ~ N(p_mean, p_std^2)``.
    sigma_min, sigma_max
        Ends of ``edm``'s schedule when sampling.
    beta_start, beta_end, beta_steps, beta_power
        ``ddpm``'s variances, see `stsr.diffusion.linear_betas`. (C3-Diff's released code; its "linear" is power 2.)
    mean_share
        Part of the training maps that start from nothing, the limit of infinite noise. What the denoiser makes of
        nothing is the expected map: it is then known in one step, and samples are for the spread alone. 0, as in
        the papers, leaves the mean to be taken over samples.
    condition_dropout
        Probability, in training, that a map loses its whole condition, for guidance.
    sampler, steps, guidance
        See `Sampling`.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    smooth_bins: float = 1.0
    sigma_data: float = 0.9
    schedule: str = "edm"
    p_mean: float = 0.0
    p_std: float = 1.4
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_steps: int = 1000
    beta_power: float = 2.0
    mean_share: float = 0.5
    condition_dropout: float = 0.1
    sampler: str = "dpmpp_2m"
    steps: int = 8
    guidance: float = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if self.beta_steps < 2:
            raise ValueError(f"beta_steps must be at least 2, not {self.beta_steps}")
        for name in ("sigma_data", "p_std", "beta_power"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not self.smooth_bins >= 0:
            raise ValueError(f"smooth_bins cannot be negative, as {self.smooth_bins} is")
        for name in ("mean_share", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a probability below 1, not {getattr(self, name)}")
        linear_betas(
            self.beta_start, self.beta_end, self.beta_steps, self.beta_power
        )  # raises for what is no schedule
        Sampling(self.sampler, self.steps, self.guidance)  # raises for what cannot be sampled


class Denoising:
    """A schedule at work, on any denoiser ``denoise(x, sigma) -> x0`` with x (n, c, H, W).

    Parameters
    ----------
    config
        Its settings.
    """

    def __init__(self, config: DenoisingConfig):
        self.config = config
        self.preconditioning = Preconditioning(config.sigma_data)
        betas = linear_betas(config.beta_start, config.beta_end, config.beta_steps, config.beta_power)
        self._table = beta_sigmas(betas)

    @property
    def sigma_max(self) -> float:
        """Where sampling starts."""
        return self.config.sigma_max if self.config.schedule == "edm" else float(self._table[-1])

    def sigmas(self, steps: int) -> torch.Tensor:
        """The schedule of so many steps (steps + 1,)."""
        c = self.config
        if c.schedule == "edm":
            return karras_sigmas(steps, c.sigma_min, c.sigma_max)
        return ddpm_sigmas(min(steps, c.beta_steps), c.beta_start, c.beta_end, c.beta_steps, c.beta_power)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of x0's squared error, shaped like sigma; DDPM's error is that of the noise, (x0 - x0') / sigma."""
        return self.preconditioning.loss_weight(sigma) if self.config.schedule == "edm" else sigma**-2

    def error(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x0: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Weighted squared error () of x0 (n, c, H, W) at random noise levels; ``mean_share`` of them at none."""
        config, count = self.config, len(x0)
        if config.schedule == "edm":
            sigma = lognormal_sigmas(count, generator, config.p_mean, config.p_std)
        else:
            sigma = uniform_sigmas(count, self._table, generator)
        noise = random_normal(x0.shape, generator, x0.device)
        blank = torch.rand(count, generator=generator, device=generator.device) < config.mean_share
        sigma, blank = sigma.to(x0), blank.to(x0.device)
        wide = sigma[:, None, None, None]
        noisy = torch.where(blank[:, None, None, None], 0, x0 + wide * noise)
        estimate = denoise(noisy, torch.where(blank, self.sigma_max, sigma))
        error = (estimate - x0).square().mean((1, 2, 3))  # (n,)
        # a blank map's estimate is all the network's: weighed as where EDM's network has all to say
        weight = torch.where(blank, config.sigma_data**-2, self.loss_weight(sigma))
        return (weight * error).mean()

    def expected(self, denoise: Callable, like: torch.Tensor) -> torch.Tensor:
        """The expectation of x0, shaped like ``like`` (n, c, H, W): what the denoiser makes of nothing."""
        return denoise(torch.zeros_like(like), like.new_tensor(self.sigma_max))
