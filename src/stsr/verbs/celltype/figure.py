"""Figure of a cell type map next to the H&E, with scale bar and legend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.figures import Histology, canvas, check_path, extent, frame, rings_of, save, scale_bar, style
from stsr.geometry.grid import Grid
from stsr.store.parts import Cells
from stsr.store.section import Section
from stsr.verbs.celltype.model import GREY, UNASSIGNED

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_PANEL_INCHES = 4.2
_LEGEND_INCHES = 1.9
_LEGEND_ROWS = 26  # per column
_CELLS_UM = 10.0  # bin size of the frame around cells

_Drawing = tuple[Callable[["Axes"], None], Grid, dict[str, int], dict[str, str]]
"""(drawing function, grid, {type: number}, {type: colour})."""


def celltype_figure(section: Section, element: str, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the H&E and the cell types next to it.

    Parameters
    ----------
    section
        The section.
    element
        A result of `stsr.celltype`: the labels of bins, or the table of cells.
    path
        The figure; its suffix gives the format.
    title
        Title of the figure; section, element and signature source by default.

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
    per = "bin" if section.elements[element] == "labels" else "cell"
    draw, grid, numbers, colours = (_bins if per == "bin" else _cells)(section, element)
    panels = 1 if section.image is None else 2
    legend = _LEGEND_INCHES * -(-len(numbers) // _LEGEND_ROWS)
    with style():
        figure, (axes,) = canvas(1, panels, grid, inches=_PANEL_INCHES, beside=legend, above=0.4)
        if section.image is not None:
            Histology(section, grid).draw(axes[0])
            axes[0].set_title("H&E", fontsize=9)
        draw(axes[-1])
        axes[-1].set_title(f"cell type per {per}", fontsize=9)
        for axis in axes:
            frame(axis, grid)
        scale_bar(axes[0], grid)
        _legend(axes[-1], numbers, colours)
        save(figure, path, title or _title(section, element))
    return path


def _title(section: Section, element: str) -> str:
    made = section.provenance.get(element, {})
    how = "Leiden clusters" if made.get("method") == "clusters" else f"by {made.get('file')}"
    return f"{section.name}: {element}, from {made.get('source')}, {how}"


def _bins(section: Section, element: str) -> _Drawing:
    """Bins in the colours of their types."""
    from matplotlib.colors import to_rgb

    table = section.sdata.tables[f"{element}_bins"]
    numbers, colours = _tally(table)
    grid = section.map(section.provenance[element]["source"]).grid
    raster = np.ones((*grid.shape, 3))  # outside of tissue: white; unassigned is grey
    rgb = np.array([to_rgb(colour) for colour in colours.values()])
    raster[table.obs["row"], table.obs["column"]] = rgb[table.obs["celltype"].cat.codes]

    def draw(axis: Axes) -> None:
        axis.imshow(raster, extent=extent(grid), interpolation="nearest", rasterized=True)

    return draw, grid, numbers, colours


def _cells(section: Section, element: str) -> _Drawing:
    """Cell outlines in the colours of their types."""
    from matplotlib.collections import PolyCollection
    from shapely import total_bounds

    table = section.sdata.tables[element]
    outlines, rows = section.annotated(table.uns["spatialdata_attrs"]["region"], element)
    polygons = Cells(outlines).polygons
    table = table[rows]
    numbers, colours = _tally(table)
    face = np.array(list(colours.values()))[table.obs["celltype"].cat.codes]
    x0, y0, x1, y1 = total_bounds(polygons)
    height, width = (max(1, int(np.ceil(size / _CELLS_UM))) for size in (y1 - y0, x1 - x0))
    grid = Grid(x0, y0, _CELLS_UM, height, width)
    rings, owner = rings_of(polygons)

    def draw(axis: Axes) -> None:
        axis.set_facecolor("0.97")
        axis.add_collection(PolyCollection(rings, facecolor=face[owner], linewidth=0, rasterized=True))

    return draw, grid, numbers, colours


def _tally(table: AnnData) -> tuple[dict[str, int], dict[str, str]]:
    labels = table.obs["celltype"]
    numbers = labels.value_counts().to_dict()
    return numbers, dict(zip(labels.cat.categories, table.uns["celltype_colors"], strict=True))


def _legend(axis: Axes, numbers: dict[str, int], colours: dict[str, str]) -> None:
    """Legend of the types that occur, most frequent first, with percentages; unassigned last."""
    from matplotlib.patches import Patch

    total = max(1, sum(numbers.values()))
    there = sorted(
        (kind for kind in numbers if numbers[kind]), key=lambda kind: (kind == UNASSIGNED, -numbers[kind])
    )
    handles = [
        Patch(
            facecolor=GREY if kind == UNASSIGNED else colours[kind],
            label=f"{kind.replace('_', ' ')}  {_percent(numbers[kind] / total)}",
        )
        for kind in there
    ]
    axis.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        ncols=-(-len(handles) // _LEGEND_ROWS),
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        handleheight=1.1,
        borderaxespad=0,
    )


def _percent(part: float) -> str:
    return f"{part:.0%}" if part >= 0.095 else f"{part:.1%}" if part >= 0.001 else "<0.1%"
