"""Parts that the diffusion methods of both papers share: settings, training noise levels, loss weights, sampling.

There are two schedules: ``edm`` (Karras et al. 2022: log-normal sigmas, few steps) and ``ddpm`` (Ho et al. 2020: T
steps, uniform t, error of the noise). Both work in sigma space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
from stsr.diffusion.precond import Denoise
from stsr.methods.batch import Batch
from stsr.methods.method import (
    Method,
    TileConfig,
    check_not_negative,
    check_positive,
    check_probability,
    random_normal,
)
from stsr.methods.sampling import Sampling
from stsr.methods.target import Residual

SCHEDULES = ("edm", "ddpm")


@dataclass(frozen=True)
class DiffusionConfig(TileConfig):
    """Settings that both diffusion papers share, in addition to those of `TileConfig`.

    Parameters
    ----------
    widths, image_widths
        Channels of the levels of the denoiser's U-Net, and of those of the U-Nets that give the image context.
    feature_channels
        Channels of an encoder's feature map.
    gene_channels
        Length of a gene's code.
    embedding_channels
        Length of the embedding that conditions the denoiser's U-Net.
    lr_dropout
        Probability, in training, that the spots of a tile are hidden.
    smooth_bins
        Standard deviation of the Gaussian that smooths the target, bins; 0 for none.
    sigma_data
        Standard deviation of x0.
    schedule
        ``edm`` or ``ddpm``.
    p_mean, p_std
        ``edm`` trains with ``ln(sigma) ~ N(p_mean, p_std^2)``.
    sigma_min, sigma_max
        Range of ``edm``'s schedule when sampling.
    beta_start, beta_end, beta_steps, beta_power
        Variances of ``ddpm``, see `stsr.diffusion.linear_betas`. The defaults are those of C3-Diff's released code,
        whose "linear" is a power of 2.
    mean_share
        Fraction of training maps that are replaced by zeros, the limit of infinite noise. The denoiser then learns to
        predict the expected map in one step, and samples are only needed for the spread. With 0, as in the papers,
        the mean is the average of samples.
    condition_dropout
        Probability, in training, that the condition of a map is dropped, for guidance.
    sampler, steps, guidance
        See `Sampling`.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    widths: tuple[int, ...] = (24, 36, 48)
    image_widths: tuple[int, ...] = (24, 32, 48)
    feature_channels: int = 32
    gene_channels: int = 32
    embedding_channels: int = 128
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        if self.beta_steps < 2:
            raise ValueError(f"beta_steps must be at least 2, not {self.beta_steps}")
        check_positive(self, "sigma_data", "p_std", "beta_power", "feature_channels", "gene_channels")
        check_not_negative(self, "smooth_bins")
        check_probability(self, "lr_dropout", "mean_share", "condition_dropout")
        linear_betas(self.beta_start, self.beta_end, self.beta_steps, self.beta_power)  # checks the betas
        Sampling(self.sampler, self.steps, self.guidance)  # checks the sampling settings


class Denoising:
    """Train and evaluate any denoiser ``denoise(x, sigma) -> x0``, x (n, c, H, W), on a schedule.

    Parameters
    ----------
    config
        Settings of the schedule.
    """

    def __init__(self, config: DiffusionConfig):
        self.config = config
        self.preconditioning = Preconditioning(config.sigma_data)
        betas = linear_betas(config.beta_start, config.beta_end, config.beta_steps, config.beta_power)
        self._table = beta_sigmas(betas)

    @property
    def sigma_max(self) -> float:
        """Largest sigma, from which sampling starts."""
        return self.config.sigma_max if self.config.schedule == "edm" else float(self._table[-1])

    def sigmas(self, steps: int) -> torch.Tensor:
        """Sampling schedule (steps + 1,)."""
        c = self.config
        if c.schedule == "edm":
            return karras_sigmas(steps, c.sigma_min, c.sigma_max)
        return ddpm_sigmas(min(steps, c.beta_steps), c.beta_start, c.beta_end, c.beta_steps, c.beta_power)

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error of x0, shaped like sigma. DDPM uses the error of the noise, error / sigma."""
        return self.preconditioning.loss_weight(sigma) if self.config.schedule == "edm" else sigma**-2

    def error(
        self,
        denoise: Denoise,
        x0: torch.Tensor,
        generator: torch.Generator,
        known: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted squared error () of x0 (n, c, H, W) at random sigmas; ``mean_share`` of the inputs are zeros.

        Maps where ``known`` (n, c) is 0 were not measured and do not count.
        """
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
        error = (
            ((estimate - x0).square().mean((2, 3)) * known).sum(1)
            / known.mean().clamp_min(1e-6)
            / x0.shape[1]
        )
        # For zeros, the estimate is the network's output alone: the weight is that of EDM at infinite sigma.
        weight = torch.where(blank, config.sigma_data**-2, self.loss_weight(sigma))
        return (weight * error).mean()

    def expected(self, denoise: Denoise, like: torch.Tensor) -> torch.Tensor:
        """Expected x0, shaped like ``like`` (n, c, H, W): the denoised map of zeros."""
        return denoise(torch.zeros_like(like), like.new_tensor(self.sigma_max))


class DiffusionMethod(Method):
    """A method that denoises residuals from the interpolated spots (`Residual`).

    Parameters
    ----------
    config, reference
        As in `Method`.
    panel
        Ordered gene names; at least one.

    Attributes
    ----------
    sampling
        Sampling settings, from the config; may be replaced when predicting.
    denoising
        Schedule and loss.

    Raises
    ------
    ValueError
        If the panel is empty.
    """

    Config = DiffusionConfig
    config: DiffusionConfig
    samples = True

    def __init__(
        self, config: DiffusionConfig | None, panel: tuple[str, ...], reference: np.ndarray | None = None
    ):
        super().__init__(config, panel, reference)
        if not panel:
            raise ValueError(f"the panel is empty; {type(self).__name__} needs at least one gene")
        self.sampling = Sampling(self.config.sampler, self.config.steps, self.config.guidance)
        self.denoising = Denoising(self.config)
        self.encoder = self.config.image_encoder()

    @property
    def knows_mean(self) -> bool:
        """Whether the denoiser was trained to predict the expected map in one step."""
        return self.config.mean_share > 0

    def residual(self, batch: Batch) -> Residual:
        """Base and spread that convert this batch's counts to x0 and back."""
        return Residual.of(batch, self.scale(batch), self.requirements.per_lr, self.config.smooth_bins)

    def chance(self, probability: float, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw booleans (count,), true with this probability in training mode and never otherwise."""
        chance = torch.rand(count, generator=generator, device=generator.device)
        return chance < (probability if self.training else 0.0)
