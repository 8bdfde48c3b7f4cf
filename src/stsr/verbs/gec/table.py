"""What gec computes: genes by genes as AnnData, and how far such matrices are from measured ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from stsr.errors import StsrError, UsageError
from stsr.progress import Progress
from stsr.store.gec_places import BinPlaces, CellPlaces, SpotPlaces
from stsr.verbs.gec import matrices
from stsr.verbs.gec.correlogram import Correlogram, effective_places, modified_t_test

LAG_PAIRS = 10
"""So many of the strongest pairs that share no gene have their correlation by distance kept."""
LONGEST_LAG_UM = 500.0
_READ_GENES = 16  # together: a chunk of a map on disk
_LEAST_SPREAD = 1e-6  # of the mean: what varies less is constant but for rounding
_RAW, _CORRECTED = "raw", "noise-corrected"

Places = BinPlaces | CellPlaces | SpotPlaces


def varying(places: Places, genes: Sequence[str]) -> tuple[list[str], pd.DataFrame]:
    """The genes that vary over the places, and their mean and variance (index: genes).

    Raises
    ------
    StsrError
        If fewer than two do, or values are no numbers.
    """
    mean, variance = matrices.moments(_reader(places, genes), len(genes))
    if not np.isfinite(mean).all():
        raise StsrError(
            f"{places.name} has values that are no numbers; make it again, or name another --from"
        )
    kept = np.sqrt(variance) > _LEAST_SPREAD * np.abs(mean)
    if kept.sum() < 2:
        raise StsrError(
            f"{kept.sum()} of {len(kept)} genes of {places.name} vary here, and two are needed; "
            "give more --genes or a larger --region"
        )
    found = pd.DataFrame({"mean": mean[kept], "variance": variance[kept]}, index=np.asarray(genes)[kept])
    return list(found.index), found


def correlate(
    places: BinPlaces | CellPlaces,
    genes: Sequence[str],
    top: int,
    lags: Sequence[tuple[str, str]],
    progress: Progress,
):
    """All that is known of the genes' correlation.

    Parameters
    ----------
    places, genes
        Where, and genes that vary there.
    top
        Number of strongest pairs listed.
    lags
        Pairs whose correlation by distance is wanted besides.
    progress
        Called with (done, total, label).

    Returns
    -------
    table
        AnnData (genes, genes): X Pearson, layers ``spearman``, ``effective_places``, ``p``, ``q``; obs and var
        ``order`` (place in the clustered order); uns ``linkage``, ``pairs``, ``lags``.
    """
    from anndata import AnnData
    from scipy.cluster.hierarchy import leaves_list

    read, count = _reader(places, genes), len(genes)
    pearson = matrices.pearson_matrix(read, count, places.count, _labelled(progress, "Pearson"))
    spearman = matrices.spearman_matrix(read, count, places.count, _labelled(progress, "Spearman"))
    correlogram = Correlogram(places.number, places.grid.bin_um)
    effective, p = _tested(pearson, _autocorrelations(places, genes, correlogram, progress), correlogram)
    tree = matrices.cluster_tree(pearson)
    about = pd.DataFrame({"order": np.argsort(leaves_list(tree))}, index=pd.Index(genes, dtype=object))
    table = AnnData(pearson, obs=about, var=about.copy())
    q = matrices.adjusted(p)
    for name, layer in (("spearman", spearman), ("effective_places", effective), ("p", p), ("q", q)):
        table.layers[name] = layer
    table.uns["linkage"] = tree
    table.uns["pairs"] = _pairs(table, top)
    _look_closer(table, places, correlogram, lags, progress)
    return table


def _tested(pearson, auto, correlogram) -> tuple[np.ndarray, np.ndarray]:
    """Effective places float32 and p-values (genes, genes), a block of rows at a time."""
    effective, p = np.empty(pearson.shape, np.float32), np.empty(pearson.shape)
    for start in range(0, len(pearson), 256):
        rows = slice(start, start + 256)
        effective[rows] = effective_places(auto[rows], auto, correlogram.pairs)
        p[rows] = modified_t_test(pearson[rows], effective[rows])
    np.fill_diagonal(p, 0)
    return effective, p


def _autocorrelations(places, genes, correlogram, progress) -> np.ndarray:
    parts = []
    for start in range(0, len(genes), _READ_GENES):
        values = matrices.standardised(places.read(genes[start : start + _READ_GENES]))
        parts.append(correlogram.auto(places.rasters(values)))
        progress(start, len(genes), "autocorrelation")
    return np.concatenate(parts)


def _pairs(table, top: int) -> pd.DataFrame:
    """The strongest pairs, a row each."""
    i, j = matrices.strongest_pairs(table.X, top)
    found = {"gene_a": table.obs_names[i].astype(str), "gene_b": table.obs_names[j].astype(str)}
    found["pearson"] = table.X[i, j].astype(float)
    for layer in ("spearman", "effective_places", "p", "q"):
        found[layer] = table.layers[layer][i, j].astype(float)
    return pd.DataFrame(found)


def _look_closer(table, places, correlogram, lags, progress) -> None:
    """Correlation by distance of the pairs asked for and of strong ones, and shift tests of the strongest."""
    pairs, genes = table.uns["pairs"], table.obs_names
    if isinstance(places, BinPlaces):
        tests = []
        for number, (a, b) in enumerate(zip(pairs["gene_a"], pairs["gene_b"], strict=True)):
            tests.append(correlogram.shift_test(*places.rasters(matrices.standardised(places.read([a, b])))))
            progress(number + 1, len(pairs), "shifting pairs")
        pairs["p_shift"] = tests
    strong = [(genes[i], genes[j]) for i, j in matrices.separate_pairs(table.X, LAG_PAIRS)]
    half_um = min(places.grid.shape) * places.grid.bin_um / 2  # farther apart are few pairs
    near = correlogram.lags_um <= min(LONGEST_LAG_UM, half_um)
    curves = []
    for a, b in dict.fromkeys([*lags, *strong]):
        values = matrices.standardised(places.read([a, b]))
        curve = correlogram.cross(*places.rasters(values), float(values[0].astype(float) @ values[1]))
        about = {"gene_a": a, "gene_b": b, "lag_um": correlogram.lags_um[near]}
        curves.append(pd.DataFrame({**about, "correlation": curve[near]}))
    table.uns["lags"] = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()


def known_pair(genes: Sequence[str], pair: tuple[str, str]) -> tuple[str, str]:
    """A pair whose correlation by distance is wanted, if both genes are there.

    Raises
    ------
    UsageError
        If one is not, or both are the same.
    """
    for gene in pair:
        if gene not in genes:
            raise UsageError(
                f"{gene!r} is not among the {len(genes)} genes that are correlated here; see --genes"
            )
    if pair[0] == pair[1]:
        raise UsageError(f"--lag {pair[0]}:{pair[1]} names one gene twice; name two")
    return tuple(pair)


# ------------------------------------------------------------------------------------------- against the truth


def shared_genes(genes: Sequence[str], layers: Sequence[Places], denoise: bool) -> dict[str, pd.DataFrame]:
    """Mean and variance (index: genes) in each layer, the truth first, of the genes that vary in all of them.

    Raises
    ------
    UsageError
        If fewer than three genes are left, or the truth to be corrected for counting noise holds no counts.
    """
    genes, found = list(genes), {}
    for layer in layers:
        there = set(layer.genes)
        genes = [gene for gene in genes if gene in there]
        if len(genes) > 1:
            genes, found[layer.name] = varying(layer, genes)
    if len(genes) < 3:
        raise UsageError(
            f"only {len(genes)} genes vary in all of {', '.join(layer.name for layer in layers)}; "
            "matrices are compared from three on"
        )
    if denoise:
        values = layers[0].read(genes[:_READ_GENES])
        if not np.array_equal(values, np.rint(values)):
            raise UsageError(
                f"{layers[0].name} holds no counts, so there is no counting noise; leave out --denoise-truth"
            )
    return {name: frame.loc[genes] for name, frame in found.items()}


def compare(
    table, layers: Sequence[Places], moments: dict[str, pd.DataFrame], own: str, denoise: bool
) -> None:
    """Add what was measured to a table of `correlate`, and how far its and others' matrices are from that.

    Parameters
    ----------
    table
        Gets the layers ``truth`` and, if asked, ``truth_denoised`` (nan where not measured), and in ``uns`` the table
        ``agreement``: a row for each map, kind of correlation and kind of truth.
    layers
        The truth, raw counts, and what stands beside: maps, cells, spots.
    moments
        Of `shared_genes`.
    own
        What the table's own matrix is called.
    denoise
        Compare with the truth corrected for counting noise as well, and correct the spots likewise.
    """
    truth, others = layers[0], layers[1:]
    genes = list(moments[truth.name].index)
    measured = _matrices(truth, genes)
    truths = [("pearson", _RAW, measured["pearson"]), ("spearman", _RAW, measured["spearman"])]
    if denoise:
        corrected = _corrected(measured["pearson"], moments[truth.name])
        truths.append(("pearson", _CORRECTED, corrected))
        _add_layer(table, "truth_denoised", genes, corrected)
    _add_layer(table, "truth", genes, measured["pearson"])
    index = table.obs_names.get_indexer(genes)
    own_matrices = {"pearson": table.X, "spearman": table.layers["spearman"]}
    own_matrices = {kind: matrix[np.ix_(index, index)] for kind, matrix in own_matrices.items()}
    rows = _rows(own, truth.count, own_matrices, truths)
    for other in others:
        found = _matrices(other, genes)
        rows += _rows(other.name, other.count, found, truths)
        if denoise and isinstance(other, SpotPlaces):  # counts as well: like with like
            fair = {"pearson": _corrected(found["pearson"], moments[other.name])}
            rows += _rows(f"{other.name}, {_CORRECTED}", other.count, fair, truths[-1:])
    table.uns["agreement"] = pd.DataFrame(rows)


def _rows(label: str, places: int, computed: dict, truths: list) -> list[dict]:
    """Distances of one map's matrices from each kind of truth."""
    return [
        {"map": label, "places": places, "correlation": kind, "truth": noise}
        | matrices.matrix_distance(computed[kind], truth)
        for kind, noise, truth in truths
    ]


def _matrices(places: Places, genes: Sequence[str]) -> dict[str, np.ndarray]:
    arguments = _reader(places, genes), len(genes), places.count
    return {
        "pearson": matrices.pearson_matrix(*arguments),
        "spearman": matrices.spearman_matrix(*arguments),
    }


def _corrected(pearson: np.ndarray, moments: pd.DataFrame) -> np.ndarray:
    mean, variance = (moments[column].to_numpy() for column in ("mean", "variance"))
    return matrices.without_counting_noise(pearson, mean, variance)


def _add_layer(table, name: str, genes: Sequence[str], matrix: np.ndarray) -> None:
    whole = np.full(table.shape, np.nan, np.float32)
    index = table.obs_names.get_indexer(genes)
    whole[np.ix_(index, index)] = matrix
    table.layers[name] = whole


def _reader(places: Places, genes: Sequence[str]) -> matrices.Read:
    return lambda part: places.read(genes[part])


def _labelled(progress: Progress, label: str) -> matrices.Progress:
    return lambda done, total: progress(done, total, label)
