"""`Batch`, the input of every method, and `Requirements`, the tiles that a method needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from stsr.geometry.grid import LR_UM, bins_per_lr

PLAIN_DENSITY = 1e-3
"""Smallest mean count of a gene per low-resolution pixel: keeps logarithms and ratios of absent genes finite."""


@dataclass(frozen=True)
class Requirements:
    """The tiles that a method needs.

    Parameters
    ----------
    panel
        Ordered names of the genes that the method was built for.
    bin_um
        Size of the bins that it predicts, um.
    image_um
        Size of the image pixels that it reads, um. The image tile covers the same area as the bins.
    tile_lr, overlap_lr
        Side of a prediction tile, and minimum overlap of neighbouring tiles, in low-resolution pixels.
    lr_um
        Pitch of the low-resolution raster, um.
    features
        Number of channels of the patch features that it reads beside the image; 0 for none.
    features_um
        Size of their pixels, um; the low-resolution pixel is a multiple of it.
    """

    panel: tuple[str, ...]
    bin_um: float = 10.0
    image_um: float = 10.0
    tile_lr: int = 8
    overlap_lr: int = 3
    lr_um: float = LR_UM
    features: int = 0
    features_um: float = 20.0

    @property
    def per_lr(self) -> int:
        """Bins along a low-resolution pixel."""
        return bins_per_lr(self.bin_um, self.lr_um)

    @property
    def image_per_lr(self) -> int:
        """Image pixels along a low-resolution pixel."""
        return bins_per_lr(self.image_um, self.lr_um)

    @property
    def features_per_lr(self) -> int:
        """Pixels of patch features along a low-resolution pixel."""
        return bins_per_lr(self.features_um, self.lr_um)


@dataclass(frozen=True)
class SpotTargets:
    """What the spots of tiles measured, where counts per bin are not known: b tiles with up to s spots.

    Attributes
    ----------
    over
        (b, s, H, W) fraction of each bin that each spot covers; 0 where a tile has fewer spots.
    counts
        (b, g, s) measured counts.
    weight
        (b, s) weight in the loss; 0 where a tile has fewer spots.
    """

    over: torch.Tensor
    counts: torch.Tensor
    weight: torch.Tensor

    def sums(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (b, g, H, W) added up over spots: (b, g, s)."""
        return torch.einsum("bgyx,bsyx->bgs", maps, self.over)

    def to(self, device: torch.device | str) -> SpotTargets:
        """Copy to a device."""
        return SpotTargets(
            *(part.to(device, non_blocking=True) for part in (self.over, self.counts, self.weight))
        )

    def of_tiles(self, chosen: slice) -> SpotTargets:
        """Select tiles."""
        return SpotTargets(self.over[chosen], self.counts[chosen], self.weight[chosen])

    def of_genes(self, chosen: torch.Tensor) -> SpotTargets:
        """Select genes by index (n,)."""
        return replace(self, counts=self.counts[:, chosen])


