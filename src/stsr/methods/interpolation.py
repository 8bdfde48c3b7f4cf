"""Baselines that interpolate the measured spots and ignore the image."""

from __future__ import annotations

from typing import ClassVar

import torch

from stsr.diffusion.noise import TileNoise
from stsr.methods.batch import Batch
from stsr.methods.method import BinConfig, Method, interpolated


class Interpolation(Method):
    """Interpolation of the low-resolution raster; the caller enforces consistency with the spots."""

    Config = BinConfig
    learns = False
    mode: ClassVar[str]

    def predict(
        self, batch: Batch, noise: TileNoise | None, features: None = None, drawn: None = None
    ) -> torch.Tensor:
        """Interpolated counts per bin (b, g, H, W)."""
        return interpolated(batch, self.scale(batch), self.requirements.per_lr, self.mode)


class Bilinear(Interpolation):
    """Linear interpolation between low-resolution pixels."""

    mode = "bilinear"


class Bicubic(Interpolation):
    """Cubic interpolation (a = -0.75), clipped at zero."""

    mode = "bicubic"


class Kriged(Bilinear):
    """Kriging of the log densities of spots (`stsr.spots.kriging`), which the caller gives as the base."""

    needs_kriging = True
