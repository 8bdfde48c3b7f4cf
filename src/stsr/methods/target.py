"""The quantity that diffusion models: counts as standardised residuals from the interpolated spots.

It is linear in counts, so the mean over samples is an unbiased estimate of the mean counts, except for clipping at 0::

    x0 = (smooth(hr) - base) / spread,      counts = max(0, base + spread * x0)

``base`` is the interpolation of the spots (or the gene's mean, without spots) and ``spread`` the expected standard
deviation from it. ``smooth`` is a Gaussian filter: most 10 um bins of most genes contain no transcript, so samples of
raw counts would be mostly Poisson noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from stsr.methods.batch import Batch
from stsr.methods.method import interpolated

# Measured on the breast cancer section of 10x Genomics (Janesick et al. 2023), 313 genes, 10 um bins, a Gaussian of one
# bin: the standard deviation of x0 is then 0.9, and 0.7 for the rarest quarter of genes.
OVERDISPERSION = 0.3  # variance beyond Poisson, in squared means (as in a negative binomial)
SECTION_SHARE = 0.1  # weight of the section's mean in the expected count, for bins in spots without counts
LEAST_COUNTS = 0.2  # per low-resolution pixel: rarer genes are mostly noise and should not dominate training


@dataclass(frozen=True)
class Residual:
    """Counts relative to their expectation.

    Parameters
    ----------
    base, spread
        Expected counts per bin and their standard deviation (b, g, H, W); spread is positive.
    smooth_bins
        Standard deviation of the Gaussian that smooths the counts, bins; 0 for none.
    """

    base: torch.Tensor
    spread: torch.Tensor
    smooth_bins: float

    @classmethod
    def of(cls, batch: Batch, scale: torch.Tensor, per_lr: int, smooth_bins: float) -> Residual:
        """Compute base and spread from spots and mean counts per low-resolution pixel, ``scale`` (b, g)."""
        base = interpolated(batch, scale, per_lr)  # (b, g, H, W)
        mean = base + ((SECTION_SHARE * scale + LEAST_COUNTS) / per_lr**2)[..., None, None]
        kept = (
            float(gaussian(smooth_bins).square().sum()) ** 2
        )  # fraction of the Poisson variance left after smoothing
        return cls(base, (kept * mean + OVERDISPERSION * mean**2).sqrt(), smooth_bins)

    def encode(self, counts: torch.Tensor) -> torch.Tensor:
        """Convert counts per bin to x0, both (b, g, H, W)."""
        return (smoothed(counts, self.smooth_bins) - self.base) / self.spread

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Convert x0 to counts per bin, at least 0, both (b, g, H, W)."""
        return (self.base + self.spread * x0).clamp_min(0)


def gaussian(sd: float) -> torch.Tensor:
    """Gaussian kernel (2 r + 1,) with sum 1, truncated at r = 3 sd; (1,) for an sd of 0."""
    reach = math.ceil(3 * sd)
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (place / sd) ** 2) if sd else torch.ones(1)
    return weights / weights.sum()


def smoothed(maps: torch.Tensor, sd: float) -> torch.Tensor:
    """Smooth maps (b, g, H, W) by a Gaussian of ``sd`` bins, mirrored at the edges, which keeps totals."""
    if sd == 0:
        return maps
    rows, columns = (_smoothing(size, sd).to(maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=16)
def _smoothing(size: int, sd: float) -> torch.Tensor:
    """The mirrored Gaussian as a matrix (size, size): on small maps faster than a one-channel convolution."""
    kernel = gaussian(sd)
    reach = len(kernel) // 2
    matrix = torch.zeros(size, size)
    for row in range(size):
        for offset, weight in zip(range(-reach, reach + 1), kernel, strict=True):
            place = (row + offset) % (2 * size)
            matrix[row, min(place, 2 * size - 1 - place)] += weight
    return matrix