@dataclass(frozen=True)
class Batch:
    """Tiles with all modalities: b tiles, g genes, p panel genes.

    Attributes
    ----------
    image
        (b, 3, I, I) uint8, RGB.
    lr
        (b, g, h, w) float32, counts per low-resolution pixel; 0 where nothing was measured.
    lr_mask
        (b, 1, h, w) float32 in [0, 1]: fraction of each pixel that is covered by a spot.
    has_lr
        (b,) bool: whether the tile's section has spots.
    lr_mean
        (b, g) float32, mean count per measured low-resolution pixel of the section: each gene's scale on this
        platform. Where ``has_lr`` is false, the method's own reference replaces it.
    genes
        (g, p) float32, rows sum to at most 1: each gene as a mixture of panel genes; one-hot for a panel gene.
    names
        (g,) gene names; they also key the noise.
    hr
        (b, g, H, W) float32, counts per bin; None when predicting.
    measured
        (b, g) bool: whether the gene was measured in the tile's section. Where it was not, ``lr`` and ``hr`` are 0 and
        say nothing. None if every gene was measured.
    features
        (b, c, F, F) float32, patch features of the image; None if the method reads none.
    base
        (b, g, H, W) float32, counts per bin expected from the spots alone, such as kriged ones; None for the
        interpolation of ``lr``. Without effect in tiles without spots.
    divided
        (b,) side of the bins from which the counts of ``hr`` were divided by area, in bins; 0 for counts of
        transcripts. None for all 0.
    targets
        What spots measured, in training on sections without counts per bin.
    """

    image: torch.Tensor
    lr: torch.Tensor
    lr_mask: torch.Tensor
    has_lr: torch.Tensor
    lr_mean: torch.Tensor
    genes: torch.Tensor
    names: tuple[str, ...]
    hr: torch.Tensor | None = None
    measured: torch.Tensor | None = None
    features: torch.Tensor | None = None
    base: torch.Tensor | None = None
    divided: torch.Tensor | None = None
    targets: SpotTargets | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, torch.Tensor)
        }
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, targets=targets, **tensors)

    def without_lr(self, drop: torch.Tensor) -> Batch:
        """Hide the spots of some tiles: ``drop`` (b,) bool."""
        keep = (~drop).to(self.lr.dtype)[:, None, None, None]
        return replace(
            self,
            lr=self.lr * keep,
            lr_mask=self.lr_mask * keep,
            has_lr=self.has_lr & ~drop,
            base=None if self.base is None else self.base * keep,
        )

    def of_tiles(self, chosen: slice) -> Batch:
        """Select tiles."""
        return replace(
            self,
            image=self.image[chosen],
            lr=self.lr[chosen],
            lr_mask=self.lr_mask[chosen],
            has_lr=self.has_lr[chosen],
            lr_mean=self.lr_mean[chosen],
            hr=None if self.hr is None else self.hr[chosen],
            measured=None if self.measured is None else self.measured[chosen],
            features=None if self.features is None else self.features[chosen],
            base=None if self.base is None else self.base[chosen],
            divided=None if self.divided is None else self.divided[chosen],
            targets=None if self.targets is None else self.targets.of_tiles(chosen),
        )

    def of_genes(self, chosen: torch.Tensor) -> Batch:
        """Select genes by index (n,)."""
        return replace(
            self,
            lr=self.lr[:, chosen],
            lr_mean=self.lr_mean[:, chosen],
            genes=self.genes[chosen],
            names=tuple(self.names[index] for index in chosen.tolist()),
            hr=None if self.hr is None else self.hr[:, chosen],
            measured=None if self.measured is None else self.measured[:, chosen],
            base=None if self.base is None else self.base[:, chosen],
            targets=None if self.targets is None else self.targets.of_genes(chosen),
        )

    def known(self) -> torch.Tensor:
        """1 where a gene was measured in the tile's section, else 0: (b, g) float."""
        if self.measured is None:
            return self.lr.new_ones(self.lr.shape[:2])
        return self.measured.to(self.lr.dtype)

    def truth(self) -> torch.Tensor:
        """Counts per bin (b, g, H, W) of a training batch."""
        assert self.hr is not None, "a training batch has counts per bin"
        return self.hr

    def __len__(self) -> int:
        return len(self.image)


def lr_mean(lr: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean count (g,) of each gene per measured low-resolution pixel, from a raster (g, h, w) and mask (1, h, w)."""
    weight = float(mask.sum())
    if weight == 0:
        return np.zeros(len(lr), np.float32)
    return ((lr * mask).sum((1, 2)) / weight).astype(np.float32)


def cut(raster: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Cut a window (..., height, width) from a raster; 0 outside the raster."""
    out = np.zeros((*raster.shape[:-2], height, width), raster.dtype)
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, raster.shape[-2]), min(column + width, raster.shape[-1])
    if bottom > top and right > left:
        out[..., top - row : bottom - row, left - column : right - column] = raster[
            ..., top:bottom, left:right
        ]
    return out
