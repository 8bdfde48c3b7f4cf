"""Observations with gene values: bins of a map, cells of a table, or spots. Read by blocks or by genes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM, Grid, add_up
from stsr.store import discovery, names
from stsr.store.parts import Cells, Map, Spots
from stsr.store.section import Section

LEAST_PLACES = 10
"""Fewer bins, cells or spots are too few to correlate genes over."""
CELL_RASTER_UM = 20.0
"""Bins in which pairs of cells are counted by distance: about two cells wide."""

Region = tuple[float, float, float, float]
"""(x0, y0, x1, y1), um."""
Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""(indices of the places (n,), counts (n, genes), their standard deviation (n, genes) or None)."""

_BLOCK_BYTES = 2**28  # of the float32 values of one block, places x genes
_CHUNK_BINS = 256  # side of a map's chunks on disk; smaller windows read a chunk several times
_LEAST_BINS = 32
_CELLS_AT_ONCE = 8192
_CELLS = re.compile(r"^cells_x(\d+(?:\.\d+)?)$")
_CELLS_TABLE = names.table_name(names.CELLS)


class BinPlaces:
    """Supported bins of a map, summed to a coarser grid if wanted.

    Parameters
    ----------
    name, values
        The map.
    grid
        The bins; each a whole number of the map's bins.
    kept
        (y, x) bool on that grid: the bins to use.
    spread
        Standard deviation of the map's values, on the map's own bins, if known.

    Attributes
    ----------
    uncertainty
        Where the standard deviation of counts comes from: ``samples``, ``counting``, or None if it is not known.

    Raises
    ------
    UsageError
        If the map's bins do not nest in the grid's, or the map does not cover the grid.
    """

    def __init__(self, name: str, values: Map, grid: Grid, kept: np.ndarray, spread: Map | None = None):
        self.name, self.genes, self.grid, self.number = name, values.genes, grid, kept
        self.rows, self.columns = np.nonzero(kept)
        self.count = len(self.rows)
        self.scale = LR_UM / grid.bin_um
        self.uncertainty = "samples" if spread else "counting" if names.is_measured_name(name) else None
        self._values, self._spread = values, spread
        self._factor = _coarsening(name, values.grid.bin_um, grid.bin_um)
        try:
            row, column = values.grid.offset_of(grid.at(values.grid.bin_um))
        except ValueError:
            raise UsageError(f"the bins of {name} do not align with the bins it is compared with") from None
        bottom, right = row + grid.height * self._factor, column + grid.width * self._factor
        if min(row, column) < 0 or bottom > values.grid.height or right > values.grid.width:
            bounds = " ".join(f"{value:g}" for value in values.grid.bounds_um)
            raise UsageError(
                f"{name} does not cover the area to compare: it spans {bounds} um; give a --region inside it"
            )

    @property
    def centres_um(self) -> np.ndarray:
        """(count, 2) x and y, um."""
        x, y = self.grid.centres_um()
        return np.stack([x[self.columns], y[self.rows]], axis=1)

    def raster(self, values: np.ndarray) -> np.ndarray:
        """One value per place (..., count) -> (..., y, x); 0 elsewhere."""
        raster = np.zeros((*values.shape[:-1], *self.grid.shape), values.dtype)
        raster[..., self.number] = values
        return raster

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Values (genes, count)."""
        return self._read(self._values, genes)[:, self.number]

    def totals(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (g,) of some genes over all places, some genes at a time."""
        step = max(1, _BLOCK_BYTES // (self.grid.height * self.grid.width * 4))
        parts = [genes[first : first + step] for first in range(0, len(genes), step)]
        return np.concatenate([self.read(part).sum(1, dtype=np.float64) for part in parts])

    def blocks(self, genes: Sequence[str], uncertain: bool = False) -> Iterator[Block]:
        """Counts of some genes, and on request their standard deviation, a square of bins at a time."""
        index = self.raster(np.arange(self.count))
        side = _CHUNK_BINS
        while side > _LEAST_BINS and side**2 * len(genes) * 4 > _BLOCK_BYTES:
            side //= 2
        for row in range(0, self.grid.height, side):
            for column in range(0, self.grid.width, side):
                part = np.s_[row : row + side, column : column + side]
                inside = self.number[part]
                if not inside.any():
                    continue
                window = self.grid.window(row, column, *inside.shape)
                counts = self._read(self._values, genes, window)[:, inside].T.astype(np.float32)
                spread = None
                if uncertain and self._spread is not None:
                    spread = self._read(self._spread, genes, window)[:, inside].T.astype(np.float32)
                yield index[part][inside], counts, _or_counting(spread, counts, uncertain)

    def _read(self, values: Map, genes: Sequence[str], window: Grid | None = None) -> np.ndarray:
        """Values (genes, y, x) in a window of the grid, all of it by default."""
        return add_up(values.read(genes, (window or self.grid).at(values.grid.bin_um)), self._factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPlaces:
    """Cells of a table.

    Parameters
    ----------
    name, genes
        Of the table.
    values, spread
        (cells, genes) counts, and their standard deviation if known; dense or sparse.
    element, ids
        The shapes or labels that the table annotates, and its instances (cells,).
    obs_names
        (cells,) of the table.
    centres_um
        (cells, 2) x and y, um, if known.
    """

    name: str
    genes: list[str]
    values: Any
    spread: Any
    element: str
    ids: np.ndarray
    obs_names: np.ndarray
    centres_um: np.ndarray | None

    @property
    def count(self) -> int:
        """Number of cells."""
        return len(self.ids)

    @property
    def scale(self) -> float | None:
        """100 um / bin size of the map the cells come from, according to the name of the table."""
        match = _CELLS.match(self.name)
        return float(match[1]) if match else None

    @property
    def uncertainty(self) -> str | None:
        """As for `BinPlaces`."""
        return "samples" if self.spread is not None else "counting" if self.name == _CELLS_TABLE else None

    def take(self, rows: np.ndarray) -> CellPlaces:
        """Some of the cells, by index."""
        of_cells = ("values", "spread", "ids", "obs_names", "centres_um")
        parts = {key: getattr(self, key) for key in of_cells}
        taken: dict[str, Any] = {key: part if part is None else part[rows] for key, part in parts.items()}
        return replace(self, **taken)

    def like(self, other: CellPlaces) -> CellPlaces:
        """The cells of ``other``, in its order.

        Raises
        ------
        UsageError
            If some of them are missing here.
        """
        place = {cell: number for number, cell in enumerate(self.ids)}
        rows = np.array([place.get(cell, -1) for cell in other.ids])
        if min(rows) < 0:
            raise UsageError(f"{self.name} lacks cells of {other.name}; compare tables of the same shapes")
        return self.take(rows)

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Values (genes, count)."""
        part: Any = self._by_gene[:, self._indices(genes)]
        return np.ascontiguousarray((part.toarray() if sp.issparse(part) else part).T)

    @cached_property
    def _by_gene(self) -> Any:
        return sp.csc_matrix(self.values) if sp.issparse(self.values) else np.asarray(self.values)

    def totals(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (g,) of some genes over all cells."""
        return np.asarray(self.values.sum(0), np.float64).ravel()[self._indices(genes)]

    def blocks(self, genes: Sequence[str], uncertain: bool = False) -> Iterator[Block]:
        """Counts of some genes, and on request their standard deviation, some thousand cells at a time."""
        columns = self._indices(genes)
        for first in range(0, self.count, _CELLS_AT_ONCE):
            rows = slice(first, min(first + _CELLS_AT_ONCE, self.count))
            counts = _dense(self.values[rows][:, columns])
            known = uncertain and self.spread is not None
            spread = _dense(self.spread[rows][:, columns]) if known else None
            yield np.arange(rows.start, rows.stop), counts, _or_counting(spread, counts, uncertain)

    def _indices(self, genes: Sequence[str]) -> list[int]:
        place = {gene: number for number, gene in enumerate(self.genes)}
        return [place[gene] for gene in genes]

    @cached_property
    def grid(self) -> Grid:
        """Bins of `CELL_RASTER_UM` around the cells' centres."""
        centres = np.asarray(self.centres_um)
        x0, y0 = centres.min(0)
        steps = np.floor((centres.max(0) - [x0, y0]) / CELL_RASTER_UM).astype(int) + 1
        return Grid(float(x0), float(y0), CELL_RASTER_UM, int(steps[1]), int(steps[0]))

    @cached_property
    def _gather(self) -> sp.csr_matrix:
        """(bins, cells) 1 where a cell's centre lies in a bin."""
        rows, columns, _ = self.grid.rows_columns(*np.asarray(self.centres_um).T)
        bins = rows * self.grid.width + columns
        shape = (self.grid.height * self.grid.width, self.count)
        return sp.csr_matrix((np.ones(self.count, np.float32), (bins, np.arange(self.count))), shape)

    @cached_property
    def number(self) -> np.ndarray:
        """(y, x) number of cells in each bin of the grid."""
        return np.asarray(self._gather.sum(1)).reshape(self.grid.shape)

    def raster(self, values: np.ndarray) -> np.ndarray:
        """One value per cell (g, count) -> their sums over the cells of each bin (g, y, x)."""
        return (self._gather @ values.T).T.reshape(-1, *self.grid.shape)


Places = BinPlaces | CellPlaces


class SpotPlaces:
    """Spots whose centres lie in an area: ``inside`` is (spots,) bool."""

    name = names.SPOTS

    def __init__(self, spots: Spots, inside: np.ndarray):
        self.genes, self._spots, self._inside = spots.genes, spots, inside
        self.count = int(inside.sum())

    def read(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (genes, count)."""
        return self._spots.select(genes)[self._inside].toarray().T


def bins_of(
    section: Section, name: str, bin_um: float | None = None, region: Region | None = None
) -> BinPlaces:
    """The bins of a map that may be believed: supported ones of an inferred map, measured ones of a measured map.

    See `Section.support` and `Section.measured`.

    Parameters
    ----------
    section, name
        The section, and the map: ``superres_x10``, ``hr_10um``. Its spread comes with it, if the store has one.
    bin_um
        Size to sum bins to; the map's own by default. A larger bin counts if all of its bins do.
    region
        Bins whose centres lie in it; everything by default.

    Raises
    ------
    UsageError
        If there is no such map, its bins do not nest in the size, or none lies in the region.
    """
    values = section.map(name)
    factor = _coarsening(name, values.grid.bin_um, values.grid.bin_um if bin_um is None else bin_um)
    fine = _window(values.grid, region, factor)
    inside = section.measured(fine) if names.is_measured_name(name) else section.support(fine)
    kept = add_up(inside.astype(np.int64), factor) == factor**2
    spread = names.spread_name(name) if factor == 1 else None  # not known for sums of bins
    spread_map = section.map(spread) if spread in section.elements else None
    return BinPlaces(name, values, fine.at(fine.bin_um * factor), kept, spread_map)


def _coarsening(name: str, from_um: float, to_um: float) -> int:
    """How many bins make a coarser one, along a side."""
    factor = to_um / from_um
    if not np.isfinite(factor) or factor < 1 - 1e-6 or abs(factor - round(factor)) > 1e-6:
        raise UsageError(
            f"bins of {from_um:g} um ({name}) do not add up to {to_um:g} um; give --bin-um a multiple of {from_um:g}"
        )
    return round(factor)


def _window(grid: Grid, region: Region | None, factor: int) -> Grid:
    """The bins of a map in a region, cut to whole coarse bins."""
    x, y = grid.centres_um()
    x0, y0, x1, y1 = region or grid.bounds_um
    row, bottom = np.searchsorted(y, [y0, y1])
    column, right = np.searchsorted(x, [x0, x1])
    height, width = ((size // factor) * factor for size in (bottom - row, right - column))
    if min(height, width) < 1:
        raise UsageError("no whole bin lies in the region; give a larger --region, in um")
    return grid.window(int(row), int(column), int(height), int(width))


def cells_of(section: Section, name: str) -> CellPlaces:
    """All cells of a table that annotates shapes or labels, in its order: ``cells_x10``, ``cells_table``.

    Centres are those in the table's ``obsm["spatial"]``, if any.

    Raises
    ------
    UsageError
        If there is no such table, or it annotates no cells.
    """
    if name not in _tables(section):
        there = ", ".join(_tables(section)) or "no tables; make one with stsr singlecell"
        raise UsageError(f"{section.path.name} has no table {name!r}; it has: {there}")
    table = section.sdata.tables[name]
    regions = discovery.regions(table)
    if len(regions) != 1 or section.elements.get(regions[0]) not in ("shapes", "labels"):
        raise UsageError(
            f"{name!r} does not annotate one element with cells; choose another table with --from"
        )
    return CellPlaces(
        name=name,
        genes=[str(gene) for gene in table.var_names],
        values=table.X,
        spread=table.layers.get(names.SPREAD_LAYER),
        element=regions[0],
        ids=table.obs[table.uns["spatialdata_attrs"]["instance_key"]].to_numpy(),
        obs_names=table.obs_names.to_numpy(),
        centres_um=table.obsm.get("spatial"),
    )


def cells_in(section: Section, name: str, region: Region | None = None) -> CellPlaces:
    """Cells of a table at the centroids of the shapes it annotates, in a region if one is given.

    Raises
    ------
    UsageError
        If there is no such table, it annotates no shapes, or fewer than ten cells are left.
    """
    cells = cells_of(section, name)
    if section.elements[cells.element] != "shapes":
        raise UsageError(f"the table {name!r} annotates no shapes of {section.path.name}; name one of cells")
    geometry, rows = section.annotated(cells.element, name)
    centres = Cells(geometry).centres_um
    x0, y0, x1, y1 = region or (-np.inf, -np.inf, np.inf, np.inf)
    inside = np.flatnonzero((centres >= [x0, y0]).all(1) & (centres < [x1, y1]).all(1))
    if len(inside) < LEAST_PLACES:
        raise UsageError(f"only {len(inside)} cells of {name} lie in the region; give a larger --region")
    ids = geometry.index.to_numpy()[inside]  # in the shapes' own type, so that tables can be matched
    return replace(cells.take(np.asarray(rows)[inside]), ids=ids, centres_um=centres[inside])


def spots_of(section: Section, places: Places) -> SpotPlaces | None:
    """The spots in the area of the places; None where fewer than ten are."""
    if section.spots is None:
        return None
    x, y = section.spots.centres_um.T
    rows, columns, inside = places.grid.rows_columns(x, y)
    if isinstance(places, BinPlaces):
        inside[inside] = places.number[rows[inside], columns[inside]]
    spots = SpotPlaces(section.spots, inside)
    return spots if spots.count >= LEAST_PLACES else None


def newest_cells(section: Section) -> str:
    """The table of cells to read if none is named: the newest ``cells_x*``, else the measured ``cells_table``."""
    made, tables = section.provenance, _tables(section)
    ours = [name for name in tables if _CELLS.match(name)]
    if ours:
        return max(ours, key=lambda name: (made.get(name, {}).get("written", ""), name))
    if _CELLS_TABLE in tables:
        return _CELLS_TABLE
    raise StsrError(f"{section.path.name} has no table of cells; run: stsr singlecell {section.path}")


def _tables(section: Section) -> list[str]:
    return [name for name, kind in section.elements.items() if kind == "tables"]


def _or_counting(spread: np.ndarray | None, counts: np.ndarray, uncertain: bool) -> np.ndarray | None:
    """The spread, or for measured counts the Poisson standard deviation: the square root of the count."""
    return np.sqrt(counts) if uncertain and spread is None else spread


def _dense(values: Any) -> np.ndarray:
    return np.asarray(values.toarray() if sp.issparse(values) else values, np.float32)
