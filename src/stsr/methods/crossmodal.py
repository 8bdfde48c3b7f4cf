"""Cross-modal equations of Diff-ST, as functions of tensors and small modules.

Diff-ST: Wang et al. 2024, cross-modal diffusion modelling for super-resolved spatial transcriptomics, arXiv 2404.12973.
A_h and A_y are feature maps of the image and of the low-resolution maps, (b, c, H, W) on the same raster.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from stsr.nn.blocks import group_norm

_LUMA = (0.299, 0.587, 0.114)  # perceived brightness, ITU-R BT.601
_GREY_LEVELS = 32  # few enough for a patch of 100 pixels, 100 um at 10 um per pixel


def patches(picture: torch.Tensor, across: int) -> torch.Tensor:
    """Cut maps (b, c, I, I) into ``across`` x ``across`` patches (b, n, c, i, i), row by row.

    Raises
    ------
    ValueError
        If the size is not a multiple of ``across``.
    """
    count, channels, height, width = picture.shape
    if height % across or width % across:
        raise ValueError(f"an image of {height} x {width} pixels has no {across} x {across} whole patches")
    cut = picture.reshape(count, channels, across, height // across, across, width // across)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (b, n, c, i, i)


def entropy(patch: torch.Tensor, levels: int = _GREY_LEVELS) -> torch.Tensor:
    """Shannon entropy of the grey levels of each patch, relative to its maximum.

    Parameters
    ----------
    patch
        (..., 3, i, i) in [0, 255].
    levels
        Number of grey levels.

    Returns
    -------
    torch.Tensor
        (...) in [0, 1]: 0 for a uniform patch, 1 if all levels are equally frequent.
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
    """Select patches whose entropy is above a threshold that rises with training progress.

    Parameters
    ----------
    entropies
        (b, n) from `entropy`.
    threshold
        Threshold at the end of training and when predicting; it rises linearly from 0.
    progress
        0 at the start of training, 1 at its end.

    Returns
    -------
    torch.Tensor
        (b, n) bool; each sample keeps at least the patch of highest entropy, because attention over none is NaN.
    """
    kept = entropies > threshold * min(max(progress, 0.0), 1.0)
    return kept | (entropies >= entropies.amax(-1, keepdim=True))


