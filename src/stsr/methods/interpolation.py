"""Baselines without an image: the measured spots, interpolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from stsr.methods.method import Method, interpolated


@dataclass(frozen=True)
class InterpolationConfig:
    """Nothing to set."""


class Interpolation(Method):
    """Interpolates the low-resolution raster; consistency is the caller's."""

    Config = InterpolationConfig
    learns = False
    mode: ClassVar[str]

    def __init__(
        self, config: InterpolationConfig | None = None, panel: tuple[str, ...] = (), reference=None
    ):
        super().__init__(config or InterpolationConfig(), panel, reference)

    def predict(self, batch, noise, features=None, drawn=None) -> torch.Tensor:
        """Interpolated counts per bin (b, g, H, W)."""
        return interpolated(batch, self.scale(batch), self.requirements.per_lr, self.mode)


class Bilinear(Interpolation):
    """Straight lines between low-resolution pixels."""

    mode = "bilinear"


class Bicubic(Interpolation):
    """Cubic interpolation (a = -0.75), cut off at zero."""

    mode = "bicubic"
