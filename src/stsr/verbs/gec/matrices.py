"""Correlation matrices of many genes over many places, computed in blocks of genes.

The matrix genes x places need not fit in memory: values come from a function of a slice of genes, `Read`, which may
read them from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from stsr.progress import Progress, silent

MEMORY_BYTES = 4 * 2**30
"""Memory for the resident block of genes. With the second block and the values kept by gec, the peak is below 8 GB."""
_PASSING_BYTES = 2**28
_READ_GENES = 16  # at once: the genes of one chunk of a map on disk
_LEAST_RELIABILITY = 0.1  # fraction of variance that is not counting noise; no correction below it
_ORDERED_GENES = 1000  # optimal leaf ordering takes quadratic time: skipped above

Read = Callable[[slice], np.ndarray]
"""Values (genes of the slice, places), of any dtype."""


# ------------------------------------------------------------------------------------------------- matrices


def moments(read: Read, genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance (genes,) of each gene over the places."""
    parts = []
    for part in _slices(0, genes, _READ_GENES):
        values = np.asarray(read(part), np.float64)
        parts.append((values.mean(1), values.var(1, ddof=1)))
    mean, variance = zip(*parts, strict=True)
    return np.concatenate(mean), np.concatenate(variance)


def pearson_matrix(read: Read, genes: int, places: int, progress: Progress = silent) -> np.ndarray:
    """Pearson correlation (genes, genes) float32 of all pairs; 0 for genes that do not vary."""
    return _products(read, genes, places, standardised, "Pearson", progress)


def spearman_matrix(read: Read, genes: int, places: int, progress: Progress = silent) -> np.ndarray:
    """Spearman correlation (genes, genes) float32; ties share their mean rank."""
    return _products(read, genes, places, lambda values: standardised(midranks(values)), "Spearman", progress)


def _products(
    read: Read,
    genes: int,
    places: int,
    prepare: Callable[[np.ndarray], np.ndarray],
    label: str,
    progress: Progress,
) -> np.ndarray:
    """Scalar products of all pairs of prepared genes, with as many genes resident as fit in `MEMORY_BYTES`."""

    def block(part: slice) -> np.ndarray:
        values = np.empty((part.stop - part.start, places), np.float32)
        for few in _slices(part.start, part.stop, _READ_GENES):
            values[few.start - part.start : few.stop - part.start] = prepare(read(few))
        return values

    matrix = np.empty((genes, genes), np.float32)
    done, total = 0, genes * (genes + 1) // 2
    for rows in _slices(0, genes, _fitting(MEMORY_BYTES, places)):
        resident = block(rows)
        matrix[rows, rows] = resident @ resident.T
        done += len(resident) * (len(resident) + 1) // 2
        for columns in _slices(rows.stop, genes, _fitting(_PASSING_BYTES, places)):
            matrix[rows, columns] = resident @ block(columns).T
            matrix[columns, rows] = matrix[rows, columns].T
            done += len(resident) * (columns.stop - columns.start)
            progress(done, total, label)
        del resident  # before the next one is filled
        progress(done, total, label)
    return np.clip(matrix, -1, 1, out=matrix)


