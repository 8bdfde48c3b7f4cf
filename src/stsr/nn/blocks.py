"""Embeddings and residual blocks."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

Layer = TypeVar("Layer", bound=nn.Module)


def frequencies(channels: int, lowest: float = 0.5, highest: float = 32.0) -> torch.Tensor:
    """Geometric frequencies for `fourier_features`: (channels / 2,) float32, radians per unit.

    The default range suits numbers of order one, such as training progress or a scaled logarithm: the lowest frequency
    covers the whole range, the highest resolves about a thirtieth of a unit.

    Raises
    ------
    ValueError
        If channels is not even and positive.
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"Fourier features come in pairs, so channels must be even, not {channels}")
    return torch.logspace(math.log10(lowest), math.log10(highest), channels // 2)


def fourier_features(x: torch.Tensor, radians: torch.Tensor) -> torch.Tensor:
    """Cosines and sines of a number (Vaswani et al. 2017, section 3.5, for numbers of order one).

    Parameters
    ----------
    x
        (...), of order one.
    radians
        (channels / 2,) from `frequencies`, of x's dtype.

    Returns
    -------
    torch.Tensor
        (..., channels) in [-1, 1].
    """
    angles = x[..., None] * radians  # (..., channels / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (..., channels)


class ScalarEmbedding(nn.Module):
    """Embed one number per sample, such as training progress, by Fourier features and two layers.

    Parameters
    ----------
    channels
        Size of the embedding, even.
    lowest, highest
        As in `frequencies`.
    """

    radians: torch.Tensor

    def __init__(self, channels: int, lowest: float = 0.5, highest: float = 32.0):
        super().__init__()
        # determined by the arguments, so checkpoints need not store it
        self.register_buffer("radians", frequencies(channels, lowest, highest), persistent=False)
        self.mix = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b,) -> (b, channels)."""
        return self.mix(fourier_features(x, self.radians))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018) with up to 8 groups of at least 4 channels, where there are that many."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels)


def zeroed(layer: Layer) -> Layer:
    """Set weights and biases of a layer to 0, so that it adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ConvBlock(nn.Module):
    """Residual block: twice GroupNorm, SiLU and a 3 x 3 convolution; an embedding may scale and shift in between.

    Parameters
    ----------
    in_channels, out_channels
        Channels of the maps.
    embedding_channels
        0 for a block without an embedding.
    dropout
        Dropout probability, before the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_channels: int = 0, dropout: float = 0.0
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(embedding_channels, 2 * out_channels) if embedding_channels else None
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """(b, in_channels, H, W), embedding (b, embedding_channels) -> (b, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (b, out_channels, H, W)
        h = self.norm2(h)
        if self.film is not None:
            film = self.film(embedding)[..., None, None]  # (b, 2 out_channels, 1, 1)
            scale, shift = film.chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)  # Perez et al. 2018, equation 2
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))
