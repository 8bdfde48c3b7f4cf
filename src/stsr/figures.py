"""Figures to look at: H&E, what was measured and what was inferred, side by side and on one scale.

Every map and every spot is drawn as a density, counts per 100 um^2 (one bin of 10 um), so that a colour means the same
in all panels of a gene. Scales start at zero and reach at least a few counts per spot: a gene that is absent stays
dark instead of having its noise stretched over all colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stsr.errors import UsageError
from stsr.geometry.grid import Grid, add_up

FORMATS = (".png", ".pdf", ".svg", ".tif", ".jpg")

_UNIT_UM2 = 100.0  # densities are counts in this area: a bin of 10 um
UNIT = "counts per 100 µm²"
_LEAST_DENSITY = 0.05  # top of a scale: at least 5 counts in a low-resolution pixel of 100 um ...
_LEAST_SPOT_COUNTS = 4  # ... and this many in a spot
_TOP_QUANTILE = 0.995
_MAX_PX = 1200  # along a side of a panel; finer bins are added up before they are drawn
_PANEL_INCHES = 2.7
COLOURS = "inferno"
OUTSIDE = "0.88"  # neither a colour of the scale nor the white of the page
DPI = 200


def superres_figure(
    section,
    element: str,
    genes: Sequence[str],
    path: str | Path,
    *,
    truth: bool = False,
    title: str | None = None,
) -> Path:
    """Draw H&E, measured spots and the super-resolved map, one row for each gene.

    Parameters
    ----------
    section
        A `stsr.store.section.Section`.
    element
        The map, such as ``superres_x10``: counts per bin.
    genes
        One row each, all in the map.
    path
        The figure; its suffix gives the format.
    truth
        Add a column with the measured counts per bin (``hr_*um``), if the section has them.
    title
        Above everything; the names of section, element and method by default.

    Returns
    -------
    path
        The written file.

    Raises
    ------
    UsageError
        If a gene is not in the map, no gene is given, or the format is unknown.
    """
    from matplotlib import rc_context

    path = check_path(path)
    if not genes:
        raise UsageError("a figure needs at least one gene; name some with --figure-genes")
    shown = section.map(element)
    with rc_context({"font.size": 8, "svg.fonttype": "none", "pdf.fonttype": 42}):
        panels = _panels(section, shown, element, truth)
        figure, axes = canvas(len(genes), panels, shown.grid)
        for number, gene in enumerate(genes):
            _draw_row(axes[number], panels, gene, shown.grid)
            axes[number][0].set_ylabel(gene, fontstyle="italic", fontsize=11)
        for axis, panel in zip(axes[0], panels, strict=True):
            axis.set_title(panel.title, fontsize=9)
        figure.suptitle(title or _title(section, element), fontsize=9, color="0.3")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")
    return path


def _title(section, element: str) -> str:
    made = section.provenance.get(element, {})
    how = [made.get("method"), f"{made['samples']} samples" if made.get("samples", 1) > 1 else None]
    words = ", ".join(word for word in how if word)
    return f"{section.name}: {element}" + (f" ({words})" if words else "")


def check_path(path: str | Path) -> Path:
    """The path of a figure, if its suffix names a format.

    Raises
    ------
    UsageError
        If it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"a figure cannot be written as {path.name!r}; name it with one of {', '.join(FORMATS)}"
        )
    return path


# --------------------------------------------------------------------------------------------------- panels


class Histology:
    """The H&E; it has no colour scale."""

    title = "H&E"
    least = 0.0
    sets_scale = False

    def __init__(self, section, grid: Grid):
        step_um = max(section.image.um_per_px, max(grid.height, grid.width) * grid.bin_um / _MAX_PX)
        x0, y0, x1, y1 = grid.bounds_um
        fine = Grid(x0, y0, step_um, max(1, round((y1 - y0) / step_um)), max(1, round((x1 - x0) / step_um)))
        self._rgb, self.extent = np.moveaxis(section.image.read(fine), 0, -1), extent(fine)

    def values(self, gene: str) -> np.ndarray:
        """None: no gene enters."""
        return np.zeros(0)

    def draw(self, axis, values, scale) -> None:
        """The picture."""
        axis.imshow(self._rgb, extent=self.extent, interpolation="antialiased")


