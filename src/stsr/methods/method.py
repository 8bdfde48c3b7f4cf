"""The face of a method, regression or diffusion: callers cannot tell which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.errors import UsageError, did_you_mean
from stsr.methods.batch import PLAIN_DENSITY, Batch, Requirements


class Method(nn.Module, ABC):
    """Predicts high-resolution counts.

    Subclasses have a frozen dataclass ``Config`` beside them and take ``(config, panel, reference)``.

    Parameters
    ----------
    config
        The method's own settings.
    panel
        Ordered gene names.
    reference
        (p,) mean counts per low-resolution pixel in the training sections: what a gene's scale is where nothing was
        measured. A buffer, so it travels in the checkpoint.
    """

    Config: ClassVar[type]
    learns: ClassVar[bool] = True
    """False for baselines without parameters: they need no training and no checkpoint."""
    samples: ClassVar[bool] = False
    """True where two draws of noise give two predictions."""
    knows_mean: ClassVar[bool] = False
    """True where `mean` gives the expected counts without sampling."""

    def __init__(self, config: Any, panel: tuple[str, ...], reference: np.ndarray | None = None):
        super().__init__()
        self.config = config
        self.panel = tuple(panel)
        values = np.ones(len(panel)) if reference is None else np.asarray(reference)
        self.register_buffer(
            "reference", torch.as_tensor(values, dtype=torch.float32).clamp_min(PLAIN_DENSITY)
        )

    @property
    def requirements(self) -> Requirements:
        """What the method needs of a batch."""
        return Requirements(self.panel)

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Terms of the loss, ``"loss"`` their weighted sum.

        Parameters
        ----------
        batch
            Tiles with ``hr``; its genes are the panel.
        progress
            0 at the start of training, 1 at its end.
        generator
            Where all of the loss's randomness comes from.
        """
        raise TypeError(f"{type(self).__name__} has nothing to learn")

    def finish(self, batches: Iterable[Batch]) -> None:
        """Whatever is set once, after training, on validation tiles; called on the weights that are kept."""

    def condition(self, batch: Batch) -> Any:
        """Everything about a tile that depends neither on a gene nor on noise; ``batch.genes`` is the panel.

        Called once per tile; what it returns is handed back to `draw` and `predict`.
        """
        return None

    def draw(self, batch: Batch, features: Any, noise: TileNoise) -> Any:
        """What a sample has in common for all genes; called once per tile and sample."""
        return None

    @abstractmethod
    def predict(
        self, batch: Batch, noise: TileNoise, features: Any = None, drawn: Any = None
    ) -> torch.Tensor:
        """Expected counts per bin (b, g, H, W) for the genes of ``batch``, a part of the panel or others.

        Parameters
        ----------
        noise
            The same (seed, gene, sample, place) gives the same noise, however the work is cut.
        features, drawn
            What `condition` and `draw` gave for these tiles.
        """

    def mean(self, batch: Batch, features: Any) -> torch.Tensor:
        """Expected counts (b, g, H, W) without sampling, of methods that know them."""
        raise TypeError(f"{type(self).__name__} has no mean but that of its samples")

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: Any) -> torch.Tensor:
        """One sample (b, g, H, W) from the mean and what was drawn, of methods that know their mean."""
        raise TypeError(f"{type(self).__name__} has no mean to vary")

    def scale(self, batch: Batch) -> torch.Tensor:
        """Mean counts per low-resolution pixel (b, g) of the batch's genes: the section's own, else the reference."""
        mixed = batch.genes @ self.reference  # (g,)
        return torch.where(batch.has_lr[:, None], batch.lr_mean, mixed).clamp_min(PLAIN_DENSITY)


def random_normal(shape, generator: torch.Generator, device) -> torch.Tensor:
    """Standard normals of a shape, drawn where the generator lives."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def interpolated(batch: Batch, scale: torch.Tensor, per_lr: int, mode: str = "bilinear") -> torch.Tensor:
    """Counts per bin (b, g, H, W) between the spots: what an analyst would draw without an image.

    Pixels that no spot speaks for take the mean of their surroundings, and the gene's ``scale`` (b, g) where nothing
    is near.
    """
    filled = fill_unmeasured(batch.lr, batch.lr_mask, scale)
    up = F.interpolate(filled, scale_factor=per_lr, mode=mode, align_corners=False)
    return up.clamp_min(0) / per_lr**2


def fill_unmeasured(lr: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Low-resolution raster (b, g, h, w) with its gaps filled from their neighbours, then from the scale (b, g)."""
    if bool((mask > 0).all()):
        return lr
    weight = (mask > 0).to(lr.dtype)
    filled, known = lr * weight, weight
    for _ in range(2):  # two pixels outwards: 200 um, as far as a spot tells anything
        total = F.avg_pool2d(filled * known, 3, 1, 1)
        count = F.avg_pool2d(known, 3, 1, 1)
        filled = torch.where(known > 0, filled, total / count.clamp_min(1e-6))
        known = torch.maximum(known, (count > 0).to(lr.dtype))
    return torch.where(known > 0, filled, scale[:, :, None, None])


def configured(config_class: type, settings: dict[str, Any]) -> Any:
    """A config from a mapping, its values checked by the class itself.

    Raises
    ------
    UsageError
        For an unknown key, naming the nearest known one.
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


def config_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, for checkpoints and logs."""
    return asdict(config)
