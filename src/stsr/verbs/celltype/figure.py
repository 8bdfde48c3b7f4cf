"""Figure of a cell type map next to the H&E, with scale bar and legend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stsr.figures import DPI, Histology, check_path, extent, scale_bar
from stsr.geometry.grid import Grid
from stsr.store import discovery
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
        A `stsr.store.section.Section`.
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
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_path(path)
    draw, grid, numbers, colours = (
        _bins(section, element) if section.elements[element] == "labels" else _cells(section, element)
    )
    panels = 1 if section.image is None else 2
    with rc_context({"font.size": 8, "svg.fonttype": "none", "pdf.fonttype": 42}):
        tall = _PANEL_INCHES * float(np.clip(grid.height / grid.width, 0.4, 2.5))
        wide = _PANEL_INCHES * panels + _LEGEND_INCHES * -(-len(numbers) // _LEGEND_ROWS)
        figure = Figure(figsize=(wide, tall + 0.4), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot state: works in any thread
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if section.image is not None:
            Histology(section, grid).draw(axes[0], None, None)
            axes[0].set_title("H&E", fontsize=9)
        draw(axes[-1])
        per = "bin" if section.elements[element] == "labels" else "cell"
        axes[-1].set_title(f"cell type per {per}", fontsize=9)
        for axis in axes:
            _frame(axis, grid)
        scale_bar(axes[0], grid)
        _legend(axes[-1], numbers, colours)
        figure.suptitle(title or _title(section, element), fontsize=9, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
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
    import shapely
    from matplotlib.collections import PolyCollection

    table = section.sdata.tables[element]
    region = table.uns["spatialdata_attrs"]["region"]
    shapes, rows = discovery.annotated(section.sdata, region, element)
    outlines = discovery.in_um(shapes, section.to_um(section.sdata.shapes[region]))
    table = table[rows]
    numbers, colours = _tally(table)
    face = np.array(list(colours.values()))[table.obs["celltype"].cat.codes]
    whole = outlines.geometry
    if "radius" in outlines:
        whole = whole.buffer(outlines["radius"])
    x0, y0, x1, y1 = whole.total_bounds
    height, width = (max(1, int(np.ceil(size / _CELLS_UM))) for size in (y1 - y0, x1 - x0))
    grid = Grid(x0, y0, _CELLS_UM, height, width)
    parts, owner = shapely.get_parts(whole.to_numpy(), return_index=True)
    rings = [shapely.get_coordinates(ring) for ring in shapely.get_exterior_ring(parts)]

    def draw(axis: Axes) -> None:
        axis.set_facecolor("0.97")
        axis.add_collection(PolyCollection(rings, facecolor=face[owner], linewidth=0, rasterized=True))

    return draw, grid, numbers, colours


def _tally(table: AnnData) -> tuple[dict[str, int], dict[str, str]]:
    labels = table.obs["celltype"]
    numbers = labels.value_counts().to_dict()
    return numbers, dict(zip(labels.cat.categories, table.uns["celltype_colors"], strict=True))


def _frame(axis: Axes, grid: Grid) -> None:
    x0, y0, x1, y1 = grid.bounds_um
    axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], aspect="equal")
    for side in axis.spines.values():
        side.set_visible(False)


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
