"""Tiles over a grid, and the canvas that blends their overlapping predictions into one map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stsr.geometry.grid import LR_UM, Grid, bins_per_lr


@dataclass(frozen=True)
class Tile:
    """A window of whole low-resolution pixels.

    Parameters
    ----------
    row, column
        First bin, in the grid's bins.
    height, width
        In bins.
    """

    row: int
    column: int
    height: int
    width: int

    @classmethod
    def of_window(cls, grid: Grid, window: Grid) -> Tile:
        """The place of a window in a grid."""
        return cls(*grid.offset_of(window), *window.shape)

    def of(self, grid: Grid) -> Grid:
        """The tile as a separate grid."""
        return grid.window(self.row, self.column, self.height, self.width)

    def coarser(self, factor: int) -> Tile:
        """The same area in bins that are ``factor`` times as large."""
        return Tile(*(side // factor for side in (self.row, self.column, self.height, self.width)))

    def meets(self, other: Tile) -> bool:
        """Whether two tiles have a bin in common."""
        rows = self.row < other.row + other.height and other.row < self.row + self.height
        columns = self.column < other.column + other.width and other.column < self.column + self.width
        return rows and columns

    def within(self, other: Tile) -> tuple[slice, slice]:
        """Rows and columns of this tile in an array that covers another one."""
        row, column = self.row - other.row, self.column - other.column
        return slice(row, row + self.height), slice(column, column + self.width)


def plan(grid: Grid, tile_lr: int, overlap_lr: int, lr_um: float = LR_UM) -> list[list[Tile]]:
    """Tiles that cover a grid, as bands from top to bottom.

    Steps are even, so the overlap is at least ``overlap_lr``. Tiles do not reach beyond the grid: the filling there
    is neither tissue nor glass, and would shift the network's statistics.

    Parameters
    ----------
    tile_lr, overlap_lr
        Side of a tile and least overlap of neighbours, in low-resolution pixels.

    Returns
    -------
    list of bands, each a list of tiles from left to right
    """
    if not 0 <= overlap_lr < tile_lr:
        raise ValueError(f"tiles of {tile_lr} pixels cannot overlap by {overlap_lr}")
    per_lr = bins_per_lr(grid.bin_um, lr_um)
    height, width = (min(tile_lr, side // per_lr) for side in grid.shape)
    rows = _starts(grid.height // per_lr, height, overlap_lr)
    columns = _starts(grid.width // per_lr, width, overlap_lr)
    return [
        [Tile(row * per_lr, column * per_lr, height * per_lr, width * per_lr) for column in columns]
        for row in rows
    ]


def needed(bands: list[list[Tile]], area: Tile) -> list[list[Tile]]:
    """The tiles of a plan that touch an area, as bands; inside the area they blend as all tiles would."""
    chosen = ([tile for tile in band if tile.meets(area)] for band in bands)
    return [band for band in chosen if band]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    count = int(np.ceil((length - overlap) / (tile - overlap)))
    return np.round(np.linspace(0, length - tile, count)).astype(int).tolist()


def taper(height: int, width: int, ramp: int) -> np.ndarray:
    """Weights (height, width) that fall linearly over ``ramp`` bins to the edges and never reach zero."""

    def along(side: int) -> np.ndarray:
        from_edge = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0  # bins, 1 at the edge
        return np.clip(from_edge / (ramp + 1.0), None, 1.0)

    return np.outer(along(height), along(width)).astype(np.float32)


class Canvas:
    """Blends tiles of several maps band by band, holding only the rows that later tiles can still touch.

    Parameters
    ----------
    genes
        Number of maps.
    bands
        As `plan` or `needed` gives them; all bands have the same columns.
    ramp
        Width of the taper, bins.
    first_band
        Where to begin, if the rows above are not wanted.
    """

    def __init__(self, genes: int, bands: list[list[Tile]], ramp: int, first_band: int = 0):
        self.bands = bands
        first, last = bands[0][0], bands[0][-1]
        self.left = first.column
        self._first = bands[first_band][0].row  # grid row of the first row held
        self._sum = np.zeros((genes, first.height, last.column + last.width - self.left), np.float32)
        self._weight = np.zeros(self._sum.shape[1:], np.float32)
        self._taper = taper(first.height, first.width, ramp)

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return self._sum.nbytes + self._weight.nbytes

    def add(self, tile: Tile, maps: np.ndarray, genes: slice = slice(None)) -> None:
        """Add a tile's maps (g, height, width); its weight is added once, with the first genes."""
        rows = slice(tile.row - self._first, tile.row - self._first + tile.height)
        columns = slice(tile.column - self.left, tile.column - self.left + tile.width)
        self._sum[genes, rows, columns] += maps * self._taper
        if (genes.start or 0) == 0:
            self._weight[rows, columns] += self._taper

    def finished(self, band: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows that no later band touches, none or one block: (first grid row, maps (g, rows, width)).

        The maps begin at the grid column ``left``.
        """
        last = band == len(self.bands) - 1
        until = self.bands[band][0].row + self.bands[band][0].height if last else self.bands[band + 1][0].row
        count = until - self._first
        if count <= 0:
            return
        block = self._sum[:, :count] / np.maximum(self._weight[:count], 1e-12)
        first = self._first
        keep = self._sum.shape[1] - count
        self._sum[:, :keep] = self._sum[:, count:].copy()
        self._sum[:, keep:] = 0
        self._weight[:keep] = self._weight[count:].copy()
        self._weight[keep:] = 0
        self._first = until
        yield first, block
