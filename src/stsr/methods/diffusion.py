"""What every diffusion method shares: its tiles, which noise levels it learns, how they are weighted, how it samples.

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
from stsr.methods.batch import Batch, Requirements
from stsr.methods.method import Method, random_normal
from stsr.methods.sampling import Sampling
from stsr.methods.target import Residual

SCHEDULES = ("edm", "ddpm")


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of diffusion, the same for each paper.

    Parameters
    ----------
    bin_um, image_um
        Size of bins and of the image pixels that are read, um; bins must be whole numbers of image pixels.
    tile_lr, overlap_lr
        Prediction tiles and their least overlap, low-resolution pixels.
    lr_dropout
        Probability, in training, that a tile loses its spots.
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

    bin_um: float = 10.0
    image_um: float = 10.0
    tile_lr: int = 8
    overlap_lr: int = 3
    lr_dropout: float = 0.15
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
        ratio = self.bin_um / self.image_um if self.image_um > 0 else 0
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
            raise ValueError(f"bin_um ({self.bin_um}) must be a whole number of image_um ({self.image_um})")
        if not 0 <= self.overlap_lr < self.tile_lr:
            raise ValueError(
                f"tiles of {self.tile_lr} low-resolution pixels cannot overlap by {self.overlap_lr}"
            )
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
        for name in ("lr_dropout", "mean_share", "condition_dropout"):
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

    def __init__(self, config: DiffusionConfig):
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


class DiffusionMethod(Method):
    """A method that denoises residuals to the interpolated spots (`Residual`).

    Parameters
    ----------
    config
        Settings; the method's defaults by default.
    panel
        Ordered gene names; at least one.
    reference
        As `Method`.

    Attributes
    ----------
    sampling
        How to walk from noise to a map when predicting; from the config, and free to be replaced.
    denoising
        The schedule.

    Raises
    ------
    ValueError
        If the panel is empty.
    """

    Config = DiffusionConfig
    samples = True

    def __init__(self, config: DiffusionConfig | None, panel: tuple[str, ...], reference=None):
        config = config or self.Config()
        super().__init__(config, panel, reference)
        if not panel:
            raise ValueError(f"{type(self).__name__} learns genes by their names, and the panel is empty")
        self.sampling = Sampling(config.sampler, config.steps, config.guidance)
        self.denoising = Denoising(config)

    @property
    def requirements(self) -> Requirements:
        """Tiles as the config has them."""
        c = self.config
        return Requirements(self.panel, c.bin_um, c.image_um, c.tile_lr, c.overlap_lr)

    @property
    def knows_mean(self) -> bool:
        """Whether training taught the denoiser what to make of nothing."""
        return self.config.mean_share > 0

    def residual(self, batch: Batch) -> Residual:
        """What the denoiser works on, of this batch."""
        return Residual.of(batch, self.scale(batch), self.requirements.per_lr, self.config.smooth_bins)

    def chance(self, probability: float, count: int, generator: torch.Generator) -> torch.Tensor:
        """Bool (count,), true with this probability in training mode and never otherwise."""
        chance = torch.rand(count, generator=generator, device=generator.device)
        return chance < (probability if self.training else 0.0)
