"""Figure of an evaluation: scores of the ways, and the best way against kriging gene by gene."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.figures import check_path, new_figure, save, style
from stsr.verbs.evaluate.ways import KRIGED, MODEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stsr.verbs.evaluate.verb import Evaluation

_NAMED = 6  # genes


def evaluation_figure(result: Evaluation, path: str | Path) -> Path:
    """Draw an evaluation.

    Left: mean PCC of hidden spots with 95 % intervals, per way, for scattered spots and for blocks. Right: PCC of each
    gene over scattered spots, of the best way (or of the model, if kriging is best) against kriging of
    denoised spots.

    Parameters
    ----------
    result
        What `stsr.evaluate` returned.
    path
        The figure; its suffix gives the format.

    Returns
    -------
    path
        The written file.
    """
    path = check_path(path)
    with style():
        figure = new_figure(10.0, 0.45 * result.ways["way"].nunique() + 1.8)
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        _draw_ways(left, result)
        _draw_genes(right, result)
        figure.suptitle(f"{result.section}: {result.spots:,} hidden spots, {result.genes:,} genes")
        save(figure, path)
    return path


def _draw_ways(axes: Axes, result: Evaluation) -> None:
    names = list(dict.fromkeys(result.ways["way"]))[::-1]
    for shift, (kind, part) in zip((0.12, -0.12), result.ways.groupby("hidden", sort=False), strict=False):
        rows = part.set_index("way").loc[names]
        spread = np.abs(rows[["pcc_low", "pcc_high"]].to_numpy() - rows[["pcc"]].to_numpy()).T
        axes.errorbar(
            rows["pcc"], np.arange(len(names)) + shift, xerr=spread, fmt="o", ms=4, lw=1.2, label=kind
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("PCC of hidden spots, mean over genes (95 % interval)")
    axes.legend(title="hidden spots", loc="lower left", bbox_to_anchor=(-0.65, -0.2), frameon=False, ncols=2)


def _draw_genes(axes: Axes, result: Evaluation) -> None:
    scattered = result.per_gene[result.per_gene["hidden"] == "scattered"]
    models = [way for way in result.ways["way"].unique() if way.startswith("model")]
    shown = result.best if result.best != KRIGED or not models else MODEL
    own, plain = (scattered[scattered["way"] == way].set_index("gene")["pcc"] for way in (shown, KRIGED))
    axes.axline((0, 0), slope=1, color="0.7", lw=0.8)
    axes.scatter(plain, own, s=8, alpha=0.7, lw=0)
    gain = (own - plain).dropna().sort_values()
    for gene in [*gain.index[: _NAMED // 2], *gain.index[-_NAMED // 2 :]]:
        axes.annotate(gene, (plain[gene], own[gene]), fontsize=6, xytext=(2, 2), textcoords="offset points")
    axes.set_xlabel(f"PCC of a gene, {KRIGED}")
    axes.set_ylabel(shown)
    axes.set_aspect("equal", adjustable="datalim")
