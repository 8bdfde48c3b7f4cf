"""Diff-ST: joint cross-modal diffusion of a whole panel, guided by H&E (Wang et al. 2024, arXiv 2404.12973).

Genes are channels of one noisy map. Image and spots are encoded as features that modulate each other and are split into
shared and unique ones (equations in `stsr.methods.crossmodal`); these condition the denoiser. Each gene is mapped to
and from channels by its row of one table, so that the order of genes does not matter. A gene outside the panel is a
mixture of panel genes.

It works on counts as standardised residuals from the interpolated spots (`stsr.methods.target`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.diffusion.precond import Denoise
from stsr.methods.batch import Batch
from stsr.methods.crossmodal import (
    CellAttention,
    GeneGraph,
    Modulation,
    PatchEncoder,
    curriculum,
    disentangling_loss,
    entropy,
    intensity,
    patches,
)
from stsr.methods.diffusion import DiffusionConfig, DiffusionMethod
from stsr.methods.method import channels_last, check_not_negative, check_positive
from stsr.nn.blocks import ConvBlock, ScalarEmbedding
from stsr.nn.unet import UNet


@dataclass(frozen=True)
class DiffSTConfig(DiffusionConfig):
    """Settings of `DiffST`, in addition to those of `DiffusionConfig`.

    The paper's ablations (table 2) are settings: ``cell_attention``, ``curriculum`` and ``modulation`` false,
    ``disentangling_weight`` and ``graph_weight`` 0.

    Parameters
    ----------
    patch_lr
        Side of an image patch, low-resolution pixels (160 um in the paper).
    attention_channels
        Channels of queries, keys and values (128 in the paper).
    cell_attention, curriculum, modulation
        Whether tissue features attend to image patches, whether only patches of high entropy are used, and whether
        the modalities modulate each other.
    entropy_threshold
        Entropy (0..1) above which a patch is used at the end of training; it rises from 0.
    region
        Side of the region of the modulation, bins; odd.
    disentangling_weight
        Weight of the disentangling loss.
    graph_weight
        a of equation 4.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    patch_lr: int = 1
    widths: tuple[int, ...] = (32, 48, 64)
    attention_channels: int = 64
    cell_attention: bool = True
    curriculum: bool = True
    modulation: bool = True
    entropy_threshold: float = 0.5
    region: int = 3
    disentangling_weight: float = 0.05
    graph_weight: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_lr < 1 or self.tile_lr % self.patch_lr:
            raise ValueError(f"tile_lr ({self.tile_lr}) must be a whole number of patch_lr ({self.patch_lr})")
        if self.region < 1 or self.region % 2 == 0:
            raise ValueError(f"region must be odd, not {self.region}")
        for name in ("entropy_threshold", "graph_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        check_not_negative(self, "disentangling_weight")
        check_positive(self, "attention_channels")


@dataclass(frozen=True)
class Features:
    """Features of a tile that condition the denoiser."""

    condition: torch.Tensor
    """(b, c, H, W), for the denoiser."""
    shared: tuple[torch.Tensor, torch.Tensor]
    """(S_y, S_h), (b, f, H, W) each, for the disentangling loss."""
    unique: tuple[torch.Tensor, torch.Tensor]
    """(U_y, U_h), likewise."""
    expected: torch.Tensor | None = None
    """(b, p, H, W) expected x0 of the panel, without sampling; None if the model does not know it."""


class DiffST(DiffusionMethod):
    """Diffusion of all genes of the panel as channels of one map, conditioned on image and spots.

    Parameters are those of `DiffusionMethod`.
    """

    Config = DiffSTConfig
    config: DiffSTConfig

    def __init__(
        self,
        config: DiffSTConfig | None = None,
        panel: tuple[str, ...] = (),
        reference: np.ndarray | None = None,
    ):
        super().__init__(config, panel, reference)
        config = self.config
        features, genes, channels = config.feature_channels, config.gene_channels, config.widths[0]
        inputs = self.encoder.out_channels

        self.table = nn.Parameter(torch.randn(len(panel), genes))
        self.tissue = UNet(inputs, features, config.image_widths, zero_out=False)
        if config.cell_attention:
            side = config.patch_lr * self.requirements.per_lr
            self.cells = PatchEncoder(inputs, config.attention_channels, side)
            self.attention = CellAttention(features, config.attention_channels, config.attention_channels)
        self.refine = nn.Sequential(nn.Conv2d(genes + 1, features, 1), ConvBlock(features, features))
        self.refined = nn.Conv2d(features, genes, 1)
        self.graph = GeneGraph(config.graph_weight)
        self.spots = nn.Sequential(nn.Conv2d(genes + 1, features, 1), ConvBlock(features, features))
        if config.modulation:
            self.modulate_image, self.modulate_spots = Modulation(config.region), Modulation(config.region)
        self.shared_image, self.unique_image = (nn.Conv2d(features, features, 1) for _ in range(2))
        self.shared_spots, self.unique_spots = (nn.Conv2d(features, features, 1) for _ in range(2))
        self.mix = nn.Conv2d(4 * features, channels, 1)

        self.null_condition = nn.Parameter(torch.zeros(channels, 1, 1))
        self.level = ScalarEmbedding(config.embedding_channels)
        self.enter = nn.Linear(genes, channels, bias=False)
        self.unet = UNet(channels, genes, config.widths, embedding_channels=config.embedding_channels)
        channels_last(self)

    # ------------------------------------------------------------------------------------------- conditioning

    def condition(self, batch: Batch) -> Features:
        """Compute features of tiles whose genes are the panel, and the expected x0."""
        features = self.features(batch, progress=1.0)
        if not self.knows_mean:
            return features
        like = features.condition.new_zeros(len(batch), len(self.panel), *features.condition.shape[-2:])
        expected = self.denoising.expected(self._conditional(features), like)
        return Features(features.condition, features.shared, features.unique, expected)

    def features(self, batch: Batch, progress: float) -> Features:
        """Compute features without the expected x0; training progress selects the image patches."""
        image = self._see(batch, progress)  # A_h (b, f, H, W)
        spots = self._read_spots(batch)  # A_y (b, f, h, w)
        spots = F.interpolate(spots, size=image.shape[-2:], mode="bilinear")  # (b, f, H, W)
        spots = spots.contiguous(memory_format=torch.channels_last)
        if self.config.modulation:
            spots, image = self.modulate_spots(spots, image), self.modulate_image(image, spots)
        shared = self.shared_spots(spots), self.shared_image(image)
        unique = self.unique_spots(spots), self.unique_image(image)
        return Features(self.mix(torch.cat([*shared, *unique], dim=1)), shared, unique)

    def kept_patches(self, batch: Batch, progress: float) -> torch.Tensor:
        """Select the image patches that tissue features can attend to: (b, n) bool."""
        cut = patches(batch.image, self._across(batch))
        threshold = self.config.entropy_threshold if self.config.curriculum else 0.0
        return curriculum(entropy(cut), threshold, progress)

    def _across(self, batch: Batch) -> int:
        """Patches along a side of the tile; one per low-resolution pixel if ``patch_lr`` does not divide the tile."""
        side = batch.lr.shape[-1]
        return side // self.config.patch_lr if side % self.config.patch_lr == 0 else side

    def _see(self, batch: Batch, progress: float) -> torch.Tensor:
        """A_h: tissue features with attention over image patches."""
        image = self.encode(batch)  # (b, e, H, W)
        tissue = self.tissue(image)  # (b, f, H, W)
        if not self.config.cell_attention:
            return tissue
        cells = self.cells(patches(image, self._across(batch)))  # (b, n, c)
        return self.attention(tissue, cells, self.kept_patches(batch, progress))

    def _read_spots(self, batch: Batch) -> torch.Tensor:
        """A_y: the low-resolution maps of all genes, refined by co-expressed genes."""
        measured = (batch.lr_mask > 0).to(batch.lr.dtype)
        relative = (batch.lr / self.scale(batch)[..., None, None]).log1p() * measured  # (b, p, h, w)
        relative = relative * self._informative(batch)
        hidden = self.refine(torch.cat([self._of_genes(relative), batch.lr_mask], 1))  # (b, f, h, w)
        nodes = relative + self._to_genes(self.refined(hidden))  # (b, p, h, w)
        nodes = self.graph(nodes, intensity(relative.flatten(2)))
        return self.spots(torch.cat([self._of_genes(nodes), batch.lr_mask], 1))

    def _informative(self, batch: Batch) -> torch.Tensor:
        """Weight (b, p, 1, 1) of a gene's spots: at one count per spot, half of the variance is counting noise."""
        scale = self.scale(batch)[..., None, None]
        return scale / (scale + 1)

    def _of_genes(self, maps: torch.Tensor) -> torch.Tensor:
        """Map genes (b, p, ...) to channels (b, k, ...); each gene adds its row of the table."""
        return torch.einsum("bpyx,pk->bkyx", maps, self.table) / len(self.panel) ** 0.5

    def _to_genes(self, maps: torch.Tensor) -> torch.Tensor:
        """Map channels (b, k, ...) to genes (b, p, ...)."""
        return torch.einsum("bkyx,pk->bpyx", maps, self.table) / self.config.gene_channels**0.5

    # --------------------------------------------------------------------------------------------------- diffusion

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Estimate x0 (b, p, H, W) from ``x = x0 + sigma noise``; sigma is () or (b,), condition (b, c, H, W)."""

        def network(scaled: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            entered = self.enter(self._of_genes(scaled).movedim(1, -1)).movedim(-1, 1)  # (b, c, H, W)
            return self._to_genes(self.unet(entered + condition, self.level(level)))  # (b, p, H, W)

        return self.denoising.preconditioning.denoised(network, x, sigma)

    def _conditional(self, features: Features) -> Denoise:
        return lambda x, sigma: self.denoise(x, sigma, features.condition)

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute ``denoise`` and ``disentangle``, unweighted, and their weighted sum ``loss``.

        Spots and conditions are dropped in training mode only.
        """
        config = self.config
        batch = batch.without_lr(self.chance(config.lr_dropout, len(batch), generator).to(batch.lr.device))
        features = self.features(batch, progress)
        dropped = self.chance(config.condition_dropout, len(batch), generator).to(batch.lr.device)
        condition = torch.where(dropped[:, None, None, None], self.null_condition, features.condition)
        known = batch.known()
        # Genes are channels of one map: those without counts enter as their expectation, which is 0.
        x0 = self.residual(batch).encode(batch.truth()) * known[..., None, None]  # (b, p, H, W)
        terms = {
            "denoise": self.denoising.error(
                lambda x, sigma: self.denoise(x, sigma, condition), x0, generator, known
            ),
            "disentangle": disentangling_loss(features.shared, features.unique, batch.has_lr),
        }
        terms["loss"] = terms["denoise"] + config.disentangling_weight * terms["disentangle"]
        return terms

    @torch.no_grad()
    def draw(self, batch: Batch, features: Features, noise: TileNoise) -> torch.Tensor:
        """Sample x0 (b, p, H, W) of all genes jointly; the genes of ``batch`` are the panel."""
        height, width = features.condition.shape[-2:]
        return self.sampling.walk(
            self._conditional(features),
            lambda x, sigma: self.denoise(x, sigma, self.null_condition),
            noise.source(self.panel, height, width, features.condition.device),
            self.denoising.sigmas,
        )

    @torch.no_grad()
    def predict(
        self,
        batch: Batch,
        noise: TileNoise | None,
        features: Features | None = None,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample counts per bin (b, g, H, W) once.

        Without ``features``, the genes of the batch must be the panel.
        """
        features = self.condition(batch) if features is None else features
        if drawn is None:
            assert noise is not None, "a sample needs noise"
            drawn = self.draw(batch, features, noise)
        return self._decode(batch, drawn)

    @torch.no_grad()
    def mean(self, batch: Batch, features: Features) -> torch.Tensor:
        """Expected counts (b, g, H, W), by one step of the denoiser."""
        assert features.expected is not None, "this model gives a mean only as the average of samples"
        return self._decode(batch, features.expected)

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Draw one sample; it does not depend on the mean."""
        return self._decode(batch, drawn)

    def _decode(self, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
        """Convert x0 of the panel (b, p, H, W) to counts of the batch's genes."""
        return self.residual(batch).decode(torch.einsum("gp,bpyx->bgyx", batch.genes, x0))
