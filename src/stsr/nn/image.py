"""The image encoder that all methods share: from pixels of the H&E to feature maps per bin."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from stsr.nn.blocks import ConvBlock, group_norm

_FEWEST_CHANNELS = 8  # of a stage; fewer cost as much time
_LARGEST_PADDING = 16  # bins, searched for a padding that keeps pixels and bins aligned


class ImageEncoder(nn.Module):
    """Encode an image as feature maps on the raster of the bins.

    Every stage halves the raster by a convolution of 4 x 4 pixels, which overlap, and refines it by a residual block.
    Channels double from stage to stage up to ``channels``. What remains between the last stage and the bins (a factor
    of 1.25 for pixels of 2 um and bins of 10 um) is interpolated. If pixels are as large as bins, the maps are the
    image itself. Patch features from another encoder are standardised pixel by pixel, because their channels differ in
    size by orders of magnitude, mixed down to ``channels`` and appended; features of 0, as outside tissue, stay 0.

    Parameters
    ----------
    pixels_per_bin
        Image pixels along a bin, at least 1.
    channels
        Channels of the feature maps at the bins.
    features
        Channels of patch features from another encoder; 0 for none.

    Attributes
    ----------
    out_channels
        Channels of the result.

    Raises
    ------
    ValueError
        If a pixel is larger than a bin, or no whole number of pixels fits a few bins.
    """

    def __init__(self, pixels_per_bin: float, channels: int = 48, features: int = 0):
        super().__init__()
        if pixels_per_bin < 1 - 1e-6:
            raise ValueError(f"image pixels must not be larger than bins: {pixels_per_bin:g} pixels per bin")
        stages = int(math.log2(pixels_per_bin) + 1e-6)
        widths = [max(_FEWEST_CHANNELS, channels // 2**left) for left in reversed(range(stages))]
        self.pixels_per_bin = pixels_per_bin
        self.step = _aligned_bins(pixels_per_bin, 2**stages)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, width, 4, stride=2, padding=1), ConvBlock(width, width))
            for before, width in zip([3, *widths], widths, strict=False)
        )
        self.last = nn.Sequential(group_norm(widths[-1]), nn.SiLU()) if widths else nn.Identity()
        self.mix = nn.Conv2d(features, channels, 1) if features else None
        self.out_channels = (widths[-1] if widths else 3) + (channels if features else 0)

    def forward(self, picture: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """Encode tiles.

        Parameters
        ----------
        picture
            (b, 3, I, I), of order one, I a whole number of bins.
        features
            (b, c, F, F) patch features of the same area, if the encoder was built for them.

        Returns
        -------
        torch.Tensor
            (b, out_channels, H, W).

        Raises
        ------
        ValueError
            If patch features are missing.
        """
        height, width = (round(side / self.pixels_per_bin) for side in picture.shape[-2:])
        maps = self._maps(picture, height, width)
        if self.mix is None:
            return maps
        if features is None:
            raise ValueError("this encoder needs patch features")
        standard = F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)
        mixed = F.interpolate(self.mix(standard), size=(height, width), mode="bilinear")  # (b, c, H, W)
        return torch.cat([maps, mixed], 1)

    def _maps(self, picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if not self.stages:
            return picture
        # Padded to where pixels of every stage and bins have common borders, so that nothing moves.
        below, right = -height % self.step, -width % self.step
        if below or right:
            px = self.pixels_per_bin
            picture = F.pad(picture, (0, round(right * px), 0, round(below * px)), mode="replicate")
        maps = picture
        for stage in self.stages:
            maps = stage(maps)  # (b, wider, half, half)
        maps = self.last(maps)
        size = (height + below, width + right)
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return maps[..., :height, :width]


def _aligned_bins(pixels_per_bin: float, stride: int) -> int:
    """Smallest number of bins that is a whole number of strides of pixels."""
    for bins in range(1, _LARGEST_PADDING + 1):
        strides = bins * pixels_per_bin / stride
        if abs(strides - round(strides)) < 1e-6:
            return bins
    raise ValueError(
        f"{pixels_per_bin:g} image pixels per bin do not line up; choose image_um = 0.5, 1, 2, 4 or 10"
    )
