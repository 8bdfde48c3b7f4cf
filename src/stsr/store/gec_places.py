"""Places at which genes are compared: bins of a map, cells of a table, spots. Values come a few genes at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.store import discovery, names
from stsr.store.parts import Map
from stsr.store.section import Section

CELL_RASTER_UM = 20.0
"""Bins in which pairs of cells are counted by distance: about two cells wide."""
_LEAST_PLACES = 10
_CELLS_TABLE = names.table_name(names.CELLS)


class BinPlaces:
    """Bins of a map, added up to a coarser grid.

    Parameters
    ----------
    name
        Of the map.
    values
        The map.
    grid
        The bins to compare at; whole numbers of the map's bins.
    kept
        (y, x) bool on that grid: which of them count.

    Raises
    ------
    UsageError
        If the map's bins do not nest in the grid's, or it does not cover it.
    """

    def __init__(self, name: str, values: Map, grid: Grid, kept: np.ndarray):
        self.name, self.genes, self.grid, self.number = name, values.genes, grid, kept
        self.count = int(kept.sum())
        self._values = values
        self._factor = coarsening(name, values.grid.bin_um, grid.bin_um)
        try:
            self._window = grid.at(values.grid.bin_um)
            row, column = values.grid.offset_of(self._window)
        except ValueError:
            raise UsageError(f"the bins of {name} do not lie on those it is compared with") from None
        ends = row + self._window.height, column + self._window.width
        if min(row, column) < 0 or ends[0] > values.grid.height or ends[1] > values.grid.width:
            bounds = " ".join(f"{value:g}" for value in values.grid.bounds_um)
            raise UsageError(
                f"{name} does not cover the area to compare: it spans {bounds} um; give a --region in it"
            )

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Values (genes, places)."""
        return add_up(self._values.read(genes, self._window), self._factor)[:, self.number]

    def rasters(self, values: np.ndarray) -> np.ndarray:
        """Values (g, places) where they lie: (g, y, x), 0 elsewhere."""
        rasters = np.zeros((len(values), *self.grid.shape), values.dtype)
        rasters[:, self.number] = values
        return rasters


