"""Genes outside a panel, as mixtures of the panel genes that correlate with them over spots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from stsr.errors import UsageError

_LOOK_ALIKES = 5  # panel genes in the mixture of another gene
_SHARPNESS = 10.0  # of the softmax over correlations
_BLOCK = 2048  # genes correlated at once


def mixtures(
    genes: Sequence[str], panel: Sequence[str], measured: Sequence[str], counts: sp.csr_matrix | None
) -> np.ndarray:
    """Express each gene as a mixture of panel genes: weights (g, p) float32.

    A panel gene has weight 1 on itself. Any other gene has softmax weights over the five panel genes that correlate
    best with it over spots (Pearson, on the log of counts per 10,000), times the best correlation. So a gene that
    correlates with no panel gene has weights near zero, and its map follows its spots alone.

    Parameters
    ----------
    counts
        Spots (n, len(measured)); None without spots.

    Raises
    ------
    UsageError
        If a gene is outside the panel and there are no spots to correlate it with.
    """
    place = {gene: column for column, gene in enumerate(panel)}
    mixed = np.zeros((len(genes), len(panel)), np.float32)
    outside = []
    for row, gene in enumerate(genes):
        if gene in place:
            mixed[row, place[gene]] = 1
        else:
            outside.append(row)
    if not outside:
        return mixed
    columns = {gene: column for column, gene in enumerate(measured)}
    shared = [gene for gene in panel if gene in columns]
    if counts is None or not shared:
        raise UsageError(
            f"{genes[outside[0]]!r} is not in the model's panel, and without spots it cannot be compared with panel "
            "genes; leave it out"
        )
    normal = _log_normalised(counts)
    standard = _standard(normal[:, [columns[gene] for gene in shared]].toarray())  # (spots, shared)
    into = np.array([place[gene] for gene in shared])
    for start in range(0, len(outside), _BLOCK):
        rows = outside[start : start + _BLOCK]
        block = _standard(normal[:, [columns[genes[row]] for row in rows]].toarray())
        correlation = block.T @ standard  # (rows, shared)
        mixed[np.array(rows)[:, None], into[None, :]] = _softened(correlation)
    return mixed


def _log_normalised(counts: sp.csr_matrix) -> sp.csc_matrix:
    """log(1 + counts per 10,000) of spots (n, g)."""
    total = np.asarray(counts.sum(1)).ravel()
    scaled = sp.diags(1e4 / np.maximum(total, 1)) @ counts
    return scaled.log1p().tocsc()


def _standard(values: np.ndarray) -> np.ndarray:
    """Columns scaled to mean 0 and length 1; constant columns become 0."""
    centred = values - values.mean(0)
    length = np.linalg.norm(centred, axis=0)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-12)


def _softened(correlation: np.ndarray) -> np.ndarray:
    """Weights (g, shared) from correlations: a softmax over the best few, times the best one."""
    weights = np.zeros_like(correlation)
    count = min(_LOOK_ALIKES, correlation.shape[1])
    best = np.argpartition(-correlation, count - 1, axis=1)[:, :count]
    top = np.take_along_axis(correlation, best, 1).clip(0)
    soft = np.exp(_SHARPNESS * (top - top.max(1, keepdims=True)))
    np.put_along_axis(weights, best, soft / soft.sum(1, keepdims=True) * top.max(1, keepdims=True), 1)
    return weights
