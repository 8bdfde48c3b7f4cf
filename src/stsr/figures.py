"""Figures of maps: H&E, measured spots and super-resolved maps side by side, and helpers that all figures share.

Maps and spots are drawn as densities, counts per 100 µm² (one bin of 10 µm), so that a colour means the same in all
panels of a gene. Colour scales start at zero and span at least a few counts per spot, so that noise of a gene that is
not expressed stays dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.errors import UsageError
from stsr.geometry.grid import Grid, add_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from stsr.store.parts import Map
    from stsr.store.section import Section

FORMATS = (".png", ".pdf", ".svg", ".tif", ".jpg")

UNIT_UM2 = 100.0
"""Densities are counts in this area: a bin of 10 µm."""
UNIT = "counts / 100 µm²"
COLOURS = "inferno"
OUTSIDE = "0.88"
"""Grey of areas without data, distinct from the colours of the scale and the white of the page."""
DPI = 200
_MIN_DENSITY = 0.05  # smallest top of a scale: 5 counts in a low-resolution pixel of 100 um ...
_MIN_SPOT_COUNTS = 4  # ... and this many counts in a spot
_TOP_QUANTILE = 0.995
MAX_PX = 1200
"""Along a side of a panel; smaller bins are summed before they are drawn."""
_PANEL_INCHES = 2.7


def superres_figure(
    section: Section,
    element: str,
    genes: Sequence[str],
    path: str | Path,
    *,
    truth: bool = False,
    title: str | None = None,
) -> Path:
    """Draw H&E, measured spots and the super-resolved map, one row per gene.

    Parameters
    ----------
    section
        The section.
    element
        The map, such as ``superres_x10``: counts per bin.
    genes
        One row each, all in the map.
    path
        Output file; its suffix sets the format.
    truth
        Add a column with the measured counts per bin (``hr_*um``), if the section has them.
    title
        Title of the figure; names of section, element and method by default.

    Returns
    -------
    path
        The written file.

    Raises
    ------
    UsageError
        If a gene is not in the map, no gene is given, or the format is not supported.
    """
    path = check_path(path)
    if not genes:
        raise UsageError("a figure needs at least one gene; name some with --figure-genes")
    shown = section.map(element)
    with style():
        panels = _panels(section, shown, element, truth)
        figure, axes = canvas(len(genes), len(panels), shown.grid)
        for number, gene in enumerate(genes):
            _draw_row(axes[number], panels, gene, shown.grid)
            axes[number][0].set_ylabel(gene, fontstyle="italic", fontsize=11)
        for axis, panel in zip(axes[0], panels, strict=True):
            axis.set_title(panel.title, fontsize=9)
        save(figure, path, title or _title(section, element))
    return path


def _title(section: Section, element: str) -> str:
    made = section.provenance.get(element, {})
    how = [made.get("method"), f"{made['samples']} samples" if made.get("samples", 1) > 1 else None]
    words = ", ".join(word for word in how if word)
    return f"{section.name}: {element}" + (f" ({words})" if words else "")


# ------------------------------------------------------------------------------------- what all figures share


def check_path(path: str | Path) -> Path:
    """The path of a figure, if its suffix is a supported format.

    Raises
    ------
    UsageError
        If it is not.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"figure format of {path.name!r} is not supported; use one of {', '.join(FORMATS)}")
    return path


