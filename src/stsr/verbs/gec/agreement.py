"""How far correlation matrices are from those of measured counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stsr.errors import UsageError
from stsr.store.places import SpotPlaces
from stsr.verbs.gec import matrices
from stsr.verbs.gec.table import varying
from stsr.verbs.gec.values import Values

if TYPE_CHECKING:
    from anndata import AnnData

_LOOKED_AT = 16  # genes inspected to decide whether values are counts
_LEAST_GENES = 3
_RAW, _CORRECTED = "raw", "noise-corrected"


def shared_genes(genes: Sequence[str], layers: Sequence[Values], denoise: bool) -> dict[str, pd.DataFrame]:
    """Mean and variance (index: genes) in each layer, the truth first, of the genes that vary in all of them.

    Raises
    ------
    UsageError
        If fewer than three genes are left, or the truth to be corrected for counting noise holds no counts.
    """
    genes = list(genes)
    found: dict[str, pd.DataFrame] = {}
    for layer in layers:
        genes = [gene for gene in genes if gene in layer.genes]
        if len(genes) > 1:
            genes, found[layer.name] = varying(layer, genes)
    if len(genes) < _LEAST_GENES:
        raise UsageError(
            f"only {len(genes)} genes vary in all of {', '.join(layer.name for layer in layers)}; "
            "at least three are needed to compare matrices"
        )
    if denoise:
        values = layers[0].read(genes[:_LOOKED_AT])
        if not np.array_equal(values, np.rint(values)):
            raise UsageError(
                f"{layers[0].name} holds no counts, so there is no counting noise; leave out --denoise-truth"
            )
    return {name: frame.loc[genes] for name, frame in found.items()}


def compare(
    table: AnnData, layers: Sequence[Values], moments: dict[str, pd.DataFrame], *, own: str, denoise: bool
) -> None:
    """Add measured correlations to a table of `correlate`, and the distance of its and other matrices from them.

    Parameters
    ----------
    table
        Gets the layers ``truth`` and, if asked, ``truth_denoised`` (NaN where not measured), and in ``uns`` the table
        ``agreement``: a row per map, kind of correlation and kind of truth.
    layers
        The truth (raw counts), then the maps, cells or spots to compare besides.
    moments
        Of `shared_genes`.
    own
        Name of the table's own map.
    denoise
        Also compare with the truth corrected for counting noise, and correct the spots likewise.
    """
    truth, others = layers[0], layers[1:]
    genes = list(moments[truth.name].index)
    measured = _matrices(truth, genes)
    truths = [("pearson", _RAW, measured["pearson"]), ("spearman", _RAW, measured["spearman"])]
    if denoise:
        corrected = _corrected(measured["pearson"], moments[truth.name])
        truths.append(("pearson", _CORRECTED, corrected))
        add_layer(table, "truth_denoised", genes, corrected)
    add_layer(table, "truth", genes, measured["pearson"])
    index = table.obs_names.get_indexer(genes)
    whole = {"pearson": table.X, "spearman": table.layers["spearman"]}
    own_matrices = {kind: matrix[np.ix_(index, index)] for kind, matrix in whole.items()}
    rows = _rows(own, truth.count, own_matrices, truths)
    for other in others:
        found = _matrices(other, genes)
        rows += _rows(other.name, other.count, found, truths)
        if denoise and other.name == SpotPlaces.name:  # counts, too: correct them like the truth
            fair = {"pearson": _corrected(found["pearson"], moments[other.name])}
            rows += _rows(f"{other.name}, {_CORRECTED}", other.count, fair, truths[-1:])
    table.uns["agreement"] = pd.DataFrame(rows)


def add_layer(table: AnnData, name: str, genes: Sequence[str], matrix: np.ndarray) -> None:
    """Add a matrix of some of the table's genes as a layer; NaN for the others."""
    whole = np.full(table.shape, np.nan, np.float32)
    index = table.obs_names.get_indexer(genes)
    whole[np.ix_(index, index)] = matrix
    table.layers[name] = whole


def _rows(
    label: str, places: int, computed: dict[str, np.ndarray], truths: Sequence[tuple[str, str, np.ndarray]]
) -> list[dict[str, object]]:
    """Distances of one map's matrices from each kind of truth."""
    return [
        {"map": label, "places": places, "correlation": kind, "truth": noise}
        | matrices.matrix_distance(computed[kind], truth)
        for kind, noise, truth in truths
    ]


def _matrices(values: Values, genes: Sequence[str]) -> dict[str, np.ndarray]:
    arguments = values.reader(genes), len(genes), values.count
    return {"pearson": matrices.pearson_matrix(*arguments), "spearman": matrices.spearman_matrix(*arguments)}


def _corrected(pearson: np.ndarray, moments: pd.DataFrame) -> np.ndarray:
    mean, variance = (moments[column].to_numpy() for column in ("mean", "variance"))
    return matrices.without_counting_noise(pearson, mean, variance)
