"""Figures of cells: the H&E, and each cell coloured by its density of counts, inferred beside measured.

Counts of a cell are drawn per 100 µm², as maps and spots are in `stsr.figures`; otherwise large cells would stand out
for their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from stsr import figures
from stsr.errors import UsageError
from stsr.geometry.grid import Grid
from stsr.store.parts import Cells
from stsr.store.section import Section
from stsr.verbs.singlecell import segmentation
from stsr.verbs.singlecell.job import Region
from stsr.verbs.singlecell.scores import measured_counts

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

_GENES = 3  # drawn by default: those with the most counts
_MIN_DENSITY = 0.2  # smallest top of a scale: a gene that is not expressed stays dark
_RIMS_UM = 700.0  # in wider views, outlines would hide the many small cells


def cells_figure(
    section: Section,
    element: str,
    genes: Sequence[str] | None,
    path: str | Path,
    *,
    region_um: Region | None = None,
) -> Path:
    """Draw the H&E, inferred counts of cells, and measured ones if there are any; one row per gene.

    Parameters
    ----------
    section
        The section.
    element
        A table written by `stsr.singlecell`.
    genes
        One row each; by default the three with the most counts.
    path
        Output file; its suffix sets the format.
    region_um
        (x0, y0, x1, y1) to draw; all cells by default.

    Returns
    -------
    path
        The written file.

    Raises
    ------
    UsageError
        If a gene is not in the table, no cell lies in the region, or the format is not supported.
    """
    path = figures.check_path(path)
    table, cells = section.sdata.tables[element], segmentation.of_table(section, element)
    x0, y0, x1, y1 = region_um or shapely.total_bounds(cells.polygons)
    view = Grid.over((x0, y0, x1, y1), max(x1 - x0, y1 - y0) / figures.MAX_PX)
    shown = shapely.intersects(cells.polygons, shapely.box(*view.bounds_um))
    if not shown.any():
        raise UsageError("no cell lies in --figure-region; choose another area")
    columns = _columns(section, element, cells)
    picture = None if section.image is None else figures.Histology(section, view, view.bin_um)
    titles = [*columns] if picture is None else ["H&E", *columns]
    genes = _genes(table, genes)
    with figures.style():
        figure, axes = figures.canvas(len(genes), len(titles), view)
        for row, gene in zip(axes, genes, strict=True):
            densities = [density(gene)[shown] for density in columns.values()]
            _draw_row(row, gene, cells.polygons[shown], densities, picture, view)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
        figures.save(figure, path, f"{section.name}: {element}")
    return path


def _genes(table: AnnData, asked: Sequence[str] | None) -> list[str]:
    if asked is None:
        totals = np.asarray(table.X.sum(0)).ravel()
        return [str(table.var_names[number]) for number in totals.argsort()[::-1][:_GENES]]
    missing = [gene for gene in asked if gene not in table.var_names]
    if missing:
        raise UsageError(f"{missing[0]!r} is not in the table; name others with --figure-genes")
    return list(asked)


def _columns(section: Section, element: str, cells: Cells) -> dict[str, Callable[[str], np.ndarray]]:
    """{title: gene -> density (n,)}, NaN for cells in which the gene was not measured."""
    table = section.sdata.tables[element]
    units = shapely.area(cells.polygons) / figures.UNIT_UM2

    def inferred(gene: str) -> np.ndarray:
        return table.to_df()[gene].to_numpy() / units

    title = f"cells from {section.provenance.get(element, {}).get('from', element)}"
    measured = measured_counts(section, cells)
    if measured is None:
        return {title: inferred}

    def counted(gene: str) -> np.ndarray:
        density = np.full(len(units), np.nan)
        if gene in measured.genes:
            counts = measured.counts[:, [measured.genes.index(gene)]].toarray().ravel()
            density[measured.rows] = counts / units[measured.rows]
        return density

    return {title: inferred, "cells as measured": counted}


def _draw_row(
    axes: np.ndarray,
    gene: str,
    polygons: np.ndarray,
    densities: Sequence[np.ndarray],
    picture: figures.Histology | None,
    view: Grid,
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # Inferred densities set the scale: single counts in small measured cells are outliers, and would leave it dark.
    inferred = densities[0][np.isfinite(densities[0])]
    scale = Normalize(0, figures.scale_top([inferred], _MIN_DENSITY))
    if picture is not None:
        picture.draw(axes[0])
    for axis, density in zip(axes[-len(densities) :], densities, strict=True):
        if picture is None:
            axis.set_facecolor(figures.OUTSIDE)
        else:
            picture.draw(axis, pale=True)
        _draw_cells(axis, polygons, density, scale, view)
    for axis in axes:
        figures.frame(axis, view)
    axes[0].set_ylabel(gene, fontstyle="italic", fontsize=11)
    figures.scale_bar(axes[0], view)
    figures.colour_bar(axes[-1], ScalarMappable(scale, figures.COLOURS))


def _draw_cells(axis: Axes, polygons: np.ndarray, density: np.ndarray, scale: Normalize, view: Grid) -> None:
    """Colour cells by density; cells with NaN are left out."""
    from matplotlib.collections import PolyCollection

    known = np.isfinite(density)
    rings, cell = figures.rings_of(polygons[known])
    narrow = view.width * view.bin_um <= _RIMS_UM
    rims: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.25} if narrow else {"linewidth": 0}
    drawn = PolyCollection(
        rings, array=density[known][cell], cmap=figures.COLOURS, norm=scale, rasterized=True, **rims
    )
    axis.add_collection(drawn, autolim=False)