class CellAttention(nn.Module):
    """Cell-to-tissue cross-attention: queries from tissue features, keys and values from the selected patches.

    Parameters
    ----------
    tissue_channels, cell_channels
        Channels of the tissue map and length of a patch's feature vector.
    channels
        Channels of queries, keys and values (128 in the paper).
    """

    def __init__(self, tissue_channels: int, cell_channels: int, channels: int = 128):
        super().__init__()
        self.query = nn.Linear(tissue_channels, channels)
        self.key = nn.Linear(cell_channels, channels)
        self.value = nn.Linear(cell_channels, channels)
        self.out = nn.Linear(channels, tissue_channels)

    def forward(self, tissue: torch.Tensor, cells: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Add attention over cells to tissue features: (b, t, H, W), (b, n, c), (b, n) bool -> (b, t, H, W)."""
        pixels = tissue.movedim(1, -1)  # (b, H, W, t): contiguous for maps in channels_last
        found = F.scaled_dot_product_attention(
            self.query(pixels.flatten(1, 2)), self.key(cells), self.value(cells), attn_mask=kept[:, None, :]
        )  # (b, H W, channels)
        return (pixels + self.out(found).reshape(pixels.shape)).movedim(-1, 1)


class PatchEncoder(nn.Module):
    """Encode each patch of feature maps as a feature vector, by strided convolutions inside the patch.

    Parameters
    ----------
    in_channels
        Channels of the maps.
    channels
        Length of the vector.
    side
        Pixels along a patch.
    width
        Channels of the first layer; they double in each further layer, up to ``channels``.
    """

    def __init__(self, in_channels: int, channels: int, side: int, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), group_norm(width), nn.SiLU()]
        while side > 5:
            wider = min(2 * width, channels)
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), group_norm(wider), nn.SiLU()]
            width, side = wider, (side + 1) // 2
        self.layers = nn.Sequential(*layers)
        self.mix = nn.Linear(2 * width, channels)

    def forward(self, patch: torch.Tensor) -> torch.Tensor:
        """(b, n, in_channels, i, i) of order one -> (b, n, channels)."""
        maps = self.layers(patch.flatten(0, 1))  # (b n, width, i', i')
        pooled = torch.cat([maps.mean((-2, -1)), maps.amax((-2, -1))], dim=1)  # (b n, 2 width)
        return self.mix(pooled).unflatten(0, patch.shape[:2])


class Modulation(nn.Module):
    """Cross-modal adaptive modulation (equation 3), one way: ``A_y' = A_y FC(A_y^T A_h)``.

    The new feature of a pixel is a weighted sum over the a x a pixels of A_y around it. FC computes the weights from
    the similarity of these pixels to the pixel in A_h.

    Parameters
    ----------
    region
        a, odd.
    """

    def __init__(self, region: int = 3):
        super().__init__()
        if region % 2 == 0:
            raise ValueError(f"region must be odd, not {region}")
        self.region = region
        self.fc = nn.Linear(region**2, region**2)
        nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.bias[region**2 // 2] = 1  # initially, each pixel stays about the same

    def forward(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """A_y and A_h (b, c, H, W) -> A_y' (b, c, H, W)."""
        height, width = own.shape[-2:]
        wide = F.pad(own, (self.region // 2,) * 4, mode="replicate")
        wide = wide.contiguous(memory_format=torch.channels_last)  # padding loses it
        # One pixel of the region at a time: unfolding would take a x a times the memory, and more time.
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
    """``|S_y - S_h| / |U_y - U_h|``: shared features S become similar, unique features U different.

    Features are normalised to length 1 at each pixel; otherwise small S and large U would minimise the ratio.

    Parameters
    ----------
    shared, unique
        (S_y, S_h) and (U_y, U_h), each (b, c, H, W).
    present
        (b,) bool, the samples with a low-resolution map; all by default. Others are ignored.

    Returns
    -------
    torch.Tensor
        (), 0 without a sample.
    """
    if present is not None:
        shared, unique = ((pair[0][present], pair[1][present]) for pair in (shared, unique))
    if not len(shared[0]):
        return shared[0].new_zeros(())
    alike, apart = (_distance(*pair) for pair in (shared, unique))
    return alike / apart.clamp_min(1e-3)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference () of the normalised features."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).abs().mean()


def intensity(expression: torch.Tensor) -> torch.Tensor:
    """I of the gene graph: symmetrised expression intensity of gene i in terms of gene j.

    In terms of j, gene i has the intensity ``r_ij = <y_i, y_j> / <y_j, y_j>`` (least squares). The geometric mean of
    r_ij and r_ji is the cosine of the two maps, independent of units. Rows sum to 1, so that the scale of a graph step
    does not depend on the number of genes.

    Parameters
    ----------
    expression
        (b, g, n) maps of the genes, at least 0.

    Returns
    -------
    torch.Tensor
        (b, g, g), at least 0; the row of a gene without expression is 0.
    """
    direction = F.normalize(expression, dim=-1)  # (b, g, n)
    alike = direction @ direction.mT  # (b, g, g)
    return alike / alike.sum(-1, keepdim=True).clamp_min(1e-6)


class GeneGraph(nn.Module):
    """Co-expression graph (CIGC, equation 4): ``F_mid = act(I F W)``, ``F_out = a F_mid + (1 - a) F``.

    The nodes are genes; the features of a node are its low-resolution map. W mixes positions. It is a convolution, the
    same for all genes, so that tiles can have any size.

    Parameters
    ----------
    weight
        a (0.2 in the paper); 0 leaves the features unchanged.
    kernel
        Side of W, low-resolution pixels; odd.
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
