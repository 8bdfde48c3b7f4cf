"""Sum bins over cells by exact areas of overlap.

A matrix of shares (cells, bins) holds the fraction of each bin that belongs to each cell. Counts are taken as evenly
spread within a bin, so counts per cell are ``shares @ counts per bin``. Counts in no cell are reported separately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import shapely

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.progress import Progress
from stsr.store.parts import Map

_AT_ONCE = 20_000  # shapes intersected with bins together: bounds the memory that the pieces take
_MIN_UM2 = 1e-6  # smaller overlaps are rounding errors of outlines that only touch
_MAX_OVERLAPPING = 8  # cells at one point
_BLOCK_BYTES = 2**28  # of a map in memory


def shares(polygons: np.ndarray, grid: Grid) -> sp.csr_matrix:
    """Fraction of each bin that belongs to each cell.

    Where k cells overlap, the area is split evenly: each of them gets 1/k. With the areas |S| that are common to all
    cells of a set S this is ``sum over S that hold the cell of (-1)^(k - 1) / k |S|``, k = #S, because
    ``1/k = sum_m (-1)^m / (m + 1) C(k - 1, m)``.

    Parameters
    ----------
    polygons
        Valid polygons (n,), um.
    grid
        The bins.

    Returns
    -------
    shares
        (n, bins) csr float64 in 0..1, bins in row-major order. The shares of a bin add up to the fraction of it that
        lies in cells.

    Raises
    ------
    StsrError
        If more than 8 cells overlap at one point.
    """
    number, bins = len(polygons), grid.height * grid.width
    areas = sp.csr_matrix((number, bins))
    tree = shapely.STRtree(polygons)
    common, members = polygons, np.arange(number)[:, None]  # areas common to k cells, and which cells (m, k)
    while len(common):
        together = members.shape[1]
        if together > _MAX_OVERLAPPING:
            raise StsrError(
                f"more than {_MAX_OVERLAPPING} cells overlap at one point; give one outline for each cell"
            )
        holder = np.repeat(np.arange(len(common)), together)
        sign = np.full(len(holder), (-1.0) ** (together - 1) / together)
        gives = sp.csr_matrix((sign, (members.ravel(), holder)), (number, len(common)))
        areas = areas + gives @ overlaps(common, grid)
        common, members = _intersected(common, members, polygons, tree)
    areas.data = areas.data.clip(0) / grid.bin_um**2
    return areas


def _intersected(
    common: np.ndarray, members: np.ndarray, polygons: np.ndarray, tree: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Intersect areas with one more cell; the cells of a set ascend, so that each set occurs once."""
    area, cell = tree.query(common, predicate="intersects")
    later = cell > members[area, -1]
    area, cell = area[later], cell[later]
    both = shapely.intersection(common[area], polygons[cell])
    real = shapely.area(both) > _MIN_UM2
    return both[real], np.column_stack([members[area[real]], cell[real]])


def overlaps(polygons: np.ndarray, grid: Grid) -> sp.csr_matrix:
    """Area of each polygon in each bin: (n, bins), um^2."""
    shape = (len(polygons), grid.height * grid.width)
    parts = [_overlaps(polygons[at : at + _AT_ONCE], grid) for at in range(0, len(polygons), _AT_ONCE)]
    return sp.vstack(parts, format="csr") if parts else sp.csr_matrix(shape)


def _overlaps(polygons: np.ndarray, grid: Grid) -> sp.csr_matrix:
    corner = np.array([grid.x0_um, grid.y0_um, grid.x0_um, grid.y0_um])
    left, top, right, bottom = ((shapely.bounds(polygons) - corner) / grid.bin_um).T  # bins
    column, row = (np.floor(start).clip(0).astype(np.int64) for start in (left, top))
    wide = (np.ceil(right).clip(max=grid.width) - column).clip(0).astype(np.int64)
    tall = (np.ceil(bottom).clip(max=grid.height) - row).clip(0).astype(np.int64)
    many = wide * tall
    cell = np.repeat(np.arange(len(polygons)), many)  # one entry for each bin of each bounding box
    within = np.arange(len(cell)) - np.repeat(np.cumsum(many) - many, many)
    row, column = row[cell] + within // wide[cell], column[cell] + within % wide[cell]
    x, y = grid.x0_um + column * grid.bin_um, grid.y0_um + row * grid.bin_um
    area = shapely.area(
        shapely.intersection(polygons[cell], shapely.box(x, y, x + grid.bin_um, y + grid.bin_um))
    )
    flat = row * grid.width + column
    found = sp.csr_matrix((area, (cell, flat)), (len(polygons), grid.height * grid.width))
    found.eliminate_zeros()
    return found


def add_up(
    layer: Map, genes: Sequence[str], shares: sp.csr_matrix, progress: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum counts per cell and outside of cells, in blocks of genes.

    Parameters
    ----------
    layer
        A map.
    genes
        Names (g,), all in the map.
    shares
        Fraction of each bin that belongs to each cell, (n, bins).
    progress
        Called with (done, total, label).

    Returns
    -------
    counts, outside, totals
        Counts per cell (n, g) float32; counts in no cell and in the whole map, both (g,) float64.
    """
    counts = np.empty((shares.shape[0], len(genes)), np.float32)
    outside, totals = np.empty(len(genes)), np.empty(len(genes))
    free = 1 - np.asarray(shares.sum(0)).ravel()  # fraction of each bin in no cell
    for block in _blocks(layer.grid, len(genes)):
        values = layer.read(genes[block]).reshape(block.stop - block.start, -1)  # (genes, bins)
        values = values.astype(np.float64)
        counts[:, block] = shares @ values.T
        outside[block], totals[block] = values @ free, values.sum(1)
        progress(block.stop, len(genes), "summing bins over cells")
    return counts, outside, totals


def _blocks(grid: Grid, genes: int) -> Iterator[slice]:
    """Genes to read together: whole chunks of 16 where memory allows."""
    size = max(1, _BLOCK_BYTES // (12 * grid.height * grid.width))
    size = size // 16 * 16 or size
    for start in range(0, genes, size):
        yield slice(start, min(start + size, genes))
