"""The equations of Diff-ST that join image, spots and genes, as functions of tensors and small modules.

Diff-ST: Wang et al. 2024, cross-modal diffusion modelling for super-resolved spatial transcriptomics, arXiv 2404.12973.
A_h and A_y are feature maps of the image and of the low-resolution maps, (b, c, H, W) on the same raster.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from stsr.nn.blocks import group_norm

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: grey as an eye sees it
_GREY_LEVELS = 32  # a patch of 100 um at 10 um per pixel has a hundred pixels to fill them


def patches(picture: torch.Tensor, across: int) -> torch.Tensor:
    """A picture (b, 3, I, I) as its ``across`` x ``across`` patches (b, n, 3, i, i), row by row.

    Raises
    ------
    ValueError
        If the picture cannot be cut so.
    """
    count, channels, height, width = picture.shape
    if height % across or width % across:
        raise ValueError(f"a picture of {height} x {width} pixels has no {across} x {across} whole patches")
    cut = picture.reshape(count, channels, across, height // across, across, width // across)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (b, n, 3, i, i)


def entropy(patch: torch.Tensor, levels: int = _GREY_LEVELS) -> torch.Tensor:
    """Shannon entropy of each patch's grey levels, as a part of the largest possible one.

    Parameters
    ----------
    patch
        (..., 3, i, i) in [0, 255].
    levels
        Grey levels told apart.

    Returns
    -------
    torch.Tensor
        (...) in [0, 1]: 0 for a plain patch, 1 where every level is as frequent as any other.
    """
    weights = torch.tensor(_LUMA, dtype=torch.float32, device=patch.device)
    # Autocast would give bfloat16, whose steps above 128 are a whole grey value, and scatter needs one type.
    with torch.autocast(patch.device.type, enabled=False):
        grey = torch.einsum("...cyx,c->...yx", patch.float(), weights).flatten(-2)  # (..., i i)
    level = (grey * (levels / 256)).long().clamp(0, levels - 1)
    counts = torch.zeros(*level.shape[:-1], levels, device=patch.device)
    counts.scatter_add_(-1, level, torch.ones_like(grey))
    part = counts / level.shape[-1]
    return -torch.xlogy(part, part).sum(-1) / torch.log(torch.tensor(float(levels), device=patch.device))


def curriculum(entropies: torch.Tensor, threshold: float, progress: float) -> torch.Tensor:
    """Which patches are used: those whose entropy is above a threshold that rises with progress.

    Parameters
    ----------
    entropies
        (b, n) from `entropy`.
    threshold
        At the end of training, and when predicting; it rises in a straight line from 0.
    progress
        0 at the start of training, 1 at its end.

    Returns
    -------
    torch.Tensor
        (b, n) bool; every sample keeps its richest patch at least, as attention over nothing is no number.
    """
    kept = entropies > threshold * min(max(progress, 0.0), 1.0)
    return kept | (entropies >= entropies.amax(-1, keepdim=True))


class CellAttention(nn.Module):
    """Cell-to-tissue cross-attention: queries from the tissue's features, keys and values from kept patches.

    Parameters
    ----------
    tissue_channels, cell_channels
        Channels of the tissue's map and of a patch's feature.
    channels
        Of queries, keys and values. (The paper's: 128.)
    """

    def __init__(self, tissue_channels: int, cell_channels: int, channels: int = 128):
        super().__init__()
        self.query = nn.Linear(tissue_channels, channels)
        self.key = nn.Linear(cell_channels, channels)
        self.value = nn.Linear(cell_channels, channels)
        self.out = nn.Linear(channels, tissue_channels)

    def forward(self, tissue: torch.Tensor, cells: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """(b, t, H, W), (b, n, c), (b, n) bool -> (b, t, H, W): the tissue's features and what cells add to them."""
        pixels = tissue.movedim(1, -1)  # (b, H, W, t): as maps in channels_last lie
        found = F.scaled_dot_product_attention(
            self.query(pixels.flatten(1, 2)), self.key(cells), self.value(cells), attn_mask=kept[:, None, :]
        )  # (b, H W, channels)
        return (pixels + self.out(found).reshape(pixels.shape)).movedim(-1, 1)


class PatchEncoder(nn.Module):
    """One feature vector for each patch of a picture, by strided convolutions that never look beyond it.

    Parameters
    ----------
    channels
        Length of the vector.
    side
        Pixels along a patch.
    width
        Channels of the first layer; each further one has twice as many, up to ``channels``.
    """

    def __init__(self, channels: int, side: int, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), group_norm(width), nn.SiLU()]
        while side > 5:
            wider = min(2 * width, channels)
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), group_norm(wider), nn.SiLU()]
            width, side = wider, (side + 1) // 2
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Linear(2 * width, channels)

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        """(b, n, 3, i, i) of order one -> (b, n, channels)."""
        maps = self.layers(patch.flatten(0, 1))  # (b n, width, i', i')
        pooled = torch.cat([maps.mean((-2, -1)), maps.amax((-2, -1))], dim=1)  # (b n, 2 width)
        return self.mix(pooled).unflatten(0, patch.shape[:2])


