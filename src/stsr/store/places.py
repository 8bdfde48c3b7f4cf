"""Places with counts, bins of a map or cells of a table, read block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM, Grid
from stsr.store import names
from stsr.store.section import Section

_BLOCK_BYTES = 2**28  # of the float32 values of one block, places x genes
_CHUNK_BINS = 256  # maps are stored in squares of so many bins; smaller windows read them several times
_LEAST_BINS = 32
_CELLS_AT_ONCE = 8192
_CELLS = re.compile(r"^cells_x(\d+(?:\.\d+)?)$")
_SPREAD_LAYER = "sd"

Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""(numbers of the places (n,), counts (n, genes), their standard deviation (n, genes) or None)."""


class Bins:
    """The tissue bins of a map, row by row.

    Parameters
    ----------
    section
        The section.
    element
        A map: ``superres_x10``, ``hr_10um``. Its spread, where the store has one, comes with it.

    Raises
    ------
    UsageError
        If there is no such map.
    """

    def __init__(self, section: Section, element: str):
        self.element = element
        self.map = section.map(element)
        spread = names.spread_name(element)
        self._spread = section.map(spread) if spread in section.elements else None
        self.genes = self.map.genes
        self.scale = LR_UM / self.grid.bin_um
        self.uncertainty = _uncertainty(self._spread is not None, names.is_measured_name(element))
        tissue = section.tissue
        self._inside = np.ones(self.grid.shape, bool) if tissue is None else tissue.read(self.grid)
        self.rows, self.columns = np.nonzero(self._inside)

    @property
    def grid(self) -> Grid:
        """The map's bins."""
        return self.map.grid

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def centres_um(self) -> np.ndarray:
        """(n, 2) x and y, um."""
        x, y = self.grid.centres_um()
        return np.stack([x[self.columns], y[self.rows]], axis=1)

    def raster(self, values: np.ndarray) -> np.ndarray:
        """Values (n,) of the places as (height, width); 0 outside of tissue."""
        filled = np.zeros(self.grid.shape, values.dtype)
        filled[self.rows, self.columns] = values
        return filled

    def totals(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (g,) of some genes over all places, some genes at a time."""
        step = max(1, _BLOCK_BYTES // (self.grid.height * self.grid.width * 4))
        parts = [genes[first : first + step] for first in range(0, len(genes), step)]
        return np.concatenate(
            [self.map.read(part)[:, self._inside].sum(1, dtype=np.float64) for part in parts]
        )

    def blocks(self, genes: Sequence[str], uncertain: bool = False) -> Iterator[Block]:
        """Counts of some genes, and their standard deviation if asked for, a square of bins at a time."""
        number = self.raster(np.arange(len(self)))
        side = _CHUNK_BINS
        while side > _LEAST_BINS and side**2 * len(genes) * 4 > _BLOCK_BYTES:
            side //= 2
        for row in range(0, self.grid.height, side):
            for column in range(0, self.grid.width, side):
                part = np.s_[row : row + side, column : column + side]
                inside = self._inside[part]
                if not inside.any():
                    continue
                window = self.grid.window(row, column, *inside.shape)
                counts = self.map.read(genes, window)[:, inside].T.astype(np.float32)
                spread = None
                if uncertain and self._spread is not None:
                    spread = self._spread.read(genes, window)[:, inside].T.astype(np.float32)
                yield number[part][inside], counts, _or_counting(spread, counts, uncertain)


class Cells:
    """The cells of a table that annotates shapes.

    Parameters
    ----------
    section
        The section.
    element
        A table (cells, genes) of counts: ``cells_x10``, ``cells_table``.

    Raises
    ------
    UsageError
        If there is no such table, or it annotates no shapes.
    """

    def __init__(self, section: Section, element: str):
        if section.elements.get(element) != "tables":
            raise UsageError(
                f"{section.path.name} has no table {element!r}; make one with stsr singlecell, or name one with --from"
            )
        self.element = element
        self.table = section.sdata.tables[element]
        attributes = self.table.uns.get("spatialdata_attrs") or {}
        region = attributes.get("region")
        self.region = region if isinstance(region, str) else next(iter(region or []), None)
        if section.elements.get(self.region) not in ("shapes", "labels"):
            raise UsageError(
                f"{element!r} annotates no cells of this section; choose another table with --from"
            )
        self.instances = self.table.obs[attributes["instance_key"]].to_numpy()
        self.genes = [str(gene) for gene in self.table.var_names]
        match = _CELLS.match(element)
        self.scale = float(match[1]) if match else None
        spread = self.table.layers.get(_SPREAD_LAYER)
        self.uncertainty = _uncertainty(spread is not None, element == names.table_name(names.CELLS))

    @property
    def centres_um(self) -> np.ndarray | None:
        """(n, 2) x and y as the table tells them, or None."""
        return self.table.obsm.get("spatial")

    def __len__(self) -> int:
        return self.table.n_obs

    def totals(self, genes: Sequence[str]) -> np.ndarray:
        """Counts (g,) of some genes over all places."""
        columns = self.table.var_names.get_indexer(list(genes))
        return np.asarray(self.table.X.sum(0), np.float64).ravel()[columns]

    def blocks(self, genes: Sequence[str], uncertain: bool = False) -> Iterator[Block]:
        """Counts of some genes, and their standard deviation if asked for, some thousand cells at a time."""
        columns = self.table.var_names.get_indexer(list(genes))
        spread = self.table.layers.get(_SPREAD_LAYER)
        for first in range(0, len(self), _CELLS_AT_ONCE):
            rows = slice(first, min(first + _CELLS_AT_ONCE, len(self)))
            counts = _dense(self.table.X[rows][:, columns])
            sd = _dense(spread[rows][:, columns]) if uncertain and spread is not None else None
            yield np.arange(rows.start, rows.stop), counts, _or_counting(sd, counts, uncertain)


def newest_cells(section: Section) -> str:
    """The table of cells x genes that `stsr singlecell` wrote last.

    Raises
    ------
    StsrError
        If there is none.
    """
    made = section.provenance
    found = [name for name, kind in section.elements.items() if kind == "tables" and _CELLS.match(name)]
    if not found:
        raise StsrError(
            f"{section.path.name} has no table of cells; run: stsr singlecell {Path(section.path)}"
        )
    return max(found, key=lambda name: (made.get(name, {}).get("written", ""), name))


def _uncertainty(has_spread: bool, measured: bool) -> str | None:
    """Where the standard deviation of counts comes from: ``samples``, ``counting``, or None where nobody knows it."""
    return "samples" if has_spread else "counting" if measured else None


def _or_counting(spread: np.ndarray | None, counts: np.ndarray, uncertain: bool) -> np.ndarray | None:
    """The spread, or for measured counts that of a Poisson variable whose mean was what was counted."""
    return np.sqrt(counts) if uncertain and spread is None else spread


def _dense(values) -> np.ndarray:
    return np.asarray(values.toarray() if sp.issparse(values) else values, np.float32)
