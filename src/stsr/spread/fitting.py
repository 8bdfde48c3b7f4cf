"""The dispersion of true counts around predicted maps, by the method of moments on tiles that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from stsr.geometry.grid import add_up
from stsr.spread.dispersion import LENGTHS_UM, LOW_EXPRESSION, Dispersion, kept_variance

FACTORS = (1, 2, 4, 8, 16)
"""Bins along the blocks over which counts are added up: 10 to 160 um with bins of 10 um."""

_LARGEST_FACTOR = 5.0  # of a gene


class Moments:
    """Sums over tiles from which `fit` computes a dispersion.

    Parameters
    ----------
    genes
        Number of genes.
    """

    def __init__(self, genes: int):
        scales = len(FACTORS)
        self.excess = np.zeros((scales, genes))
        """Squared error minus counting noise."""
        self.squares = np.zeros((scales, genes))
        """Squared expected counts."""
        self.low = np.zeros((scales, genes))
        """Expected counts times the gene's mean."""
        self.between = np.zeros(scales)
        """Products of the errors of different genes."""
        self.products = np.zeros(scales)
        """Products of what errors of different genes are in proportion to: the root of `basis`."""
        self.total = np.zeros(genes)
        """Expected counts."""

    def add(
        self, mean: np.ndarray, truth: np.ndarray, level: np.ndarray, known: np.ndarray, divided: float = 0.0
    ) -> None:
        """Add one tile.

        Parameters
        ----------
        mean, truth
            (g, y, x) expected and measured counts per bin.
        level
            (g,) mean counts per bin of the section.
        known
            (g,) bool: which genes were measured.
        divided
            Side of the bins that counts were divided from by area, in bins; 0 for counts of transcripts.
        """
        for scale, factor in enumerate(FACTORS):
            height, width = (side // factor * factor for side in mean.shape[1:])
            if not height or not width:
                continue
            a, b = (
                add_up(values[known, :height, :width].astype(np.float64), factor).reshape(
                    int(known.sum()), -1
                )
                for values in (mean, truth)
            )
            squares = ((b - a) ** 2).sum(1)
            self.excess[scale, known] += squares - counting_noise(factor, divided) * a.sum(1)
            self.squares[scale, known] += (a * a).sum(1)
            self.low[scale, known] += a.sum(1) * level[known] * factor**2
            self.between[scale] += ((b - a).sum(0) ** 2).sum() - squares.sum()
            scatter = a * a + LOW_EXPRESSION * a * (level[known] * factor**2)[:, None]
            self.products[scale] += (np.sqrt(scatter).sum(0) ** 2).sum() - scatter.sum()
        self.total[known] += mean[known].sum((1, 2))

    @property
    def basis(self) -> np.ndarray:
        """What squared errors are in proportion to, (scales, g): they rise where genes are low."""
        return self.squares + LOW_EXPRESSION * self.low


def counting_noise(factor: int, divided: float) -> float:
    """Variance of counting noise relative to the counts, in blocks of ``factor`` x ``factor`` bins.

    It is 1 for whole counts. Counts that were divided by area between the bins that their own bin overlaps vary less:
    by the mean square of the parts, at a random position of the bins, relative to their mean.
    """
    if divided <= 0:
        return 1.0
    along = (
        1 - divided / (3 * factor) if factor >= divided else factor / divided * (1 - factor / (3 * divided))
    )
    return along**2


def fit(moments: Moments, genes: Sequence[str], bin_um: float) -> Dispersion | None:
    """Dispersion whose sums over blocks of all sizes vary as the errors do; None if there were no errors to see.

    Shared fields follow from products of the errors of different genes, in which counting noise cancels; own fields
    from squared errors beyond counting noise. Genes count by their expression. The factor of each gene is shrunk
    towards 1, the more the less it is expressed.
    """
    usable = (moments.products > 0) & (moments.squares.sum(1) > 0)
    if not usable.any():
        return None
    kept = np.array([kept_variance(LENGTHS_UM, bin_um, factor) for factor in FACTORS])[usable]  # (scales, k)
    shared = _fields(kept, moments.between[usable] / moments.products[usable])
    common = (kept @ shared)[:, None]  # (scales, 1)
    basis = moments.basis[usable]  # (scales, g)
    excess = (moments.excess[usable] - common * basis) / (1 + common)
    weight = 1 / np.maximum(moments.total, 1e-9)
    own = _fields(kept, (excess * weight).sum(1) / np.maximum((basis * weight).sum(1), 1e-30))
    coarse = np.array(FACTORS)[usable] >= 4  # fine bins are nearly all counting noise
    coarse = coarse if coarse.any() else np.ones_like(coarse)
    seen = (excess[coarse] * weight).sum(0)
    expected = ((kept @ own)[coarse, None] * basis[coarse] * weight).sum(0)
    prior = max(float(np.median(expected)), 1e-30)
    factors = np.clip((seen + prior) / (expected + prior), 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    named = {gene: round(float(factor), 4) for gene, factor in zip(genes, factors, strict=True)}
    return Dispersion(tuple(shared.tolist()), tuple(own.tolist()), named, LENGTHS_UM, bin_um)


def _fields(kept: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Variances (k,), at least 0, of fields whose sums have these relative variances (scales,).

    Errors count relative to the variance, so that small variances of large blocks are matched as well.
    """
    seen = variance > 0
    if not seen.any():
        return np.zeros(kept.shape[1])
    return nnls(kept[seen] / variance[seen, None], np.ones(int(seen.sum())))[0]