@contextmanager
def style(font_size: float = 8) -> Iterator[None]:
    """Draw with stsr's settings, without changing those of the process; text in files stays text."""
    from matplotlib import rc_context

    with rc_context({"font.size": font_size, "svg.fonttype": "none", "pdf.fonttype": 42}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot's global state: figures may be drawn in any thread
    return figure


def canvas(
    rows: int,
    columns: int,
    grid: Grid,
    *,
    inches: float = _PANEL_INCHES,
    beside: float = 0.9,
    above: float = 0.5,
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), with panels of the grid's proportions.

    Panels are ``inches`` wide; ``beside`` and ``above`` are inches for a colour bar or legend, and for titles.
    """
    tall = inches * float(np.clip(grid.height / grid.width, 0.4, 2.5))
    figure = new_figure(inches * columns + beside, tall * rows + above)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path, title: str | None = None) -> None:
    """Write a figure, with a title above everything."""
    if title:
        figure.suptitle(title, fontsize=9, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")


def frame(axis: Axes, grid: Grid) -> None:
    """Limit an axis to the grid, um, y down as in the image, without ticks or a border."""
    x0, y0, x1, y1 = grid.bounds_um
    axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], aspect="equal")
    for side in axis.spines.values():
        side.set_visible(False)


def colour_bar(axis: Axes, mappable: Any, label: str = UNIT) -> None:
    """Draw the colour bar of a row beside its last axis."""
    figure = axis.get_figure()
    assert figure is not None
    bar = figure.colorbar(mappable, ax=axis, shrink=0.85, pad=0.03, extend="max")
    bar.set_label(label)
    bar.outline.set_visible(False)


def rings_of(polygons: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Exterior rings, vertices (v, 2), of all parts of polygons (n,), and which polygon each belongs to."""
    import shapely

    parts, owner = shapely.get_parts(polygons, return_index=True)
    corners, part = shapely.get_coordinates(shapely.get_exterior_ring(parts), return_index=True)
    rings = np.split(corners, np.flatnonzero(np.diff(part)) + 1) if len(parts) else []
    return rings, owner


# --------------------------------------------------------------------------------------------------- panels


class Histology:
    """The H&E in pixels of ``step_um``, by default its own but at most `MAX_PX` a side; it has no colour scale."""

    title = "H&E"
    least = 0.0
    sets_scale = False

    def __init__(self, section: Section, grid: Grid, step_um: float | None = None):
        assert section.image is not None
        if step_um is None:
            step_um = max(section.image.um_per_px, max(grid.shape) * grid.bin_um / MAX_PX)
        fine = Grid.over(grid.bounds_um, step_um)
        self._rgb, self._extent = np.moveaxis(section.image.read(fine), 0, -1), extent(fine)

    def values(self, gene: str) -> np.ndarray:
        """No values: the H&E is the same for every gene."""
        return np.zeros(0)

    def draw(self, axis: Axes, values: Any = None, scale: Any = None, *, pale: bool = False) -> None:
        """Draw the image, or a pale copy of it to draw cells on."""
        rgb = self._rgb // 2 + 127 if pale else self._rgb
        axis.imshow(rgb, extent=self._extent, interpolation="antialiased")


class _SpotPanel:
    """Measured spots at their true size and position."""

    sets_scale = True

    def __init__(self, section: Section):
        assert section.spots is not None
        self._spots = section.spots
        size = self._spots.size_um
        self._area_um2 = size**2 * (np.pi / 4 if self._spots.shape == "disc" else 1)
        self.least = _MIN_SPOT_COUNTS * UNIT_UM2 / self._area_um2
        self.title = f"measured spots ({size:.0f} µm)"

    def values(self, gene: str) -> np.ndarray:
        counts = np.asarray(self._spots.select([gene]).todense()).ravel()
        return counts * UNIT_UM2 / self._area_um2  # (spots,)

    def draw(self, axis: Axes, values: np.ndarray, scale: Normalize) -> Any:
        from matplotlib.collections import Collection, EllipseCollection, PolyCollection

        centres, size = self._spots.centres_um, self._spots.size_um
        axis.set_facecolor(OUTSIDE)
        if self._spots.shape == "disc":
            wide = np.full(len(centres), size)
            drawn: Collection = EllipseCollection(
                wide,
                wide,
                np.zeros(len(centres)),
                units="xy",
                offsets=centres,
                offset_transform=axis.transData,
            )
        else:
            corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * size / 2
            drawn = PolyCollection(list(centres[:, None] + corners))
        drawn.set(array=values, cmap=COLOURS, norm=scale, linewidth=0, antialiased=False)
        axis.add_collection(drawn, autolim=False)
        return drawn


class _MapPanel:
    """Counts per bin, as densities."""

    least = _MIN_DENSITY

    def __init__(self, shown: Map, title: str, sets_scale: bool = True):
        self._map, self.sets_scale = shown, sets_scale
        self._factor = max(1, -(-max(shown.grid.shape) // MAX_PX))
        self.title = title

    def values(self, gene: str) -> np.ndarray:
        if gene not in self._map.genes:
            return np.zeros(0)
        counts = np.asarray(self._map.read([gene])[0], np.float64)
        counts = np.pad(counts, [(0, -size % self._factor) for size in counts.shape])
        return add_up(counts, self._factor) * UNIT_UM2 / (self._factor * self._map.grid.bin_um) ** 2  # (y, x)

    def draw(self, axis: Axes, values: np.ndarray, scale: Normalize) -> Any:
        axis.set_facecolor(OUTSIDE)
        if not values.size:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.4")
            return None
        grid = self._map.grid
        step_um = grid.bin_um * self._factor
        drawn = Grid(grid.x0_um, grid.y0_um, step_um, values.shape[0], values.shape[1])
        return axis.imshow(
            values, extent=extent(drawn), cmap=COLOURS, norm=scale, interpolation="nearest", rasterized=True
        )


_Panel = Histology | _SpotPanel | _MapPanel
"""One column: ``values`` gives the densities of a gene, ``draw`` draws them and returns what a colour bar needs.

The top of the colour scale is at least ``least``, counts per 100 um^2.
"""


def _panels(section: Section, shown: Map, element: str, truth: bool) -> list[_Panel]:
    panels: list[_Panel] = []
    if section.image is not None:
        panels.append(Histology(section, shown.grid))
    if section.spots is not None:
        panels.append(_SpotPanel(section))
    inferred = "super-resolved" if element.startswith("superres") else element
    panels.append(_MapPanel(shown, f"{inferred} ({shown.grid.bin_um:g} µm bins)"))
    if truth and section.hr is not None:
        # Single counts in small bins are outliers: a scale that spans them would leave expected counts dark.
        panels.append(
            _MapPanel(section.hr, f"measured ({section.hr.grid.bin_um:g} µm bins)", sets_scale=False)
        )
    return panels


# -------------------------------------------------------------------------------------------------- drawing


def _draw_row(axes: np.ndarray, panels: Sequence[_Panel], gene: str, grid: Grid) -> None:
    from matplotlib.colors import Normalize

    values = [panel.values(gene) for panel in panels]
    tops = [value for panel, value in zip(panels, values, strict=True) if panel.sets_scale]
    scale = Normalize(0, scale_top(tops, max(panel.least for panel in panels)))
    drawn = [panel.draw(axis, value, scale) for axis, panel, value in zip(axes, panels, values, strict=True)]
    for axis in axes:
        frame(axis, grid)
    scale_bar(axes[0], grid)
    colour_bar(axes[-1], next(item for item in reversed(drawn) if item is not None))


def scale_top(values: Sequence[np.ndarray], least: float) -> float:
    """Top of a gene's colour scale: the largest 99.5 % quantile of the panels, at least ``least``."""
    tops = [np.quantile(value, _TOP_QUANTILE) for value in values if value.size]
    return float(max([least, *tops]))


def scale_bar(axis: Axes, grid: Grid) -> None:
    """Draw a scale bar of a round length, about a quarter of the width."""
    from matplotlib.patheffects import withStroke

    x0, _, x1, y1 = grid.bounds_um
    length = round_length(0.28 * (x1 - x0))
    start, height = x0 + 0.05 * (x1 - x0), y1 - 0.05 * (x1 - x0)
    edge = [withStroke(linewidth=4, foreground="white")]
    axis.plot(
        [start, start + length],
        [height, height],
        color="black",
        lw=2,
        solid_capstyle="butt",
        path_effects=edge,
    )
    words = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    axis.annotate(
        words,
        (start + length / 2, height),
        (0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )


def round_length(about: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that does not exceed ``about``."""
    power = 10.0 ** np.floor(np.log10(about))
    return float(max(step * power for step in (1, 2, 5) if step * power <= about * (1 + 1e-9)))


def extent(grid: Grid) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) for imshow; y points down as in the image."""
    x0, y0, x1, y1 = grid.bounds_um
    return x0, x1, y1, y0
