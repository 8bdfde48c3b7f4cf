"""`Method`: the interface that regression and diffusion methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.errors import UsageError, did_you_mean
from stsr.methods.batch import PLAIN_DENSITY, Batch, Requirements

Module = TypeVar("Module", bound=nn.Module)


class Method(nn.Module, ABC):
    """Predict high-resolution counts.

    A subclass names its frozen dataclass of settings as ``Config`` and is built from ``(config, panel, reference)``.

    Parameters
    ----------
    config
        The method's settings; the defaults if None.
    panel
        Ordered gene names.
    reference
        (p,) mean counts per low-resolution pixel in the training sections: the scale of a gene where no spots were
        measured. Kept as a buffer, so the checkpoint stores it.
    """

    Config: ClassVar[type]
    learns: ClassVar[bool] = True
    """False for baselines without parameters, which need no training and no checkpoint."""
    samples: ClassVar[bool] = False
    """True if predictions depend on noise."""
    reference: torch.Tensor

    def __init__(self, config: Any = None, panel: tuple[str, ...] = (), reference: np.ndarray | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.panel = tuple(panel)
        values = np.ones(len(panel)) if reference is None else np.asarray(reference)
        self.register_buffer(
            "reference", torch.as_tensor(values, dtype=torch.float32).clamp_min(PLAIN_DENSITY)
        )

    @property
    def knows_mean(self) -> bool:
        """Whether `mean` gives the expected counts without sampling."""
        return False

    @property
    def requirements(self) -> Requirements:
        """The tiles that the method needs."""
        return Requirements(self.panel)

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute the terms of the loss; ``"loss"`` is their weighted sum.

        Parameters
        ----------
        batch
            Tiles with ``hr``, whose genes are the panel.
        progress
            0 at the start of training, 1 at its end.
        generator
            Source of all random numbers of the loss.
        """
        raise TypeError(f"{type(self).__name__} has no parameters to train")

    def finish(self, batches: Iterable[Batch]) -> None:
        """Calibrate once on validation tiles, after training and with the weights that are kept."""

    def condition(self, batch: Batch) -> Any:
        """Compute features that depend neither on the gene nor on noise; ``batch.genes`` is the panel.

        Called once per tile. The result is passed to `draw`, `predict` and `mean`.
        """
        return None

    def draw(self, batch: Batch, features: Any, noise: TileNoise) -> Any:
        """Draw what all genes of a sample share. Called once per tile and sample."""
        return None

    @abstractmethod
    def predict(
        self, batch: Batch, noise: TileNoise | None, features: Any = None, drawn: Any = None
    ) -> torch.Tensor:
        """Predict counts per bin (b, g, H, W) of the genes of ``batch``, inside or outside the panel.

        Parameters
        ----------
        noise
            Determined by (seed, gene, sample, position), independent of the tiling; not needed if ``drawn`` is given.
        features, drawn
            Results of `condition` and `draw` for these tiles; computed if not given.
        """

    def mean(self, batch: Batch, features: Any) -> torch.Tensor:
        """Expected counts (b, g, H, W) without sampling; only if `knows_mean`."""
        raise TypeError(f"{type(self).__name__} gives a mean only as the average of samples")

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: Any) -> torch.Tensor:
        """Turn the mean and the result of `draw` into one sample (b, g, H, W); only if `knows_mean`."""
        raise TypeError(f"{type(self).__name__} gives a mean only as the average of samples")

    def scale(self, batch: Batch) -> torch.Tensor:
        """Mean counts per low-resolution pixel (b, g): the section's own, or the reference for tiles without spots."""
        mixed = batch.genes @ self.reference  # (g,)
        return torch.where(batch.has_lr[:, None], batch.lr_mean, mixed).clamp_min(PLAIN_DENSITY)


def channels_last(module: Module) -> Module:
    """Store 4-d weights with channels last, which makes convolutions faster on CPUs and GPUs."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs


def random_normal(
    shape: Sequence[int], generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """Standard normal numbers, drawn on the generator's device and then moved."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def interpolated(batch: Batch, scale: torch.Tensor, per_lr: int, mode: str = "bilinear") -> torch.Tensor:
    """Interpolate the spots to counts per bin (b, g, H, W), without an image.

    Pixels without a spot take the mean of their neighbours, or the gene's ``scale`` (b, g) where none is near.
    """
    filled = fill_unmeasured(batch.lr, batch.lr_mask, scale)
    up = F.interpolate(filled, scale_factor=per_lr, mode=mode, align_corners=False)
    return up.clamp_min(0) / per_lr**2


def fill_unmeasured(lr: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fill gaps of a low-resolution raster (b, g, h, w) from neighbouring pixels, then from the scale (b, g)."""
    if bool((mask > 0).all()):
        return lr
    weight = (mask > 0).to(lr.dtype)
    filled, known = lr * weight, weight
    for _ in range(2):  # two pixels, 200 um: spots farther away carry little information
        total = F.avg_pool2d(filled * known, 3, 1, 1)
        count = F.avg_pool2d(known, 3, 1, 1)
        filled = torch.where(known > 0, filled, total / count.clamp_min(1e-6))
        known = torch.maximum(known, (count > 0).to(lr.dtype))
    return torch.where(known > 0, filled, scale[:, :, None, None])


def configured(config_class: type, settings: dict[str, Any]) -> Any:
    """Build a config from a mapping; the class checks the values.

    Raises
    ------
    UsageError
        For an unknown key, naming the nearest known one, or an invalid value.
    """
    known = {field.name: field for field in fields(config_class)}
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known, f"known are: {', '.join(known)}.")
            raise UsageError(f"{key!r} is not a setting of this method; {hint}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are above 0; NaN is not."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")


def check_not_negative(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are at least 0; NaN is not."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} cannot be negative, but is {getattr(config, name)}")


def check_probability(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are probabilities below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is a probability below 1, not {getattr(config, name)}")


def config_dict(config: Any) -> dict[str, Any]:
    """A config as plain values for checkpoints and logs."""
    return asdict(config)
