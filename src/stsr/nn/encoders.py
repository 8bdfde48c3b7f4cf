"""Encoders of feature maps and low-resolution rasters (maps and unit vectors) and of genes (embeddings)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from stsr.nn.blocks import ConvBlock, ScalarEmbedding
from stsr.nn.unet import UNet


class Projection(nn.Module):
    """Head that turns a feature map into one unit vector: mean and standard deviation, two layers, normalisation.

    Group norms leave the means of all maps nearly equal: on real tiles, a head of means alone did not separate them
    within 25 steps, while one with standard deviations did.

    Parameters
    ----------
    in_channels
        Channels of the map.
    vector_channels
        Length of the vector.
    """

    def __init__(self, in_channels: int, vector_channels: int):
        super().__init__()
        self.mix = nn.Sequential(
            nn.Linear(2 * in_channels, vector_channels),
            nn.SiLU(),
            nn.Linear(vector_channels, vector_channels),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, H, W) -> (b, vector_channels) float32, of length 1."""
        mean, variance = maps.mean((-2, -1)), maps.var((-2, -1), correction=0)  # (b, in_channels) each
        spread = (variance + 1e-5).sqrt()  # the gradient of the root is infinite at 0, where a map is flat
        vector = self.mix(torch.cat([mean, spread], dim=1))  # (b, vector_channels)
        return F.normalize(vector.float(), dim=-1)


class ContextEncoder(nn.Module):
    """Encode feature maps with context by a U-Net, and as a unit vector.

    Parameters
    ----------
    in_channels, channels
        Channels of the given and of the new feature maps.
    vector_channels
        Length of the unit vector.
    widths
        Channels of the levels of the U-Net.
    """

    def __init__(self, in_channels: int, channels: int, vector_channels: int, widths: Sequence[int]):
        super().__init__()
        self.context = UNet(in_channels, channels, widths, zero_out=False)
        self.project = Projection(channels, vector_channels)

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, in_channels, H, W) -> (b, channels, H, W) and (b, vector_channels)."""
        maps = self.context(maps)
        return maps, self.project(maps)


class RasterEncoder(nn.Module):
    """Encode a small raster as a feature map of the same size and as a unit vector, given an embedding.

    Parameters
    ----------
    in_channels
        Channels of the raster.
    channels
        Channels of the feature map.
    vector_channels
        Length of the unit vector.
    embedding_channels
        Size of the embedding that scales and shifts inside every block.
    blocks
        Residual blocks; each extends the receptive field by two pixels.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        vector_channels: int,
        embedding_channels: int,
        blocks: int = 2,
    ):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(channels, channels, embedding_channels) for _ in range(blocks))
        self.project = Projection(channels, vector_channels)

    def forward(self, raster: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, in_channels, h, w), (b, embedding_channels) -> (b, channels, h, w) and (b, vector_channels)."""
        maps = self.stem(raster)  # (b, channels, h, w)
        for block in self.blocks:
            maps = block(maps, embedding)
        return maps, self.project(maps)


class GeneEmbedding(nn.Module):
    """Embed a gene by a learned code and by its abundance.

    Parameters
    ----------
    genes
        Number of genes with a code.
    code_channels
        Length of a code.
    embedding_channels
        Size of the embedding, even.
    """

    def __init__(self, genes: int, code_channels: int, embedding_channels: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(genes, code_channels))
        self.code = nn.Linear(code_channels, embedding_channels)
        self.abundance = ScalarEmbedding(embedding_channels)

    def forward(self, mixtures: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Embed genes that are mixtures of genes with a code.

        Parameters
        ----------
        mixtures
            (g, genes); one-hot for a gene with a code.
        scale
            (b, g) mean counts of each gene; positive.

        Returns
        -------
        torch.Tensor
            (b, g, embedding_channels).
        """
        code = self.code(mixtures @ self.table)  # (g, embedding_channels)
        abundance = self.abundance(scale.log().flatten() / 4)  # (b g, ...); divided by 4 to be of order one
        return code + abundance.unflatten(0, scale.shape)
