"""C3-Diff: cross-modal cross-content contrastive diffusion of one gene at a time, guided by H&E.

The inputs of the denoiser are the noisy map of one gene, the image, the low-resolution map and the gene's code; genes
are folded into the batch. Four encoders compute the modality and content features of the image (M_h, C_h, once per
tile) and of the gene's low-resolution map (M_y, C_y, once per tile and gene). Their maps condition the denoiser. Their
unit vectors enter the losses of `stsr.methods.contrastive`, with one gene drawn per tile, so that every negative is
another tile. A training step denoises a few genes of each tile, which share the image features.

It works in pixel space, on counts as standardised residuals (`stsr.methods.target`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stsr.diffusion.noise import TileNoise
from stsr.diffusion.precond import Denoise
from stsr.methods.batch import Batch
from stsr.methods.contrastive import (
    content_loss,
    falling,
    hypersphere_noise,
    imputation_weights,
    impute,
    inter_loss,
    modal_loss,
)
from stsr.methods.diffusion import DiffusionConfig, DiffusionMethod
from stsr.methods.method import channels_last, check_not_negative, check_positive
from stsr.methods.target import Residual
from stsr.nn.blocks import ScalarEmbedding
from stsr.nn.encoders import ContextEncoder, GeneEmbedding, RasterEncoder
from stsr.nn.unet import UNet

IMPUTATIONS = ("dynamic", "mean", "zero", "none")

LEAST_TEMPERATURE = 0.01  # as in CLIP (Radford et al. 2021, section 2.5): below it, training is unstable


@dataclass(frozen=True)
class C3DiffConfig(DiffusionConfig):
    """Settings of `C3Diff`, in addition to those of `DiffusionConfig`.

    The paper's ablations (table 3) are settings: ``hypersphere_noise = 0`` for no augmentation, a weight of 0 for no
    such term, and ``imputation`` for tiles without spots.

    Parameters
    ----------
    vector_channels
        Length of an encoder's unit vector.
    genes_per_tile
        Genes drawn per training step; they share the image features.
    modal_weight, content_weight, inter_weight
        Weights of the contrastive terms. Content and inter are as in the released code, which never uses modal.
    temperature
        Initial value of tau, which is learned (as in the released code).
    hypersphere_noise
        Standard deviation of the noise of equation 1; 0 for none (as in the released code).
    imputation
        Low-resolution features of tiles without spots: ``dynamic`` (the paper's), ``mean`` (arithmetic mean), ``zero``
        (zero padding), or ``none`` (the encoded empty raster, that is, dropout alone).
    imputation_alpha, imputation_beta, imputation_temperature
        Strength for modality and content features at the start of training, from where it falls to 0; tau1.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    vector_channels: int = 64
    genes_per_tile: int = 4
    modal_weight: float = 0.05
    content_weight: float = 0.05
    inter_weight: float = 0.03
    temperature: float = 0.07
    hypersphere_noise: float = 0.03
    imputation: str = "dynamic"
    imputation_alpha: float = 1.0
    imputation_beta: float = 1.0
    imputation_temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.imputation not in IMPUTATIONS:
            raise ValueError(f"imputation must be one of {', '.join(IMPUTATIONS)}, not {self.imputation!r}")
        check_positive(self, "temperature", "imputation_temperature", "genes_per_tile")
        check_not_negative(self, "modal_weight", "content_weight", "inter_weight")
        check_not_negative(self, "hypersphere_noise", "imputation_alpha", "imputation_beta")


@dataclass(frozen=True)
class ImageFeatures:
    """Image features of each tile: a map (b, c, H, W) for the denoiser, M_h and C_h (b, d) for the losses."""

    maps: torch.Tensor
    modality: torch.Tensor
    content: torch.Tensor


@dataclass(frozen=True)
class LrFeatures:
    """Low-resolution features of each gene: maps (b, g, f, h, w), and M_y and C_y (b, g, d)."""

    modality_maps: torch.Tensor
    content_maps: torch.Tensor
    modality: torch.Tensor
    content: torch.Tensor


class C3Diff(DiffusionMethod):
    """Diffusion of one gene's map at a time, conditioned on image, spots and the gene's code.

    Parameters are those of `DiffusionMethod`.
    """

    Config = C3DiffConfig
    config: C3DiffConfig

    def __init__(
        self,
        config: C3DiffConfig | None = None,
        panel: tuple[str, ...] = (),
        reference: np.ndarray | None = None,
    ):
        super().__init__(config, panel, reference)
        config = self.config
        channels, features, embedding = config.widths[0], config.feature_channels, config.embedding_channels
        inputs = self.encoder.out_channels

        def context_encoder() -> ContextEncoder:
            return ContextEncoder(inputs, features, config.vector_channels, config.image_widths)

        def lr_encoder() -> RasterEncoder:
            return RasterEncoder(2, features, config.vector_channels, embedding)

        self.image_modality, self.image_content = context_encoder(), context_encoder()
        self.lr_modality, self.lr_content = lr_encoder(), lr_encoder()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

        self.genes = GeneEmbedding(len(panel), config.gene_channels, embedding)
        self.level = ScalarEmbedding(embedding)
        self.null_steering = nn.Parameter(torch.zeros(embedding))
        self.null_condition = nn.Parameter(torch.zeros(channels, 1, 1))

        # Together these are one convolution over all inputs; separated, only `lift` runs at every step.
        self.lift = nn.Conv2d(1, channels, 3, padding=1)
        self.mix_image = nn.Conv2d(2 * features, channels, 1)
        self.mix_lr = nn.Conv2d(2 * features, channels, 1, bias=False)  # no bias: zero padding stays zero
        self.mix_base = nn.Conv2d(2, channels, 3, padding=1)
        self.unet = UNet(channels, 1, config.widths, embedding_channels=embedding)
        channels_last(self)

    @property
    def temperature(self) -> torch.Tensor:
        """Tau (), which is learned."""
        return self.log_temperature.exp().clamp_min(LEAST_TEMPERATURE)

    def condition(self, batch: Batch) -> ImageFeatures:
        """Encode the image, independently of genes."""
        image = self.encode(batch)  # (b, e, H, W)
        modality_maps, modality = self.image_modality(image)  # (b, f, H, W), (b, d)
        content_maps, content = self.image_content(image)
        maps = self.mix_image(torch.cat([modality_maps, content_maps], dim=1))  # (b, c, H, W)
        return ImageFeatures(maps, modality, content)

    def draw(
        self, batch: Batch, features: ImageFeatures, noise: TileNoise
    ) -> tuple[ImageFeatures, TileNoise]:
        """Pass on the image features and the noise, which is all that genes share."""
        return features, noise

    @torch.no_grad()
    def predict(
        self,
        batch: Batch,
        noise: TileNoise | None,
        features: ImageFeatures | None = None,
        drawn: tuple[ImageFeatures, TileNoise] | None = None,
    ) -> torch.Tensor:
        """Sample counts per bin (b, g, H, W) once; their mean over samples is the expectation."""
        assert noise is not None, "a sample needs noise"
        residual, conditional = self._conditioned(
            batch, self.condition(batch) if features is None else features
        )
        height, width = residual.base.shape[-2:]
        source = noise.source(batch.names, height, width, residual.base.device)

        def unconditional(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return self.denoise(x, sigma, self.null_condition, self.null_steering)

        x0 = self.sampling.walk(
            conditional,
            unconditional,
            lambda step: source(step).reshape(-1, 1, height, width),
            self.denoising.sigmas,
        )  # (b g, 1, H, W)
        return residual.decode(x0.reshape(residual.base.shape))

    @torch.no_grad()
    def mean(self, batch: Batch, features: ImageFeatures) -> torch.Tensor:
        """Expected counts (b, g, H, W), by one step of the denoiser."""
        residual, conditional = self._conditioned(batch, features)
        like = residual.base.flatten(0, 1)[:, None]  # (b g, 1, H, W)
        return residual.decode(self.denoising.expected(conditional, like).reshape(residual.base.shape))

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: tuple[ImageFeatures, TileNoise]) -> torch.Tensor:
        """Draw one sample; it does not depend on the mean."""
        features, noise = drawn
        return self.predict(batch, noise, features)

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute ``denoise``, ``modal``, ``content`` and ``inter``, unweighted, and their weighted sum ``loss``.

        Spots and conditions are dropped and hypersphere noise is added in training mode only.
        """
        config = self.config
        count = min(config.genes_per_tile, len(batch.names))
        order = torch.randperm(len(batch.names), generator=generator, device=generator.device)
        batch = batch.of_genes(order[:count].to(batch.lr.device))
        unmeasured = self.chance(config.lr_dropout, len(batch), generator)
        batch = batch.without_lr(unmeasured.to(batch.lr.device))
        features = self.condition(batch)
        steering = self.genes(batch.genes, self.scale(batch))  # (b, g, e)
        lr = self._encode_lr(batch, steering)
        residual = self.residual(batch)
        condition = self._condition_genes(batch, features, lr, residual.base, progress)  # (b, g, c, H, W)
        x0 = residual.encode(batch.truth())  # (b, g, H, W)
        genes = torch.randint(count, (len(batch),), generator=generator, device=generator.device)
        drawn = (torch.arange(len(batch)), genes.to(lr.modality.device))  # one gene per tile
        noise_sd = config.hypersphere_noise if self.training else 0.0
        lr_modality = hypersphere_noise(lr.modality[drawn], noise_sd, generator)  # (b, d)
        lr_content = hypersphere_noise(lr.content[drawn], noise_sd, generator)  # (b, d)
        terms = {
            "modal": modal_loss(features.modality, lr_modality, self.temperature, batch.has_lr),
            "content": content_loss(features.content, lr_content, self.temperature, batch.has_lr),
            "inter": inter_loss(features.modality, features.content, self.temperature),
            "denoise": self._denoising(x0, condition, steering, generator, batch.known()),
        }
        terms["loss"] = (
            terms["denoise"]
            + config.modal_weight * terms["modal"]
            + config.content_weight * terms["content"]
            + config.inter_weight * terms["inter"]
        )
        return terms

    def denoise(
        self, x: torch.Tensor, sigma: torch.Tensor, condition: torch.Tensor, steering: torch.Tensor
    ) -> torch.Tensor:
        """Estimate x0 from ``x = x0 + sigma noise``.

        Parameters
        ----------
        x
            (n, 1, H, W).
        sigma
            () or (n,).
        condition, steering
            (n, c, H, W) and (n, e), or broadcastable to them.

        Returns
        -------
        torch.Tensor
            (n, 1, H, W).
        """

        def network(scaled: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            hidden = self.lift(scaled) + condition  # (n, c, H, W)
            return self.unet(hidden, self.level(level) + steering)  # (n, 1, H, W)

        return self.denoising.preconditioning.denoised(network, x, sigma)

    def _conditioned(self, batch: Batch, features: ImageFeatures) -> tuple[Residual, Denoise]:
        """The denoiser of these tiles, with genes folded into the batch, and the residual that decodes its x0."""
        residual = self.residual(batch)
        steering = self.genes(batch.genes, self.scale(batch))  # (b, g, e)
        lr = self._encode_lr(batch, steering)
        condition = self._condition_genes(batch, features, lr, residual.base, progress=1.0)
        condition = condition.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b g, c, H, W)
        steering = steering.flatten(0, 1)  # (b g, e)
        return residual, lambda x, sigma: self.denoise(x, sigma, condition, steering)

    def _encode_lr(self, batch: Batch, steering: torch.Tensor) -> LrFeatures:
        """Compute M_y and C_y of each gene's low-resolution map."""
        relative = (batch.lr / self.scale(batch)[..., None, None]).log1p()  # (b, g, h, w)
        raster = torch.stack([relative, batch.lr_mask.expand_as(relative)], dim=2)  # (b, g, 2, h, w)
        shape = relative.shape[:2]
        raster, steering = raster.flatten(0, 1), steering.flatten(0, 1)  # (b g, 2, h, w), (b g, e)
        modality_maps, modality = self.lr_modality(raster, steering)  # (b g, f, h, w), (b g, d)
        content_maps, content = self.lr_content(raster, steering)
        parts = (modality_maps, content_maps, modality, content)
        return LrFeatures(*(part.unflatten(0, shape) for part in parts))

    def _condition_genes(
        self, batch: Batch, image: ImageFeatures, lr: LrFeatures, base: torch.Tensor, progress: float
    ) -> torch.Tensor:
        """Condition of the denoiser for each tile and gene: (b, g, c, H, W)."""
        config, per_lr = self.config, self.requirements.per_lr
        modality, content, present = lr.modality_maps, lr.content_maps, batch.has_lr
        if config.imputation != "none":
            alike = config.imputation == "dynamic"
            weights = imputation_weights(image.modality, present, config.imputation_temperature, alike)
            fade = 0.0 if config.imputation == "zero" else falling(1.0, progress)
            modality = impute(modality, weights, present, config.imputation_alpha * fade)
            content = impute(content, weights, present, config.imputation_beta * fade)
        mixed = self.mix_lr(torch.cat([modality, content], dim=2).flatten(0, 1))  # (b g, c, h, w)
        spots = F.interpolate(mixed, scale_factor=per_lr, mode="bilinear")  # (b g, c, H, W)
        relative = (base * per_lr**2 / self.scale(batch)[..., None, None]).log1p()  # (b, g, H, W)
        mask = F.interpolate(batch.lr_mask, scale_factor=per_lr, mode="nearest").expand_as(relative)
        fine = self.mix_base(torch.stack([relative, mask], dim=2).flatten(0, 1))  # (b g, c, H, W)
        return image.maps[:, None] + (spots + fine).unflatten(0, base.shape[:2])

    def _denoising(
        self,
        x0: torch.Tensor,
        condition: torch.Tensor,
        steering: torch.Tensor,
        generator: torch.Generator,
        known: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted squared error of x0 (b, g, H, W), of the genes that are known (b, g), at random sigmas: ()."""
        x0, condition, steering = x0.flatten(0, 1)[:, None], condition.flatten(0, 1), steering.flatten(0, 1)
        dropped = self.chance(self.config.condition_dropout, len(x0), generator).to(x0.device)  # (b g,)
        condition = torch.where(dropped[:, None, None, None], self.null_condition, condition)
        steering = torch.where(dropped[:, None], self.null_steering, steering)  # (b g, e)
        return self.denoising.error(
            lambda x, sigma: self.denoise(x, sigma, condition, steering), x0, generator, known.reshape(-1, 1)
        )
