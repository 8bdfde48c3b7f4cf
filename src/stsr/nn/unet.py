"""A small U-Net for maps of any size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from stsr.nn.blocks import ConvBlock, group_norm, zeroed


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) of residual blocks, small and fast on a CPU, for maps of any size.

    It is fastest with weights and input in the channels-last memory format (`stsr.nn.blocks.channels_last`).

    Parameters
    ----------
    in_channels, out_channels
        Channels of the maps.
    widths
        Channels of each level; each level has half the height and width of the one before.
    blocks
        Residual blocks per level, in the encoder and again in the decoder.
    embedding_channels
        Size of an embedding that scales and shifts inside every block; 0 for none.
    dropout
        Dropout probability, inside every block.
    zero_out
        Initialise the output to 0 everywhere.

    Raises
    ------
    ValueError
        If there is no level or no block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int] = (32, 64, 96),
        blocks: int = 1,
        embedding_channels: int = 0,
        dropout: float = 0.0,
        zero_out: bool = True,
    ):
        super().__init__()
        if len(widths) < 1 or blocks < 1:
            raise ValueError(
                f"a U-Net needs at least one level and one block, not {len(widths)} and {blocks}"
            )
        self.embedding_channels = embedding_channels
        self.factor = 2 ** (len(widths) - 1)

        def level(first: int, width: int) -> nn.ModuleList:
            sizes = [first] + [width] * blocks
            return nn.ModuleList(ConvBlock(a, width, embedding_channels, dropout) for a in sizes[:-1])

        steps = list(pairwise(widths))  # (finer width, coarser width)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.encoders = nn.ModuleList(level(width, width) for width in widths)
        self.downs = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in steps)
        # 1 x 1 convolutions commute with nearest-neighbour upsampling; before it they cost a quarter
        self.ups = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in steps)
        self.decoders = nn.ModuleList(level(2 * fine, fine) for fine, _ in steps)
        head = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.head = nn.Sequential(group_norm(widths[0]), nn.SiLU(), zeroed(head) if zero_out else head)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """Run the network.

        Parameters
        ----------
        x
            (b, in_channels, H, W), any H and W.
        embedding
            (b, embedding_channels), if the network was built with one.

        Returns
        -------
        torch.Tensor
            (b, out_channels, H, W).

        Raises
        ------
        ValueError
            If the embedding is missing, or given to a network built without.
        """
        if (embedding is not None) != (self.embedding_channels > 0):
            raise ValueError(f"this U-Net was built with embedding_channels={self.embedding_channels}")
        height, width = x.shape[-2:]
        right, below = -width % self.factor, -height % self.factor
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")

        x = self.stem(x)  # (b, widths[0], H', W')
        skips = []
        for encoder, down in zip(self.encoders, [*self.downs, None], strict=True):
            for block in encoder.children():
                x = block(x, embedding)
            if down is not None:
                skips.append(x)
                x = down(x)  # (b, next width, half, half)
        for decoder, up in zip(reversed(self.decoders), reversed(self.ups), strict=True):
            x = F.interpolate(up(x), scale_factor=2, mode="nearest")  # (b, finer width, double, double)
            x = torch.cat([x, skips.pop()], dim=1)
            for block in decoder.children():
                x = block(x, embedding)
        return self.head(x)[..., :height, :width]
