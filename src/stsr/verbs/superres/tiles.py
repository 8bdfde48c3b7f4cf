"""Windows over a grid, and the canvas on which their overlapping predictions become one map."""

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

    def of(self, grid: Grid) -> Grid:
        """The tile as a grid of its own."""
        return grid.window(self.row, self.column, self.height, self.width)


def plan(grid: Grid, tile_lr: int, overlap_lr: int, lr_um: float = LR_UM) -> list[list[Tile]]:
    """Tiles that cover a grid, as bands from top to bottom.

    Steps are even, so the overlap is at least ``overlap_lr``. Tiles end with the grid and are no larger than it: what
    lies beyond is neither tissue nor glass, and would shift the network's statistics.

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


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    count = int(np.ceil((length - overlap) / (tile - overlap)))
    return np.round(np.linspace(0, length - tile, count)).astype(int).tolist()


def taper(height: int, width: int, ramp: int) -> np.ndarray:
    """Weights (height, width) that fall linearly over ``ramp`` bins to the edges and never reach zero."""

    def along(side):
        distance = (
            np.minimum(np.arange(side), np.arange(side)[::-1]) + 1.0
        )  # bins from the edge, 1 at the edge
        return np.clip(distance / (ramp + 1.0), None, 1.0)

    return np.outer(along(height), along(width)).astype(np.float32)


class Canvas:
    """Blends tiles of one map band by band, holding no more rows than tiles still to come can touch.

    Parameters
    ----------
    genes
        Number of maps.
    grid
        Where they lie.
    bands
        As `plan` gives them.
    ramp
        Width of the taper, bins.
    first_band
        Where to begin, if the rows above are not wanted.
    """

    def __init__(self, genes: int, grid: Grid, bands: list[list[Tile]], ramp: int, first_band: int = 0):
        self.grid = grid
        self.bands = bands
        self.ramp = ramp
        tile = bands[0][0]
        self._first = bands[first_band][0].row  # grid row of the first row held
        self._sum = np.zeros((genes, tile.height, grid.width), np.float32)
        self._weight = np.zeros(self._sum.shape[1:], np.float32)
        self._taper = taper(tile.height, tile.width, ramp)

    @property
    def nbytes(self) -> int:
        """Memory held, bytes."""
        return self._sum.nbytes + self._weight.nbytes

    def add(self, tile: Tile, maps: np.ndarray, genes: slice = slice(None)) -> None:
        """Lay a tile's maps (g, height, width) onto the canvas; once per tile, the first genes bring its weight."""
        rows = slice(tile.row - self._first, tile.row - self._first + tile.height)
        columns = slice(tile.column, tile.column + tile.width)
        self._sum[genes, rows, columns] += maps * self._taper
        if (genes.start or 0) == 0:
            self._weight[rows, columns] += self._taper

    def finished(self, band: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows that no later band touches: (first grid row, maps (g, rows, width)), none or one block."""
        last = band == len(self.bands) - 1
        until = self.grid.height if last else self.bands[band + 1][0].row
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