class CellPlaces:
    """Cells of a table that annotates shapes.

    Parameters
    ----------
    name
        Of the table.
    genes
        Names.
    values
        (cells, genes) dense or sparse.
    ids
        (cells,) of the shapes.
    centres_um
        (cells, 2).
    """

    def __init__(self, name: str, genes: list[str], values, ids: np.ndarray, centres_um: np.ndarray):
        self.name, self.genes, self.ids, self.count = name, genes, ids, len(ids)
        self._centres_um = centres_um
        self._columns = {gene: number for number, gene in enumerate(genes)}
        self._values = sp.csc_matrix(values) if sp.issparse(values) else np.asarray(values)
        x0, y0 = centres_um.min(0)
        steps = np.floor((centres_um.max(0) - [x0, y0]) / CELL_RASTER_UM).astype(int) + 1
        self.grid = Grid(float(x0), float(y0), CELL_RASTER_UM, int(steps[1]), int(steps[0]))
        rows, columns, _ = self.grid.rows_columns(*centres_um.T)
        bins = rows * self.grid.width + columns
        shape = (self.grid.height * self.grid.width, self.count)
        self._gather = sp.csr_matrix((np.ones(self.count, np.float32), (bins, np.arange(self.count))), shape)
        self.number = np.asarray(self._gather.sum(1)).reshape(self.grid.shape)

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Values (genes, places)."""
        part = self._values[:, [self._columns[gene] for gene in genes]]
        return np.ascontiguousarray((part.toarray() if sp.issparse(part) else part).T)

    def rasters(self, values: np.ndarray) -> np.ndarray:
        """Sums of values (g, places) over the cells of each bin: (g, y, x)."""
        return (self._gather @ values.T).T.reshape(-1, *self.grid.shape)

    def like(self, other: CellPlaces) -> CellPlaces:
        """The same cells as ``other``, in its order.

        Raises
        ------
        UsageError
            If some of them are not here.
        """
        place = {cell: number for number, cell in enumerate(self.ids)}
        rows = [place.get(cell, -1) for cell in other.ids]
        if min(rows) < 0:
            raise UsageError(f"{self.name} lacks cells of {other.name}; compare tables of the same shapes")
        return CellPlaces(self.name, self.genes, self._values[rows], other.ids, self._centres_um[rows])


class SpotPlaces:
    """Spots whose centres lie in given places' area, or in all of it."""

    name = "spots"

    def __init__(self, spots, inside: np.ndarray):
        self.genes, self._spots, self._inside = spots.genes, spots, inside
        self.count = int(inside.sum())

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (genes, places)."""
        return self._spots.select(genes)[self._inside].toarray().T


# ------------------------------------------------------------------------------------------------------ opening


def bins_of(section: Section, name: str, bin_um: float | None, region) -> BinPlaces:
    """The bins of a map in tissue, wholly, and in a region.

    Parameters
    ----------
    name
        Of the map.
    bin_um
        Size to add them up to; their own by default.
    region
        (x0, y0, x1, y1) um: bins whose centres lie in it; everything if None.

    Raises
    ------
    UsageError
        If there is no such map, its bins do not nest in the size, or too few are left.
    """
    values = section.map(name)
    factor = coarsening(name, values.grid.bin_um, values.grid.bin_um if bin_um is None else bin_um)
    rows, columns = _window(values.grid, region, factor)
    fine = values.grid.window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    tissue = _tissue(section, fine)
    kept = add_up(tissue.astype(np.int64), factor) == factor**2
    if kept.sum() < _LEAST_PLACES:
        raise UsageError(
            f"only {kept.sum()} whole bins of {fine.bin_um * factor:g} um of {name} lie in tissue; "
            "give a larger --region or a smaller --bin-um"
        )
    return BinPlaces(name, values, fine.at(fine.bin_um * factor), kept)


def coarsening(name: str, from_um: float, to_um: float) -> int:
    """How many bins make a coarser one, along a side.

    Raises
    ------
    UsageError
        If it is not a whole number.
    """
    factor = to_um / from_um
    if not np.isfinite(factor) or factor < 1 - 1e-6 or abs(factor - round(factor)) > 1e-6:
        raise UsageError(
            f"bins of {from_um:g} um ({name}) do not add up to {to_um:g} um; give --bin-um a multiple of {from_um:g}"
        )
    return round(factor)


def _window(grid: Grid, region, factor: int) -> tuple[slice, slice]:
    """Rows and columns of a map in a region, cut to whole coarse bins."""
    x, y = grid.centres_um()
    x0, y0, x1, y1 = region or grid.bounds_um
    found = []
    for centres, low, high in ((y, y0, y1), (x, x0, x1)):
        first, last = np.searchsorted(centres, [low, high])
        size = (last - first) // factor * factor
        if size < 1:
            raise UsageError("no whole bin lies in the region; give a larger --region, in um")
        found.append(slice(int(first), int(first + size)))
    return found[0], found[1]


def _tissue(section: Section, grid: Grid) -> np.ndarray:
    """The tissue mask; without one, where a spot speaks for the bin; without spots, everything."""
    if section.tissue is not None:
        return section.tissue.read(grid)
    if section.spots is not None:
        return section.spots.measurement(grid).nearest >= 0
    return np.ones(grid.shape, bool)


def cells_of(section: Section, name: str, region) -> CellPlaces:
    """The cells of a table, in a region if one is given.

    Raises
    ------
    UsageError
        If there is no such table, it annotates no shapes, or too few cells are left.
    """
    tables = [element for element, kind in section.elements.items() if kind == "tables"]
    if name not in tables:
        raise UsageError(
            f"{section.path.name} has no table {name!r}; it has: {', '.join(tables) or 'no tables'}"
        )
    table = section.sdata.tables[name]
    regions = table.uns.get("spatialdata_attrs", {}).get("region") or []
    shapes = [regions] if isinstance(regions, str) else list(regions)
    if len(shapes) != 1 or section.elements.get(shapes[0]) != "shapes":
        raise UsageError(f"the table {name!r} annotates no shapes of {section.path.name}; name one of cells")
    geometry, rows = discovery.annotated(section.sdata, shapes[0], name)
    element = section.sdata.shapes[shapes[0]]
    to_um = discovery.affine(element, section.frame.name, section.frame.um_per_unit)
    centroid = discovery.in_um(geometry, to_um).geometry.centroid
    centres = np.stack([centroid.x.to_numpy(), centroid.y.to_numpy()], axis=1)
    x0, y0, x1, y1 = region or (-np.inf, -np.inf, np.inf, np.inf)
    inside = np.flatnonzero((centres >= [x0, y0]).all(1) & (centres < [x1, y1]).all(1))
    if len(inside) < _LEAST_PLACES:
        raise UsageError(f"only {len(inside)} cells of {name} lie in the region; give a larger --region")
    ids = geometry.index.to_numpy()[inside]
    genes = [str(gene) for gene in table.var_names]
    return CellPlaces(name, genes, table.X[np.asarray(rows)[inside]], ids, centres[inside])


def spots_of(section: Section, places: BinPlaces | CellPlaces) -> SpotPlaces | None:
    """The spots in the area of the places, None where fewer than ten are."""
    if section.spots is None:
        return None
    x, y = section.spots.centres_um.T
    rows, columns, inside = places.grid.rows_columns(x, y)
    if isinstance(places, BinPlaces):
        inside[inside] = places.number[rows[inside], columns[inside]]
    spots = SpotPlaces(section.spots, inside)
    return spots if spots.count >= _LEAST_PLACES else None


def newest_cells(section: Section) -> str:
    """The table of cells to read if none is named: the newest ``cells_x*``, else the measured one.

    Raises
    ------
    StsrError
        If there is none.
    """
    made = section.provenance
    tables = [name for name, kind in section.elements.items() if kind == "tables"]
    ours = [name for name in tables if name.startswith("cells_x")]
    if ours:
        return max(ours, key=lambda name: (made.get(name, {}).get("written", ""), name))
    if _CELLS_TABLE in tables:
        return _CELLS_TABLE
    raise StsrError(f"{section.path.name} has no table of cells; run: stsr singlecell {section.path}")
