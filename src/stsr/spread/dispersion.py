"""`Dispersion`: the variance of true expression around a map, relative to the map, by scale and by gene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LENGTHS_UM = (0.0, 10.0, 25.0, 60.0)
"""Lengths of the Gaussian fields of which errors are sums, um: white noise, cells, structures, neighbourhoods."""

LOW_EXPRESSION = 1.0
"""Where a gene is expressed at this fraction of its mean, its relative variance is twice that at high levels."""

_LEAST_LEVEL = 1 / 16  # of a gene's mean; below it, relative variance rises no further


@dataclass(frozen=True)
class Dispersion:
    """Expression is ``mean x u x v`` with log-normal ``u``, which all genes share, and ``v`` of each gene, of mean 1.

    The logarithms of u and v are sums of Gaussian fields, of which field k has correlation
    ``exp(-distance^2 / (4 length_k^2))``, so that errors of the map are similar in neighbouring bins. Relative
    variances rise where a gene is low: a bin with a tenth of the mean may still contain a cell that expresses it.

    Parameters
    ----------
    shared
        (k,) relative variance of u in each field, in bins of ``bin_um``, at levels far above a gene's mean.
    own
        (k,) the same of v of a typical gene.
    genes
        Factors of ``own`` by gene name; 1 for others.
    lengths_um
        (k,) lengths of the fields, um.
    bin_um
        Bins in which white noise has its variance, um.
    """

    shared: tuple[float, ...]
    own: tuple[float, ...]
    genes: dict[str, float]
    lengths_um: tuple[float, ...] = LENGTHS_UM
    bin_um: float = 10.0

    def factors(self, genes: Sequence[str]) -> np.ndarray:
        """Factor (g,) of each gene."""
        return np.array([self.genes.get(gene, 1.0) for gene in genes])

    def of_sums(self, bin_um: float) -> tuple[np.ndarray, np.ndarray]:
        """Relative variances (k,) of shared and own fields of sums over bins of this side, um."""
        kept = kept_variance(self.lengths_um, self.bin_um, round(bin_um / self.bin_um))
        return np.array(self.shared) * kept, np.array(self.own) * kept

    def lengths_in_bins(self, bin_um: float) -> np.ndarray:
        """Lengths (k,) of the fields in bins of this side, um; sums over larger bins are similar over more of them."""
        lengths = np.array(self.lengths_um)
        wider = np.sqrt(lengths**2 + (bin_um**2 - self.bin_um**2) / 12)  # variance of a bin's width is 1/12
        return np.where(lengths > 0, wider, 0) / bin_um

    def sd(self, mean: np.ndarray, level: np.ndarray, genes: Sequence[str], bin_um: float) -> np.ndarray:
        """Standard deviation (g, y, x) of the expected counts around a map.

        Counting noise comes on top: measured counts have the variance ``sd^2 + mean``.

        Parameters
        ----------
        mean
            (g, y, x) expected counts per bin.
        level
            (g,) mean counts per bin of the section.
        genes
            Names (g,).
        bin_um
            Side of the bins, um.
        """
        relative = np.maximum(mean / np.maximum(level, 1e-12)[:, None, None], _LEAST_LEVEL)
        rise = 1 + LOW_EXPRESSION / relative
        shared, own = self.totals(genes, bin_um)
        variance = (1 + shared * rise) * (1 + own[:, None, None] * rise) - 1
        return (mean * np.sqrt(variance)).astype(np.float32)

    def totals(self, genes: Sequence[str], bin_um: float) -> tuple[float, np.ndarray]:
        """Relative variances of u, and of v of each gene (g,), at high levels, in bins of this side, um."""
        shared, own = (float(part.sum()) for part in self.of_sums(bin_um))
        return shared, own * self.factors(genes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Dispersion:
        """From the values of `to_json`."""
        return cls(
            shared=tuple(values["shared"]),
            own=tuple(values["own"]),
            genes=dict(values["genes"]),
            lengths_um=tuple(values["lengths_um"]),
            bin_um=float(values["bin_um"]),
        )


def kept_variance(lengths_um: Sequence[float], bin_um: float, factor: int) -> np.ndarray:
    """Fraction (k,) of the relative variance of each field that is left in sums over ``factor`` x ``factor`` bins.

    This is the mean correlation of two bins of the block.
    """
    apart = np.abs(np.arange(factor)[:, None] - np.arange(factor)[None])
    return np.array([correlation(length / bin_um, apart).mean() ** 2 for length in lengths_um])


def correlation(length: float, apart: np.ndarray) -> np.ndarray:
    """Correlation of a field at two bins of a row, by their distance and the field's length, both in bins."""
    return (apart == 0).astype(float) if length == 0 else np.exp(-(apart**2) / (4 * length**2))
