"""What a diffusion denoises: counts as standardised residuals to the interpolated spots, and back.

Linear in counts, so that the mean over samples estimates the mean of counts without bias (but for the cut at zero)::

    x0 = (smooth(hr) - base) / spread,      counts = max(0, base + spread * x0)

``base`` are the spots, interpolated (or the gene's mean, without spots), and ``spread`` is the standard deviation to
be expected about it. ``smooth`` is a Gaussian: most 10 um bins of most genes hold no transcript at all, so that samples
of bare counts are little but Poisson noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from stsr.methods.batch import Batch
from stsr.methods.method import interpolated

# Measured on 10x Genomics' breast cancer section (Janesick et al. 2023), 313 genes, 10 um bins, a Gaussian of one bin:
# the standard deviation of x0 is then 0.9 for common and middling genes, and 0.7 for the rarest quarter.
OVERDISPERSION = 0.3  # variance beyond Poisson's, in squared means (as of a negative binomial)
SECTION_SHARE = 0.1  # of the section's mean in the expected one: spots of zero counts still have neighbours
LEAST_COUNTS = (
    0.2  # per low-resolution pixel: below it, genes are mostly noise, and should not lead the training
)


@dataclass(frozen=True)
class Residual:
    """Counts about an expectation.

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
        """From a batch's spots and the genes' mean counts per low-resolution pixel, ``scale`` (b, g)."""
        base = interpolated(batch, scale, per_lr)  # (b, g, H, W)
        mean = base + ((SECTION_SHARE * scale + LEAST_COUNTS) / per_lr**2)[..., None, None]
        kept = float(gaussian(smooth_bins).square().sum()) ** 2  # of Poisson's variance, by smoothing
        return cls(base, (kept * mean + OVERDISPERSION * mean**2).sqrt(), smooth_bins)

    def encode(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts per bin -> x0, (b, g, H, W) both."""
        return (smoothed(counts, self.smooth_bins) - self.base) / self.spread

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """X0 -> counts per bin, at least 0, (b, g, H, W) both."""
        return (self.base + self.spread * x0).clamp_min(0)


def gaussian(sd: float) -> torch.Tensor:
    """Kernel (2 r + 1,) of sum 1, cut at r = 3 sd; (1,) for an sd of 0."""
    reach = math.ceil(3 * sd)
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (place / sd) ** 2) if sd else torch.ones(1)
    return weights / weights.sum()


def smoothed(maps: torch.Tensor, sd: float) -> torch.Tensor:
    """Maps (b, g, H, W) under a Gaussian of ``sd`` bins, mirrored at the edges, so that totals are kept."""
    if sd == 0:
        return maps
    rows, columns = (_smoothing(size, sd).to(maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=16)
def _smoothing(size: int, sd: float) -> torch.Tensor:
    """(size, size) matrix of the mirrored Gaussian: on small maps quicker than a convolution of one channel."""
    kernel = gaussian(sd)
    reach = len(kernel) // 2
    matrix = torch.zeros(size, size)
    for row in range(size):
        for offset, weight in zip(range(-reach, reach + 1), kernel, strict=True):
            place = (row + offset) % (2 * size)
            matrix[row, min(place, 2 * size - 1 - place)] += weight
    return matrix
