"""Regression: a U-Net that predicts the expected counts of all genes. `corrdiff` builds on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.methods.batch import Batch, SpotTargets
from stsr.methods.method import Method, TileConfig, check_positive, check_probability, interpolated
from stsr.nn.blocks import ConvBlock
from stsr.nn.unet import UNet
from stsr.spread.dispersion import LENGTHS_UM, Dispersion
from stsr.spread.fitting import Moments, fit

_LEAST_COUNTS = 1e-6  # expected per spot; keeps the logarithm finite


@dataclass(frozen=True)
class RegressionConfig(TileConfig):
    """Settings of the regression, in addition to those of `TileConfig`.

    Parameters
    ----------
    widths
        Channels of the U-Net's levels.
    blocks
        Residual blocks per level.
    factors
        Number of maps of which every gene is a mixture. Expression of a panel has low rank, and few outputs overfit
        less.
    lr_channels
        Channels of the low-resolution encoder.
    dropout
        Dropout probability inside the blocks.
    lr_dropout
        Fraction of training tiles whose spots are hidden, so that sections without spots can be predicted.
    genes_per_step
        Genes drawn per training step. The loss is an unbiased estimate of the loss over all genes.
    views
        Orientations (1, 4 or 8) of a tile over which a prediction is averaged. Tissue has no preferred orientation,
        and the network's errors differ between views.
    """

    widths: tuple[int, ...] = (32, 64, 96)
    blocks: int = 1
    factors: int = 32
    lr_channels: int = 64
    dropout: float = 0.0
    lr_dropout: float = 0.15
    genes_per_step: int = 100
    views: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "lr_dropout")
        check_positive(self, "factors", "genes_per_step")
        if self.views not in (1, 4, 8):
            raise ValueError(f"views must be 1, 4 or 8, not {self.views}")


class UNetRegression(Method):
    """Expected counts as interpolated spots times exp(loadings x factors), fitted by Poisson likelihood.

    A U-Net turns the image and the panel's low-resolution raster into ``factors`` maps, and each gene has loadings on
    them. A gene outside the panel takes a mixture of the loadings of panel genes with similar spots.
    """

    Config = RegressionConfig
    config: RegressionConfig
    learns_from_spots = True
    added_buffers = ("dispersion_shared", "dispersion_own", "dispersion_genes")

    dispersion_shared: torch.Tensor
    """(k,) relative variance of what all genes share in each field of a `Dispersion`; 0 before `finish`."""
    dispersion_own: torch.Tensor
    """(k,) the same of a typical gene."""
    dispersion_genes: torch.Tensor
    """(p,) factor of each gene."""

    def __init__(self, config: RegressionConfig, panel: tuple[str, ...], reference: np.ndarray | None = None):
        super().__init__(config, panel, reference)
        genes = len(self.panel)
        self.lr_encoder = nn.Sequential(
            nn.Conv2d(genes + 1, config.lr_channels, 1),
            ConvBlock(config.lr_channels, config.lr_channels),
            ConvBlock(config.lr_channels, config.lr_channels),
        )
        self.encoder = config.image_encoder()
        inputs = self.encoder.out_channels + config.lr_channels
        self.trunk = UNet(inputs, config.factors, config.widths, config.blocks, dropout=config.dropout)
        self.loadings = nn.Parameter(torch.randn(genes, config.factors) / config.factors**0.5)
        self.offsets = nn.Parameter(torch.zeros(genes))
        # Weights of the interpolated spots, their neighbourhood and the section's mean in the base.
        self.base_logits = nn.Parameter(torch.log(torch.tensor([0.9, 0.08, 0.02])).repeat(genes, 1))

        self.register_buffer("dispersion_shared", torch.zeros(len(LENGTHS_UM)))
        self.register_buffer("dispersion_own", torch.zeros(len(LENGTHS_UM)))
        self.register_buffer("dispersion_genes", torch.ones(genes))

    def condition(self, batch: Batch) -> torch.Tensor:
        """Compute factor maps (b, factors, H, W), averaged over views when predicting."""
        if self.training or self.config.views == 1:
            return self._factors(batch)
        views = [self.oriented(batch, view) for view in range(self.config.views)]
        return sum(views[1:], start=views[0]) / self.config.views

    def _factors(self, batch: Batch) -> torch.Tensor:
        scale = self.scale(batch)[:, :, None, None]
        measured = (batch.lr_mask > 0).to(batch.lr.dtype)
        relative = torch.log1p(batch.lr / scale) * measured  # (b, p, h, w)
        spots = self.lr_encoder(torch.cat([relative, batch.lr_mask], 1))
        per_lr = self.requirements.per_lr
        spots = F.interpolate(
            spots, scale_factor=per_lr, mode="bilinear", align_corners=False
        )  # (b, c, H, W)
        return self.trunk(torch.cat([self.encode(batch), spots], 1)).float()

    def oriented(self, batch: Batch, view: int) -> torch.Tensor:
        """Factor maps from a tile rotated by ``view`` quarter turns (and mirrored from 4 on), rotated back."""

        def turned(values: torch.Tensor) -> torch.Tensor:
            values = values.flip(-1) if view >= 4 else values
            return torch.rot90(values, view % 4, (-2, -1))

        view_batch = replace(
            batch,
            image=turned(batch.image),
            lr=turned(batch.lr),
            lr_mask=turned(batch.lr_mask),
            features=None if batch.features is None else turned(batch.features),
        )
        back = torch.rot90(self._factors(view_batch), -(view % 4), (-2, -1))
        return back.flip(-1) if view >= 4 else back

    def log_rate(self, batch: Batch, factors: torch.Tensor) -> torch.Tensor:
        """Logarithm of the expected counts (b, g, H, W) of the batch's genes."""
        loadings = batch.genes @ self.loadings  # (g, factors)
        offsets = (batch.genes @ self.offsets)[None, :, None, None]
        change = torch.einsum("gk,bkyx->bgyx", loadings, factors) + offsets
        return torch.log(self.base(batch)) + change

    def base(self, batch: Batch) -> torch.Tensor:
        """Expected counts per bin (b, g, H, W) from the spots alone, positive."""
        per_lr = self.requirements.per_lr
        scale = self.scale(batch)
        inside = batch.genes.sum(1, keepdim=True).clamp_min(1e-6)
        between, around, overall = (batch.genes @ self.base_logits.softmax(1) / inside).T[
            :, None, :, None, None
        ]
        near = interpolated(batch, scale, per_lr)
        lr = torch.cat([batch.lr, batch.lr_mask], 1)
        far = F.avg_pool2d(lr, 5, 1, 2, count_include_pad=False)  # (b, g + 1, h, w)
        far = torch.where(far[:, -1:] > 0, far[:, :-1] / far[:, -1:].clamp_min(1e-6), scale[:, :, None, None])
        far = F.interpolate(far, scale_factor=per_lr, mode="bilinear", align_corners=False) / per_lr**2
        mean = scale[:, :, None, None] / per_lr**2
        return between * near + around * far + overall * mean

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute the Poisson negative log-likelihood per bin, summed over genes."""
        batch = self.hide_spots(batch, generator)
        factors = self.condition(batch)
        term = self.poisson(batch, factors, generator)
        return {"loss": term, "poisson": term.detach()}

    def hide_spots(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Hide the spots of randomly chosen tiles."""
        chance = torch.rand(len(batch), generator=generator, device=generator.device)
        return batch.without_lr((chance < self.config.lr_dropout).to(batch.lr.device))

    def poisson(self, batch: Batch, factors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss of randomly chosen genes, scaled to the whole panel."""
        genes = len(self.panel)
        order = torch.randperm(genes, generator=generator, device=generator.device)
        part = batch.of_genes(order[: self.config.genes_per_step].to(batch.lr.device))
        log_rate = self.log_rate(part, factors)
        if part.targets is not None:
            return poisson_of_spots(log_rate.exp(), part.targets, part.known()) * (genes / len(part.names))
        bins = log_rate.shape[0] * log_rate.shape[2] * log_rate.shape[3]
        known = part.known()[..., None, None]  # (b, g, 1, 1)
        total = (known * log_rate.exp()).sum() - (known * part.truth() * log_rate).sum()
        return total / bins * (genes / len(part.names))

    def predict(
        self, batch: Batch, noise: TileNoise | None, features: torch.Tensor | None = None, drawn: Any = None
    ) -> torch.Tensor:
        """Expected counts per bin (b, g, H, W)."""
        factors = self.condition(batch) if features is None else features
        return self.log_rate(batch, factors).exp()

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        """Fit the dispersion of counts around predictions on validation tiles."""
        moments = Moments(len(self.panel))
        for batch in batches:
            if batch.hr is None:
                continue  # spots show no errors below their own size
            mean = self.log_rate(batch, self.condition(batch)).exp().cpu().numpy()
            level = (self.scale(batch) / self.requirements.per_lr**2).cpu().numpy()
            truth, known = batch.truth().cpu().numpy(), batch.known().bool().cpu().numpy()
            divided = np.zeros(len(batch)) if batch.divided is None else batch.divided.cpu().numpy()
            for tile in range(len(batch)):
                moments.add(mean[tile], truth[tile], level[tile], known[tile], float(divided[tile]))
        found = fit(moments, self.panel, self.config.bin_um)
        if found is not None:
            self.set_dispersion(found)

    @property
    def dispersion(self) -> Dispersion | None:
        """The dispersion of counts around predictions; None if it was not fitted."""
        shared, own = self.dispersion_shared.tolist(), self.dispersion_own.tolist()
        if not sum(shared) + sum(own) > 0:
            return None
        genes = dict(zip(self.panel, self.dispersion_genes.tolist(), strict=True))
        return Dispersion(tuple(shared), tuple(own), genes, bin_um=self.config.bin_um)

    def set_dispersion(self, dispersion: Dispersion) -> None:
        """Take a fitted dispersion, or that of another model of the same bins; genes by name."""
        self.dispersion_shared.copy_(torch.tensor(dispersion.shared))
        self.dispersion_own.copy_(torch.tensor(dispersion.own))
        self.dispersion_genes.copy_(torch.from_numpy(dispersion.factors(self.panel)))


def poisson_of_spots(maps: torch.Tensor, targets: SpotTargets, known: torch.Tensor) -> torch.Tensor:
    """Weighted Poisson negative log-likelihood of spots, given maps (b, g, H, W); per bin, summed over genes.

    Parameters
    ----------
    known
        (b, g) 1 for genes that were measured, else 0.
    """
    rate = targets.sums(maps).clamp_min(_LEAST_COUNTS)  # (b, g, s)
    loss = (rate - targets.counts * rate.log()) * known[..., None] * targets.weight[:, None]
    bins = (targets.weight * targets.over.sum((2, 3))).sum()
    return loss.sum() / bins.clamp_min(1e-6)
