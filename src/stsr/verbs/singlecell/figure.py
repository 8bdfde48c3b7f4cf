"""Figures of cells: the H&E, and every cell in the colour of its counts, inferred beside measured.

Counts of a cell are drawn as a density, counts per 100 um^2, as maps and spots are in `stsr.figures`: else
large cells would shine for being large.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely

from stsr import figures
from stsr.errors import UsageError
from stsr.geometry.grid import Grid
from stsr.verbs.singlecell import segmentation

_GENES = 3  # drawn by default, the most counted ones
_UNIT_UM2 = 100.0
_LEAST_DENSITY = 0.2  # top of a scale: an absent gene stays dark
_MAX_PX = 1200  # of the H&E, along a side
_RIMS_UM = 700.0  # a wider view shows so many cells that rims would hide them


def cells_figure(
    section,
    element: str,
    genes: Sequence[str] | None,
    path: str | Path,
    *,
    region_um: tuple[float, float, float, float] | None = None,
) -> Path:
    """Draw the H&E, cells coloured by a gene, and measured beside inferred where there is both; a row for each gene.

    Parameters
    ----------
    section
        A `stsr.store.section.Section`.
    element
        A table by `stsr.singlecell`.
    genes
        One row each; the three most counted by default.
    path
        The figure; its suffix gives the format.
    region_um
        (x0, y0, x1, y1) to draw; all cells by default.

    Returns
    -------
    path
        The written file.

    Raises
    ------
    UsageError
        If a gene is not in the table, no cell lies in the region, or the format is unknown.
    """
    from matplotlib import rc_context

    path = figures.check_path(path)
    table, cells = section.sdata.tables[element], segmentation.of_table(section, element)
    view = _view(cells.outlines, region_um)
    shown = shapely.intersects(cells.outlines, shapely.box(*view.bounds_um))
    if not shown.any():
        raise UsageError("no cell lies in --figure-region; choose another area")
    columns = _columns(section, element, cells)
    picture = None if section.image is None else np.moveaxis(section.image.read(view), 0, -1)
    genes = _genes(table, genes)
    with rc_context({"font.size": 8, "svg.fonttype": "none", "pdf.fonttype": 42}):
        panels = [None, *columns] if picture is not None else list(columns)
        figure, axes = figures.canvas(len(genes), panels, view)
        for row, gene in zip(axes, genes, strict=True):
            densities = {title: density(gene)[shown] for title, density in columns.items()}
            _draw_row(row, gene, cells.outlines[shown], densities, picture, view)
        for axis, title in zip(axes[0], ["H&E", *columns][-len(panels) :], strict=True):
            axis.set_title(title, fontsize=9)
        figure.suptitle(f"{section.name}: {element}", fontsize=9, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=figures.DPI, bbox_inches="tight", facecolor="white")
    return path


def _genes(table, asked: Sequence[str] | None) -> list[str]:
    if asked is None:
        totals = np.asarray(table.X.sum(0)).ravel()
        return [str(table.var_names[number]) for number in totals.argsort()[::-1][:_GENES]]
    missing = [gene for gene in asked if gene not in table.var_names]
    if missing:
        raise UsageError(f"{missing[0]!r} is not in the table; name others with --figure-genes")
    return list(asked)


def _view(outlines: np.ndarray, region_um) -> Grid:
    """The pixels that the H&E is drawn in, over the region or all cells."""
    x0, y0, x1, y1 = region_um or shapely.total_bounds(outlines)
    step = max(x1 - x0, y1 - y0) / _MAX_PX
    return Grid(x0, y0, step, max(1, round((y1 - y0) / step)), max(1, round((x1 - x0) / step)))


def _columns(section, element: str, cells) -> dict:
    """{title: gene -> density (n,)}, nan for cells in which the gene was not measured."""
    table = section.sdata.tables[element]
    units = shapely.area(cells.outlines) / _UNIT_UM2

    def inferred(gene: str) -> np.ndarray:
        return table.to_df()[gene].to_numpy() / units

    title = f"cells of {section.provenance.get(element, {}).get('from', element)}"
    measured = segmentation.measured_counts(section, cells)
    if measured is None:
        return {title: inferred}
    counts, genes, rows = measured

    def counted(gene: str) -> np.ndarray:
        density = np.full(len(units), np.nan)
        if gene in genes:
            density[rows] = counts[:, [genes.index(gene)]].toarray().ravel() / units[rows]
        return density

    return {title: inferred, "cells as measured": counted}


def _draw_row(axes, gene: str, outlines: np.ndarray, densities: dict, picture, view: Grid) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    known = [density[np.isfinite(density)] for density in densities.values()]
    # As in maps: single counts in small measured cells are spikes, and would leave expectations in the dark.
    scale = Normalize(0, figures.scale_top(known[:1], _LEAST_DENSITY))
    if picture is not None:
        _frame(axes[0], picture, view)
    for axis, density in zip(axes[-len(densities) :], densities.values(), strict=True):
        _frame(axis, None if picture is None else picture // 2 + 127, view)  # paler, so that cells stand out
        _colour(axis, outlines, density, scale, view)
    axes[0].set_ylabel(gene, fontstyle="italic", fontsize=11)
    figures.scale_bar(axes[0], view)
    coloured = ScalarMappable(scale, figures.COLOURS)
    bar = axes[0].figure.colorbar(coloured, ax=axes[-1], shrink=0.85, pad=0.03, extend="max")
    bar.set_label(figures.UNIT)
    bar.outline.set_visible(False)


def _frame(axis, picture, view: Grid) -> None:
    if picture is None:
        axis.set_facecolor(figures.OUTSIDE)
    else:
        axis.imshow(picture, extent=figures.extent(view), interpolation="antialiased")
    x0, y0, x1, y1 = view.bounds_um
    axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], aspect="equal")
    for side in axis.spines.values():
        side.set_visible(False)


def _colour(axis, outlines: np.ndarray, density: np.ndarray, scale, view: Grid) -> None:
    """Cells in the colours of their densities; cells of several parts as their parts, unknown ones left out."""
    from matplotlib.collections import PolyCollection

    parts, cell = shapely.get_parts(outlines, return_index=True)
    seen = np.isfinite(density[cell])
    parts, cell = parts[seen], cell[seen]
    corners, part = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
    rings = np.split(corners, np.flatnonzero(np.diff(part)) + 1) if len(parts) else []
    rims = (
        {"edgecolor": "black", "linewidth": 0.25}
        if view.width * view.bin_um <= _RIMS_UM
        else {"linewidth": 0}
    )
    drawn = PolyCollection(
        rings, array=density[cell], cmap=figures.COLOURS, norm=scale, rasterized=True, **rims
    )
    axis.add_collection(drawn, autolim=False)