def standardised(values: np.ndarray) -> np.ndarray:
    """Rows (g, n) with mean 0 and length 1, float32; rows that do not vary become 0."""
    centred = np.asarray(values, np.float64)
    centred = centred - centred.mean(1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0).astype(np.float32)


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks (g, n) within each row, from 1; ties share their mean rank. `scipy.stats.rankdata`, but twice as fast."""
    ranks = np.empty(values.shape, np.float64)
    for row, into in zip(values, ranks, strict=True):
        order = row.argsort()
        ordered = row[order]
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        size = np.diff(first, append=len(row))  # of each group of ties
        into[order] = np.repeat(first + (size + 1) / 2, size)
    return ranks


def _fitting(memory_bytes: int, places: int) -> int:
    """Number of genes, a multiple of those read at once, whose float32 values fit in memory."""
    return max(memory_bytes // (4 * places) // _READ_GENES, 1) * _READ_GENES


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


# ----------------------------------------------------------------------------------------- against the truth


def without_counting_noise(pearson: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Correlation of expected counts, from that of measured counts.

    Poisson noise adds the mean to the variance of a gene and, being independent between genes, nothing to the
    covariance. So the correlation of two genes' intensities is that of their counts divided by ``sqrt(q_i q_j)``, with
    the reliability ``q = 1 - mean / variance`` (Spearman's correction for attenuation, 1904).

    Parameters
    ----------
    pearson
        (genes, genes) of raw counts.
    mean, variance
        (genes,) of the same counts.

    Returns
    -------
    corrected
        (genes, genes) float32, -1 to 1; NaN for genes with a reliability below 0.1, which are mostly noise.
    """
    reliability = 1 - np.divide(mean, variance, out=np.ones(len(mean)), where=variance > 0)
    kept = np.where(reliability >= _LEAST_RELIABILITY, reliability, np.nan)
    corrected = np.clip(pearson / np.sqrt(np.outer(kept, kept)), -1, 1).astype(np.float32)
    np.fill_diagonal(corrected, np.where(np.isnan(kept), np.nan, 1))
    return corrected


def matrix_distance(matrix: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Distance of two correlation matrices off the diagonal, without pairs that are NaN in either.

    Returns
    -------
    distance
        ``rmse``; ``frobenius``: norm of the difference, both triangles; ``bias``: mean difference, positive if
        correlations are inflated; ``pattern``: correlation of the upper triangles; ``pairs``: number of pairs compared.
    """
    above = np.triu_indices(len(truth), 1)
    a, b = matrix[above].astype(np.float64), truth[above].astype(np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if not len(a):
        return {"rmse": np.nan, "frobenius": np.nan, "bias": np.nan, "pattern": np.nan, "pairs": 0}
    difference = a - b
    varies = len(a) > 1 and a.std() > 0 and b.std() > 0
    return {
        "rmse": float(np.sqrt(np.square(difference).mean())),
        "frobenius": float(np.sqrt(2 * np.square(difference).sum())),
        "bias": float(difference.mean()),
        "pattern": float(np.corrcoef(a, b)[0, 1]) if varies else np.nan,
        "pairs": len(a),
    }


# -------------------------------------------------------------------------------------------------- results


def strongest_pairs(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (i, j), i < j, of the pairs with the largest absolute correlation, strongest first."""
    i, j = np.triu_indices(len(matrix), 1)
    strength = np.abs(matrix[i, j])
    count = min(count, len(strength))
    best = np.argpartition(-strength, count - 1)[:count] if count else np.zeros(0, int)
    best = best[np.lexsort((best, -strength[best]))]
    return i[best], j[best]


def separate_pairs(matrix: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The pairs (i, j) with the largest values above 0, largest first, no two of which share a gene.

    So a large group of correlated genes does not fill the list.
    """
    left = np.triu(matrix, 1)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < min(count, len(left) // 2):
        i, j = np.unravel_index(left.argmax(), left.shape)
        if left[i, j] <= 0:
            break
        pairs.append((int(i), int(j)))
        for gene in (i, j):
            left[gene] = left[:, gene] = 0
    return pairs


def adjusted(p: np.ndarray) -> np.ndarray:
    """False discovery rates (genes, genes) from p-values, over all pairs (Benjamini and Hochberg 1995)."""
    above = np.triu_indices(len(p), 1)
    q = np.zeros(p.shape)
    q[above] = stats.false_discovery_control(p[above])
    return q + q.T


def cluster_tree(matrix: np.ndarray) -> np.ndarray:
    """Average linkage of genes by the distance ``1 - r``, in scipy's format; leaves in optimal order for few genes."""
    from scipy.cluster.hierarchy import linkage

    above = np.triu_indices(len(matrix), 1)
    distance = np.clip(1 - matrix[above].astype(np.float64), 0, 2)
    return linkage(distance, "average", optimal_ordering=len(matrix) <= _ORDERED_GENES)
