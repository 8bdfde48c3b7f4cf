"""Batch: what every method reads, and Requirements: what a method asks of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from stsr.geometry.grid import LR_UM, bins_per_lr

PLAIN_DENSITY = 1e-3
"""Least mean count of a gene per low-resolution pixel: keeps logarithms and ratios of absent genes finite."""


@dataclass(frozen=True)
class Requirements:
    """What a method needs; the loader obeys.

    Parameters
    ----------
    panel
        Ordered names of the genes that the method was made for.
    bin_um
        Size of the bins that it predicts, um.
    image_um
        Size of the image pixels that it reads, um; the image tile covers the same area as the bins.
    tile_lr, overlap_lr
        Side of a prediction tile and least overlap of neighbours, in low-resolution pixels.
    lr_um
        Pitch of the low-resolution raster, um.
    """

    panel: tuple[str, ...]
    bin_um: float = 10.0
    image_um: float = 10.0
    tile_lr: int = 8
    overlap_lr: int = 3
    lr_um: float = LR_UM

    @property
    def per_lr(self) -> int:
        """Bins along a low-resolution pixel."""
        return bins_per_lr(self.bin_um, self.lr_um)

    @property
    def image_per_lr(self) -> int:
        """Image pixels along a low-resolution pixel."""
        return bins_per_lr(self.image_um, self.lr_um)


@dataclass(frozen=True)
class Batch:
    """Tiles with all modalities. b tiles, g genes, p panel genes.

    Attributes
    ----------
    image
        (b, 3, I, I) uint8, RGB.
    lr
        (b, g, h, w) float32, counts per low-resolution pixel; zero where nothing was measured.
    lr_mask
        (b, 1, h, w) float32 in [0, 1]: part of each pixel that a spot speaks for.
    has_lr
        (b,) bool: whether the tile's section was measured at all.
    lr_mean
        (b, g) float32, the section's mean count per measured low-resolution pixel: the scale of each gene in this
        section, whatever its platform. Where has_lr is false, the method's own statistics stand in.
    genes
        (g, p) float32, rows sum to at most 1: each gene as a mixture of panel genes, one-hot inside the panel.
    names
        (g,) gene names: the keys of each gene's noise.
    hr
        (b, g, H, W) counts per bin, float32; None when predicting.
    """

    image: torch.Tensor
    lr: torch.Tensor
    lr_mask: torch.Tensor
    has_lr: torch.Tensor
    lr_mean: torch.Tensor
    genes: torch.Tensor
    names: tuple[str, ...]
    hr: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {
            k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)

    def without_lr(self, drop: torch.Tensor) -> Batch:
        """The batch with the spots of some tiles taken away: ``drop`` (b,) bool."""
        keep = (~drop).to(self.lr.dtype)[:, None, None, None]
        return replace(self, lr=self.lr * keep, lr_mask=self.lr_mask * keep, has_lr=self.has_lr & ~drop)

    def of_tiles(self, chosen: slice) -> Batch:
        """The batch of some of its tiles."""
        tensors = ("image", "lr", "lr_mask", "has_lr", "lr_mean", "hr")
        parts = {name: getattr(self, name) for name in tensors}
        return replace(self, **{name: None if part is None else part[chosen] for name, part in parts.items()})

    def of_genes(self, chosen: torch.Tensor) -> Batch:
        """The batch of some of its genes, by index (n,)."""
        return replace(
            self,
            lr=self.lr[:, chosen],
            lr_mean=self.lr_mean[:, chosen],
            genes=self.genes[chosen],
            names=tuple(self.names[index] for index in chosen.tolist()),
            hr=None if self.hr is None else self.hr[:, chosen],
        )

    def __len__(self) -> int:
        return len(self.image)


def lr_mean(lr: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean count of each gene (g,) per measured low-resolution pixel: raster (g, h, w), mask (1, h, w)."""
    weight = float(mask.sum())
    if weight == 0:
        return np.zeros(len(lr), np.float32)
    return ((lr * mask).sum((1, 2)) / weight).astype(np.float32)


def cut(raster: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """A window (..., height, width) of a raster, zero where it sticks out."""
    out = np.zeros((*raster.shape[:-2], height, width), raster.dtype)
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, raster.shape[-2]), min(column + width, raster.shape[-1])
    if bottom > top and right > left:
        out[..., top - row : bottom - row, left - column : right - column] = raster[
            ..., top:bottom, left:right
        ]
    return out