class Modulation(nn.Module):
    """Cross-modal adaptive modulation (equation 3), one way: ``A_y' = A_y FC(A_y^T A_h)``.

    Around each pixel stand the a x a pixels of a region. How much each of them in A_y resembles the pixel in A_h
    becomes, through FC, the weight that it has in the pixel's new feature.

    Parameters
    ----------
    region
        a, odd.
    """

    def __init__(self, region: int = 3):
        super().__init__()
        if region % 2 == 0:
            raise ValueError(f"a region has a pixel in its middle, so its side is odd, not {region}")
        self.region = region
        self.fc = nn.Linear(region**2, region**2)
        nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.bias[region**2 // 2] = 1  # at birth each pixel is about what it was

    def forward(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """A_y and A_h (b, c, H, W) -> A_y' (b, c, H, W)."""
        height, width = own.shape[-2:]
        wide = F.pad(own, (self.region // 2,) * 4, mode="replicate")
        wide = wide.contiguous(memory_format=torch.channels_last)  # padding forgets it
        # a region's pixel at a time: side by side they would take a x a times the memory, and longer
        around = [
            wide[..., row : row + height, column : column + width]
            for row in range(self.region)
            for column in range(self.region)
        ]  # a a times (b, c, H, W)
        alike = torch.stack([(pixel * other).sum(1) for pixel in around], dim=-1)  # (b, H, W, a a)
        kernel = self.fc(alike / own.shape[1] ** 0.5).movedim(-1, 1)  # (b, a a, H, W)
        return sum(pixel * kernel[:, n : n + 1] for n, pixel in enumerate(around))


def disentangling_loss(
    shared: tuple[torch.Tensor, torch.Tensor],
    unique: tuple[torch.Tensor, torch.Tensor],
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """``|S_y - S_h| / |U_y - U_h|``: what is shared shall be alike, and what is unique apart.

    Of features that have length 1 at each pixel; else the ratio would be won by making S small and U large.

    Parameters
    ----------
    shared, unique
        (S_y, S_h) and (U_y, U_h), each (b, c, H, W).
    present
        (b,) bool, the samples that have a low-resolution map; all by default. Others do not count.

    Returns
    -------
    torch.Tensor
        (), 0 without a sample.
    """
    if present is not None:
        shared, unique = ([part[present] for part in pair] for pair in (shared, unique))
    if not len(shared[0]):
        return shared[0].new_zeros(())
    alike, apart = (_distance(*pair) for pair in (shared, unique))
    return alike / apart.clamp_min(1e-3)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference () of directions."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).abs().mean()


def intensity(expression: torch.Tensor) -> torch.Tensor:
    """I of the gene graph: expression of gene i in terms of gene j, made symmetric.

    In terms of j, gene i has the intensity ``r_ij = <y_i, y_j> / <y_j, y_j>`` (least squares). The geometric mean of
    r_ij and r_ji does not depend on the genes' units: it is the cosine of their maps. Rows add up to 1, so that a
    graph step neither grows nor shrinks with the number of genes.

    Parameters
    ----------
    expression
        (b, g, n) at least 0: maps of the genes.

    Returns
    -------
    torch.Tensor
        (b, g, g), at least 0; a row of zeros where a gene has no expression.
    """
    direction = F.normalize(expression, dim=-1)  # (b, g, n)
    alike = direction @ direction.mT  # (b, g, g)
    return alike / alike.sum(-1, keepdim=True).clamp_min(1e-6)


class GeneGraph(nn.Module):
    """Co-expression graph (CIGC, equation 4): ``F_mid = act(I F W)``, ``F_out = a F_mid + (1 - a) F``.

    A node is a gene and its feature the gene's low-resolution map. W mixes places; it is a convolution, the same for
    all genes, so that tiles may have any size and no place in them is special.

    Parameters
    ----------
    weight
        a; 0 leaves the features as they are. (The paper's: 0.2.)
    kernel
        Side of W, low-resolution pixels, odd.
    """

    def __init__(self, weight: float = 0.2, kernel: int = 3):
        super().__init__()
        self.weight = weight
        self.mix = nn.Conv2d(1, 1, kernel, padding=kernel // 2)
        nn.init.dirac_(self.mix.weight)

    def forward(self, features: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        """F (b, g, h, w) and I (b, g, g) -> F_out (b, g, h, w)."""
        if self.weight == 0:
            return features
        mixed = self.mix(features.flatten(0, 1)[:, None]).reshape(features.shape)  # F W
        middle = F.leaky_relu((graph @ mixed.flatten(2)).reshape(features.shape), 0.2)
        return self.weight * middle + (1 - self.weight) * features
