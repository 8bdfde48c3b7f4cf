"""Figure of a cell type map next to the H&E, with scale bar and legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stsr.figures import DPI, Histology, check_path, extent, scale_bar
from stsr.geometry.grid import Grid
from stsr.verbs.celltype.model import GREY, UNASSIGNED

_PANEL_INCHES = 4.2
_LEGEND_INCHES = 1.9
_LEGEND_ROWS = 26  # per column
_CELLS_UM = 10.0  # bin size of the frame around cells


def celltype_figure(section, element: str, path: str | Path, *, title: str | None = None) -> Path:
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
        _legend(figure, axes[-1], numbers, colours)
        figure.suptitle(title or _title(section, element), fontsize=9, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
    return path


def _title(section, element: str) -> str:
    made = section.provenance.get(element, {})
    how = {"clusters": "Leiden clusters"}.get(made.get("method"), f"by {made.get('file')}")
    return f"{section.name}: {element}, from {made.get('source')}, {how}"


def _bins(section, element: str):
    """(drawing function, grid, {type: number}, {type: colour}) of labels."""
    from matplotlib.colors import to_rgb

    table = section.sdata.tables[f"{element}_bins"]
    numbers, colours = _tally(table)
    raster = np.full((*_grid_of(section, element).shape, 3), np.nan)
    rgb = np.array([to_rgb(colour) for colour in colours.values()])
    raster[table.obs["row"], table.obs["column"]] = rgb[table.obs["celltype"].cat.codes]
    raster[np.isnan(raster)] = 1.0  # outside of tissue: white; unassigned is grey
    grid = _grid_of(section, element)

    def draw(axis) -> None:
        axis.imshow(raster, extent=extent(grid), interpolation="nearest", rasterized=True)

    return draw, grid, numbers, colours


def _grid_of(section, element: str) -> Grid:
    return section.map(section.provenance[element]["source"]).grid


def _cells(section, element: str):
    """The same for a table of cells."""
    import shapely
    from matplotlib.collections import PolyCollection

    from stsr.store.discovery import annotated, in_um

    table = section.sdata.tables[element]
    region = table.uns["spatialdata_attrs"]["region"]
    shapes, rows = annotated(section.sdata, region, element)
    outlines = in_um(shapes, section._to_um(section.sdata.shapes[region]))
    table = table[rows]
    numbers, colours = _tally(table)
    face = np.array(list(colours.values()))[table.obs["celltype"].cat.codes]
    whole = outlines.geometry
    if "radius" in outlines:
        whole = whole.buffer(outlines["radius"])
    x0, y0, x1, y1 = whole.total_bounds
    grid = Grid(
        x0,
        y0,
        _CELLS_UM,
        max(1, int(np.ceil((y1 - y0) / _CELLS_UM))),
        max(1, int(np.ceil((x1 - x0) / _CELLS_UM))),
    )
    parts, owner = shapely.get_parts(whole.to_numpy(), return_index=True)
    rings = [shapely.get_coordinates(ring) for ring in shapely.get_exterior_ring(parts)]

    def draw(axis) -> None:
        axis.set_facecolor("0.97")
        axis.add_collection(PolyCollection(rings, facecolor=face[owner], linewidth=0, rasterized=True))

    return draw, grid, numbers, colours


def _tally(table) -> tuple[dict[str, int], dict[str, str]]:
    labels = table.obs["celltype"]
    numbers = labels.value_counts().to_dict()
    return numbers, dict(zip(labels.cat.categories, table.uns["celltype_colors"], strict=True))


def _frame(axis, grid: Grid) -> None:
    x0, y0, x1, y1 = grid.bounds_um
    axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], aspect="equal")
    for side in axis.spines.values():
        side.set_visible(False)


def _legend(figure, axis, numbers: dict[str, int], colours: dict[str, str]) -> None:
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
