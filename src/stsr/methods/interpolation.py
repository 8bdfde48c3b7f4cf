"""Baselines that interpolate the measured spots and ignore the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from stsr.diffusion.noise import TileNoise
from stsr.geometry.grid import raster_um
from stsr.methods.batch import Batch, Requirements
from stsr.methods.method import Method, interpolated


@dataclass(frozen=True)
class InterpolationConfig:
    """Settings of interpolation.

    Parameters
    ----------
    bin_um
        Size of bins, um.
    """

    bin_um: float = 10.0

    def requirements(self, panel: tuple[str, ...]) -> Requirements:
        """Tiles of these bins; the image is not read."""
        return Requirements(panel, bin_um=self.bin_um, image_um=self.bin_um, lr_um=raster_um(self.bin_um))


class Interpolation(Method):
    """Interpolation of the low-resolution raster; the caller enforces consistency with the spots."""

    Config = InterpolationConfig
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
