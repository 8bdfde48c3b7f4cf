"""Networks: plain building blocks that know no diffusion."""

from stsr.nn.blocks import ConvBlock, ScalarEmbedding, fourier_features, group_norm
from stsr.nn.unet import UNet

__all__ = ["ConvBlock", "ScalarEmbedding", "UNet", "fourier_features", "group_norm"]
