"""Figure of gene correlation: clustered matrix, strongest pairs, correlation by distance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from stsr.figures import check_path, new_figure, save, style
from stsr.verbs.gec.matrices import separate_pairs

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = "RdBu_r"
_MISSING = "0.85"
_NAMED_GENES = 60  # more names would not be legible; groups are named instead, by their most typical genes
_GROUPS = 9  # at most
_CUTS = 200  # of the tree to try
_LEAST_GROUP = 0.03  # of the genes; smaller groups have no room for a name
_TYPICAL = 3  # genes in the name of a group
_CURVES = 5
_TOGETHER, _APART = 8, 4  # positive and negative pairs in the bar plot
_TOP_QUANTILE = 0.99


def gec_figure(table: AnnData, path: str | Path, title: str) -> Path:
    """Draw a table of `stsr.gec`.

    Left: clustered heatmap with dendrogram, with the measured correlations below the diagonal if the table has them.
    Top right: correlation by distance of requested and of the strongest pairs. Bottom right: the strongest pairs
    or, with a truth, the correlation of every pair against the measured one.

    Parameters
    ----------
    table
        AnnData (genes, genes), as ``sdata.tables["gec_x10"]``.
    path
        The figure; its suffix gives the format.
    title
        Title of the figure.

    Returns
    -------
    path
        The written file.

    Raises
    ------
    UsageError
        If the format is unknown.
    """
    path = check_path(path)
    with style(9):
        figure = new_figure(13.5, 8.2)
        halves = figure.subfigures(1, 2, width_ratios=(2.05, 1), wspace=0.03)
        left, right = cast("np.ndarray", halves)
        _draw_matrix(left, table)
        upper, lower = right.subplots(2, 1)
        _draw_curves(upper, table.uns["lags"])
        truth = _truth(table)
        if truth is None:
            _draw_bars(lower, table)
        else:
            _draw_agreement(lower, table, *truth)
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        save(figure, path)
    return path


def _truth(table: AnnData) -> tuple[np.ndarray, str] | None:
    """The measured matrix and its name in labels; the noise-corrected one if there is one."""
    for layer, words in (("truth_denoised", "measured, noise-corrected"), ("truth", "measured")):
        if layer in table.layers:
            return np.asarray(table.layers[layer], float), words
    return None


# ------------------------------------------------------------------------------------------------------- matrix


def _draw_matrix(figure: SubFigure, table: AnnData) -> None:
    from scipy.cluster.hierarchy import leaves_list

    tree, matrix = np.asarray(table.uns["linkage"], float), np.asarray(table.X, float)
    order = leaves_list(tree)
    shown, truth = matrix[np.ix_(order, order)], _truth(table)
    if truth is not None:
        below = np.tril_indices(len(shown), -1)
        shown[below] = truth[0][np.ix_(order, order)][below]
    np.fill_diagonal(shown, np.nan)  # always 1
    top, axis = figure.subplots(2, 1, height_ratios=(0.07, 1))
    _draw_tree(top, tree)
    axis.set_facecolor(_MISSING)
    limit = _limit(shown)
    drawn = axis.imshow(shown, cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    _name_genes(axis, table.obs_names.to_numpy()[order], tree, matrix, order)
    for side in axis.spines.values():
        side.set_visible(False)
    extend = "both" if np.nanmax(np.abs(shown)) > limit else "neither"
    bar = figure.colorbar(
        drawn, ax=[top, axis], location="bottom", shrink=0.45, aspect=35, pad=0.02, extend=extend
    )
    bar.set_ticks([-limit, -limit / 2, 0, limit / 2, limit])
    bar.outline.set_visible(False)
    words = "Pearson correlation of genes"
    bar.set_label(
        words if truth is None else f"{words}: map above the diagonal, {truth[1]} below{_noisy(shown)}"
    )


def _noisy(shown: np.ndarray) -> str:
    return " (grey: not available)" if np.isnan(shown[~np.eye(len(shown), dtype=bool)]).any() else ""


def _limit(shown: np.ndarray) -> float:
    """Limit of the symmetric colour scale: the 99 % quantile of absolute values, rounded up to a tenth."""
    quantile = np.nanquantile(np.abs(shown), _TOP_QUANTILE)
    return float(np.clip(np.ceil(quantile * 10) / 10, 0.1, 1))


def _draw_tree(axis: Axes, tree: np.ndarray) -> None:
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(tree, no_plot=True)
    for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        axis.plot(np.array(x) / 10 - 0.5, y, color="0.35", lw=0.6)
    axis.set(xlim=(-0.5, len(tree) + 0.5), ylim=(0, None))
    axis.set_axis_off()


def _name_genes(
    axis: Axes, genes: np.ndarray, tree: np.ndarray, matrix: np.ndarray, order: np.ndarray
) -> None:
    """Label every gene if there is room, else groups by their most typical genes."""
    if len(genes) <= _NAMED_GENES:
        size = float(np.clip(420 / len(genes), 6, 11))
        axis.set_xticks(range(len(genes)), genes, rotation=90, fontsize=size, fontstyle="italic")
        axis.set_yticks(range(len(genes)), genes, fontsize=size, fontstyle="italic")
        axis.tick_params(length=0, pad=2)
        return
    group = _groups(tree)[order]  # runs along the leaves
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    centres, labels = [], []
    for start, stop in zip(first, [*first[1:], len(group)], strict=True):
        members = order[start:stop]
        if len(members) >= _LEAST_GROUP * len(group):
            typical = np.argsort(-matrix[np.ix_(members, members)].mean(1), kind="stable")[:_TYPICAL]
            centres.append((start + stop - 1) / 2)
            ends = [1 - (start + 1) / len(group), 1 - (stop - 1) / len(group)]
            axis.plot([-0.008, -0.008], ends, color="0.35", lw=2, clip_on=False, transform=axis.transAxes)
            labels.append(", ".join(genes[start:stop][typical]) + f" ({len(members)})")
    axis.set_yticks(centres, labels, fontsize=8.5)
    axis.set_xticks([])
    axis.set_ylabel("groups, by their most typical genes (number of genes)")
    axis.tick_params(length=0, pad=7)


def _groups(tree: np.ndarray) -> np.ndarray:
    """Group of each gene, from the cut of the tree with the most groups that are large enough for a name."""
    from scipy.cluster.hierarchy import fcluster

    cuts = [fcluster(tree, count, "maxclust") for count in range(2, min(len(tree), _CUTS) + 1)]
    named = [(np.bincount(cut) >= _LEAST_GROUP * len(cut)).sum() for cut in cuts]
    return cuts[int(np.argmax(np.where(np.array(named) <= _GROUPS, named, 0)))]


# -------------------------------------------------------------------------------------------------------- pairs


def _draw_curves(axis: Axes, lags: pd.DataFrame) -> None:
    """Draw correlation by distance."""
    from matplotlib import colormaps

    curves = list(lags.groupby(["gene_a", "gene_b"], sort=False))[:_CURVES]
    for number, ((a, b), curve) in enumerate(curves):
        colour = colormaps["tab10"](number)
        axis.plot(curve["lag_um"], curve["correlation"], color=colour, lw=1.6, label=f"{a} – {b}")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xlabel="distance (µm)", ylabel="cross-correlation", xlim=(0, lags["lag_um"].max()))
    axis.set_title("correlation by distance", loc="left", fontsize=10)
    axis.legend(frameon=False, prop={"style": "italic", "size": 8.5}, handlelength=1.4)
    _open(axis)


def _draw_bars(axis: Axes, table: AnnData) -> None:
    """Draw the most positive and negative pairs, each gene once; pairs that are not significant are pale."""
    matrix, q = np.asarray(table.X), np.asarray(table.layers["q"])
    shown = [*separate_pairs(matrix, _TOGETHER), *separate_pairs(-matrix, _APART)[::-1]][::-1]
    genes = table.obs_names
    colours = ["#2f5d8a" if q[pair] < 0.05 else "#b9c7d6" for pair in shown]
    axis.barh(range(len(shown)), [matrix[pair] for pair in shown], color=colours, height=0.7)
    names = [f"{genes[i]} – {genes[j]}" for i, j in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8.5, fontstyle="italic")
    axis.set_xlabel("Pearson correlation (dark: false discovery rate < 5 %)")
    axis.set_title("most positive and negative pairs, each gene once", loc="left", fontsize=10)
    axis.axvline(0, color="0.6", lw=0.8)
    axis.tick_params(axis="y", length=0)
    _open(axis)


def _draw_agreement(axis: Axes, table: AnnData, truth: np.ndarray, words: str) -> None:
    """Draw the map's correlation of every pair against the measured one."""
    above = np.triu_indices(len(truth), 1)
    measured, inferred = truth[above], np.asarray(table.X, float)[above]
    known = np.isfinite(measured)
    low = min(measured[known].min(), inferred[known].min(), 0)
    axis.plot([low, 1], [low, 1], color="0.6", lw=0.8, zorder=3)
    axis.hexbin(
        measured[known], inferred[known], gridsize=55, bins="log", cmap="Greys", mincnt=1, linewidths=0
    )
    axis.set(xlabel=f"{words} correlation", ylabel="correlation in the map", aspect="equal")
    axis.set_title(f"{known.sum():,} pairs of genes", loc="left", fontsize=10)
    _open(axis)


def _open(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
