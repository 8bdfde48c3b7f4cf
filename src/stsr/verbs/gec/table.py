"""The table of gec: genes x genes as AnnData. Comparison with measured counts is in `stsr.verbs.gec.agreement`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stsr.errors import StsrError, UsageError
from stsr.progress import Progress
from stsr.store.places import BinPlaces, Places
from stsr.verbs.gec import matrices
from stsr.verbs.gec.correlogram import Correlogram, effective_places, modified_t_test
from stsr.verbs.gec.values import Values

if TYPE_CHECKING:
    from anndata import AnnData

LAG_PAIRS = 10
"""Correlation by distance is kept for this many of the strongest pairs, no two of which share a gene."""
LONGEST_LAG_UM = 500.0
_READ_GENES = 16  # at once: the genes of one chunk of a map on disk
_LEAST_SPREAD = 1e-6  # standard deviation / mean; below it a gene is constant up to rounding
_TESTED_ROWS = 256  # of the matrix at once


def varying(values: Values, genes: Sequence[str]) -> tuple[list[str], pd.DataFrame]:
    """The genes that vary over the places, and their mean and variance (index: genes).

    Raises
    ------
    StsrError
        If fewer than two do, or there are NaN or infinite values.
    """
    mean, variance = matrices.moments(values.reader(genes), len(genes))
    if not np.isfinite(mean).all():
        raise StsrError(
            f"{values.name} has NaN or infinite values; make it again, or name another element with --from"
        )
    kept = np.sqrt(variance) > _LEAST_SPREAD * np.abs(mean)
    if kept.sum() < 2:
        raise StsrError(
            f"{kept.sum()} of {len(kept)} genes of {values.name} vary here, and two are needed; "
            "give more --genes or a larger --region"
        )
    found = pd.DataFrame({"mean": mean[kept], "variance": variance[kept]}, index=np.asarray(genes)[kept])
    return list(found.index), found


def correlate(
    values: Values,
    places: Places,
    *,
    genes: Sequence[str],
    top: int,
    lags: Sequence[tuple[str, str]],
    progress: Progress,
) -> AnnData:
    """Correlate genes, test the correlations, and cluster the genes.

    Parameters
    ----------
    values, places
        Values of genes, and the places they belong to.
    genes
        Genes that vary there.
    top
        Number of strongest pairs to list.
    lags
        Pairs whose correlation by distance is computed besides that of the strongest.
    progress
        Called with (done, total, label).

    Returns
    -------
    table
        AnnData (genes, genes): X Pearson, layers ``spearman``, ``effective_places``, ``p``, ``q``; obs and var
        ``order`` (position in the clustered order); obs ``moran_i``; uns ``linkage``, ``pairs``, ``lags``.
    """
    from anndata import AnnData
    from scipy.cluster.hierarchy import leaves_list

    read, count = values.reader(genes), len(genes)
    pearson = matrices.pearson_matrix(read, count, places.count, progress)
    spearman = matrices.spearman_matrix(read, count, places.count, progress)
    correlogram = Correlogram(places.number, places.grid.bin_um)
    auto = _autocorrelations(values, places, genes, correlogram, progress)
    effective, p = _tested(pearson, auto, correlogram)
    tree = matrices.cluster_tree(pearson)
    about = pd.DataFrame({"order": np.argsort(leaves_list(tree))}, index=pd.Index(genes, dtype=object))
    table = AnnData(pearson, obs=about, var=about.copy())
    table.obs["moran_i"] = correlogram.moran(auto)
    q = matrices.adjusted(p)
    for name, layer in (("spearman", spearman), ("effective_places", effective), ("p", p), ("q", q)):
        table.layers[name] = layer
    table.uns["linkage"] = tree
    table.uns["pairs"] = _pairs(table, top)
    if isinstance(places, BinPlaces):
        _add_shift_tests(table.uns["pairs"], values, places, correlogram, progress)
    strong = [(genes[i], genes[j]) for i, j in matrices.separate_pairs(table.X, LAG_PAIRS)]
    table.uns["lags"] = _curves([*lags, *strong], values, places, correlogram)
    return table


def _tested(pearson: np.ndarray, auto: np.ndarray, correlogram: Correlogram) -> tuple[np.ndarray, np.ndarray]:
    """Effective places float32 and p-values (genes, genes), a block of rows at a time."""
    effective, p = np.empty(pearson.shape, np.float32), np.empty(pearson.shape)
    for start in range(0, len(pearson), _TESTED_ROWS):
        rows = slice(start, start + _TESTED_ROWS)
        effective[rows] = effective_places(auto[rows], auto, correlogram.pairs)
        p[rows] = modified_t_test(pearson[rows], effective[rows])
    np.fill_diagonal(p, 0)
    return effective, p


def _autocorrelations(
    values: Values, places: Places, genes: Sequence[str], correlogram: Correlogram, progress: Progress
) -> np.ndarray:
    """(genes, lags)."""
    parts = []
    for start in range(0, len(genes), _READ_GENES):
        standard = matrices.standardised(values.read(genes[start : start + _READ_GENES]))
        parts.append(correlogram.auto(places.raster(standard)))
        progress(start, len(genes), "autocorrelation")
    return np.concatenate(parts)


def _pairs(table: AnnData, top: int) -> pd.DataFrame:
    """The strongest pairs, a row each."""
    i, j = matrices.strongest_pairs(table.X, top)
    found = {"gene_a": table.obs_names[i].astype(str), "gene_b": table.obs_names[j].astype(str)}
    found["pearson"] = table.X[i, j].astype(float)
    for layer in ("spearman", "effective_places", "p", "q"):
        found[layer] = table.layers[layer][i, j].astype(float)
    return pd.DataFrame(found)


def _add_shift_tests(
    pairs: pd.DataFrame, values: Values, places: BinPlaces, correlogram: Correlogram, progress: Progress
) -> None:
    tests = []
    for number, (a, b) in enumerate(zip(pairs["gene_a"], pairs["gene_b"], strict=True)):
        tests.append(correlogram.shift_test(*places.raster(matrices.standardised(values.read([a, b])))))
        progress(number + 1, len(pairs), "shift tests")
    pairs["p_shift"] = tests


def _curves(
    pairs: Sequence[tuple[str, str]], values: Values, places: Places, correlogram: Correlogram
) -> pd.DataFrame:
    """Correlation of pairs by distance, a row for each pair and lag."""
    half_um = min(places.grid.shape) * places.grid.bin_um / 2  # few pairs of places are farther apart
    near = correlogram.lags_um <= min(LONGEST_LAG_UM, half_um)
    curves = []
    for a, b in dict.fromkeys(pairs):
        standard = matrices.standardised(values.read([a, b]))
        rasters = places.raster(standard)
        r = float(standard[0].astype(float) @ standard[1])
        curve = correlogram.cross(rasters[0], rasters[1], r)
        about = {"gene_a": a, "gene_b": b, "lag_um": correlogram.lags_um[near]}
        curves.append(pd.DataFrame({**about, "correlation": curve[near]}))
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()


def known_pair(genes: Sequence[str], pair: tuple[str, str]) -> tuple[str, str]:
    """A pair of genes for the correlation by distance, if both are available.

    Raises
    ------
    UsageError
        If one is missing, or both are the same.
    """
    a, b = pair
    for gene in pair:
        if gene not in genes:
            raise UsageError(
                f"{gene!r} is not among the {len(genes)} genes that are correlated here; see --genes"
            )
    if a == b:
        raise UsageError(f"--lag {a}:{b} names one gene twice; name two")
    return a, b