class _SpotPanel:
    """Measured spots in their true size and place."""

    sets_scale = True

    def __init__(self, section, grid: Grid):
        self._spots, self._grid = section.spots, grid
        size = self._spots.size_um
        self._area_um2 = size**2 * (np.pi / 4 if self._spots.shape == "disc" else 1)
        self.least = _LEAST_SPOT_COUNTS * _UNIT_UM2 / self._area_um2
        self.title = f"measured spots ({size:.0f} µm)"

    def values(self, gene: str) -> np.ndarray:
        counts = np.asarray(self._spots.select([gene]).todense()).ravel()
        return counts * _UNIT_UM2 / self._area_um2  # (spots,)

    def draw(self, axis, values, scale):
        from matplotlib.collections import EllipseCollection, PolyCollection

        centres, size = self._spots.centres_um, self._spots.size_um
        axis.set_facecolor(OUTSIDE)
        if self._spots.shape == "disc":
            wide = np.full(len(centres), size)
            drawn = EllipseCollection(
                wide,
                wide,
                np.zeros(len(centres)),
                units="xy",
                offsets=centres,
                offset_transform=axis.transData,
            )
        else:
            corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * size / 2
            drawn = PolyCollection(centres[:, None] + corners)
        drawn.set(array=values, cmap=COLOURS, norm=scale, linewidth=0, antialiased=False)
        axis.add_collection(drawn, autolim=False)
        return drawn


class _MapPanel:
    """Counts per bin."""

    least = _LEAST_DENSITY

    def __init__(self, shown, title: str, sets_scale: bool = True):
        self._map, self.sets_scale = shown, sets_scale
        self._factor = max(1, -(-max(shown.grid.shape) // _MAX_PX))
        self.title = title

    def values(self, gene: str) -> np.ndarray:
        if gene not in self._map.genes:
            return np.zeros(0)
        counts = np.asarray(self._map.read([gene])[0], np.float64)
        counts = np.pad(counts, [(0, -size % self._factor) for size in counts.shape])
        return (
            add_up(counts, self._factor) * _UNIT_UM2 / (self._factor * self._map.grid.bin_um) ** 2
        )  # (y, x)

    def draw(self, axis, values, scale):
        axis.set_facecolor(OUTSIDE)
        if not values.size:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.4")
            return None
        grid = self._map.grid
        step_um = grid.bin_um * self._factor
        drawn = Grid(grid.x0_um, grid.y0_um, step_um, *values.shape)
        return axis.imshow(
            values, extent=extent(drawn), cmap=COLOURS, norm=scale, interpolation="nearest", rasterized=True
        )


def _panels(section, shown, element: str, truth: bool) -> list:
    panels: list = []
    if section.image is not None:
        panels.append(Histology(section, shown.grid))
    if section.spots is not None:
        panels.append(_SpotPanel(section, shown.grid))
    inferred = "super-resolved" if element.startswith("superres") else element
    panels.append(_MapPanel(shown, f"{inferred} ({shown.grid.bin_um:g} µm bins)"))
    if truth and section.hr is not None:
        # Single counts in small bins are spikes; a scale made for them would leave expectations in the dark.
        panels.append(_MapPanel(section.hr, f"truth ({section.hr.grid.bin_um:g} µm bins)", sets_scale=False))
    return panels


# -------------------------------------------------------------------------------------------------- drawing


def canvas(rows: int, panels: list, grid: Grid):
    """A figure and its axes (rows, panels), panels as tall as the grid asks for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tall = _PANEL_INCHES * float(np.clip(grid.height / grid.width, 0.4, 2.5))
    figure = Figure(figsize=(_PANEL_INCHES * len(panels) + 0.9, tall * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # no global state: figures may be drawn in any thread
    return figure, figure.subplots(rows, len(panels), squeeze=False)


def _draw_row(axes, panels: list, gene: str, grid: Grid) -> None:
    from matplotlib.colors import Normalize

    values = [panel.values(gene) for panel in panels]
    tops = [value for panel, value in zip(panels, values, strict=True) if panel.sets_scale]
    scale = Normalize(0, scale_top(tops, max(panel.least for panel in panels)))
    drawn = [panel.draw(axis, value, scale) for axis, panel, value in zip(axes, panels, values, strict=True)]
    x0, y0, x1, y1 = grid.bounds_um
    for axis in axes:
        axis.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], aspect="equal")
        for side in axis.spines.values():
            side.set_visible(False)
    scale_bar(axes[0], grid)
    coloured = next(item for item in reversed(drawn) if item is not None)
    bar = axes[0].figure.colorbar(coloured, ax=axes[-1], shrink=0.85, pad=0.03, extend="max")
    bar.set_label(UNIT)
    bar.outline.set_visible(False)


def scale_top(values: Sequence[np.ndarray], least: float) -> float:
    """Upper end of a gene's one scale: the largest of the panels' 99.5 % quantiles, but at least ``least``."""
    tops = [np.quantile(value, _TOP_QUANTILE) for value in values if value.size]
    return float(max([least, *tops]))


def scale_bar(axis, grid: Grid) -> None:
    """A bar of a round length, about a quarter of the width, with its length in um."""
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
    """The largest of 1, 2, 5 times a power of ten that is not above ``about``."""
    power = 10.0 ** np.floor(np.log10(about))
    return float(max(step * power for step in (1, 2, 5) if step * power <= about * (1 + 1e-9)))


def extent(grid: Grid) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) for imshow; y points down as in the image."""
    x0, y0, x1, y1 = grid.bounds_um
    return x0, x1, y1, y0
