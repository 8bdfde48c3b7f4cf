"""Bins to cells by exact areas, the values that spots alone would give them, and scores against measured cells.

A matrix of shares (cells, bins) says which part of each bin is each cell's. What is counted in a bin is taken to lie
evenly in it, so counts per cell are ``shares @ counts per bin``, and what no cell claims stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely

from stsr import metrics
from stsr.errors import StsrError
from stsr.geometry.grid import LR_UM, Grid

_AT_ONCE = 20_000  # shapes cut into bins together: bounds what their pieces take in memory
_LEAST_UM2 = 1e-6  # smaller overlaps are rounding of outlines that only touch
_DEEPEST = 8  # cells on one place
_BLOCK_BYTES = 2**28  # of a map in memory


def shares(outlines: np.ndarray, grid: Grid) -> sp.csr_matrix:
    """Which part of each bin is each cell's.

    A place that k cells claim is shared evenly: its area counts 1/k for each of them. With the areas |S| that are
    common to all cells of a set S this is ``sum over S that hold the cell of (-1)^(k - 1) / k |S|``, k = #S, as
    ``1/k = sum_m (-1)^m / (m + 1) C(k - 1, m)``.

    Parameters
    ----------
    outlines
        Valid polygons (n,), um.
    grid
        The bins.

    Returns
    -------
    shares
        (n, bins) csr float64 in 0..1, bins in row-major order. A bin's shares add up to the part of it that lies in
        cells.

    Raises
    ------
    StsrError
        If more than 8 cells lie on one place.
    """
    number, bins = len(outlines), grid.height * grid.width
    areas = sp.csr_matrix((number, bins))
    tree = shapely.STRtree(outlines)
    common, members = outlines, np.arange(number)[:, None]  # areas common to k cells, and which cells (m, k)
    while len(common):
        together = members.shape[1]
        if together > _DEEPEST:
            raise StsrError(f"more than {_DEEPEST} cells lie on one place; give one outline for each cell")
        holder = np.repeat(np.arange(len(common)), together)
        sign = np.full(len(holder), (-1.0) ** (together - 1) / together)
        gives = sp.csr_matrix((sign, (members.ravel(), holder)), (number, len(common)))
        areas = areas + gives @ overlaps(common, grid)
        common, members = _deeper(common, members, outlines, tree)
    areas.data = areas.data.clip(0) / grid.bin_um**2
    return areas


def _deeper(common: np.ndarray, members: np.ndarray, outlines: np.ndarray, tree) -> tuple:
    """What areas have in common with one cell more; cells of a set in ascending order, so that each set comes once."""
    area, cell = tree.query(common, predicate="intersects")
    later = cell > members[area, -1]
    area, cell = area[later], cell[later]
    both = shapely.intersection(common[area], outlines[cell])
    real = shapely.area(both) > _LEAST_UM2
    return both[real], np.column_stack([members[area[real]], cell[real]])


def overlaps(outlines: np.ndarray, grid: Grid) -> sp.csr_matrix:
    """Area of each bin that lies in each polygon: (n, bins), um^2."""
    shape = (len(outlines), grid.height * grid.width)
    parts = [_overlaps(outlines[at : at + _AT_ONCE], grid) for at in range(0, len(outlines), _AT_ONCE)]
    return sp.vstack(parts, format="csr") if parts else sp.csr_matrix(shape)


def _overlaps(outlines: np.ndarray, grid: Grid) -> sp.csr_matrix:
    left, top, right, bottom = ((shapely.bounds(outlines) - _corner(grid)) / grid.bin_um).T  # bins
    column, row = (np.floor(start).clip(0).astype(np.int64) for start in (left, top))
    wide = (np.ceil(right).clip(max=grid.width) - column).clip(0).astype(np.int64)
    tall = (np.ceil(bottom).clip(max=grid.height) - row).clip(0).astype(np.int64)
    many = wide * tall
    cell = np.repeat(np.arange(len(outlines)), many)  # one entry for each bin of each bounding box
    within = np.arange(len(cell)) - np.repeat(np.cumsum(many) - many, many)
    row, column = row[cell] + within // wide[cell], column[cell] + within % wide[cell]
    x, y = grid.x0_um + column * grid.bin_um, grid.y0_um + row * grid.bin_um
    area = shapely.area(
        shapely.intersection(outlines[cell], shapely.box(x, y, x + grid.bin_um, y + grid.bin_um))
    )
    flat = row * grid.width + column
    found = sp.csr_matrix((area, (cell, flat)), (len(outlines), grid.height * grid.width))
    found.eliminate_zeros()
    return found


def _corner(grid: Grid) -> np.ndarray:
    return np.array([grid.x0_um, grid.y0_um, grid.x0_um, grid.y0_um])


def add_up(
    layer, genes: Sequence[str], parts: sp.csr_matrix, progress: Callable[[float, float, str], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts per cell and outside of cells, a block of genes at a time.

    Parameters
    ----------
    layer
        A `stsr.store.parts.Map`.
    genes
        Names (g,), all in the layer.
    parts
        Shares (n, bins).
    progress
        Called with (done, total, label).

    Returns
    -------
    counts, outside, totals
        (n, g) float32; what lies in no cell and the whole of the layer, both (g,) float64.
    """
    counts = np.empty((parts.shape[0], len(genes)), np.float32)
    outside, totals = np.empty(len(genes)), np.empty(len(genes))
    free = 1 - np.asarray(parts.sum(0)).ravel()  # part of each bin in no cell
    for block in _blocks(layer.grid, len(genes)):
        values = layer.read(genes[block]).reshape(block.stop - block.start, -1)  # (genes, bins)
        values = values.astype(np.float64)
        counts[:, block] = parts @ values.T
        outside[block], totals[block] = values @ free, values.sum(1)
        progress(block.stop, len(genes), "adding up bins")
    return counts, outside, totals


def _blocks(grid: Grid, genes: int) -> Iterator[slice]:
    """Genes to read together: whole chunks of 16 where memory allows."""
    size = max(1, _BLOCK_BYTES // (12 * grid.height * grid.width))
    size = size // 16 * 16 or size
    for start in range(0, genes, size):
        yield slice(start, min(start + size, genes))


# ------------------------------------------------------------------------------------------------- spots alone


def spot_values(spots, grid: Grid, parts: sp.csr_matrix, genes: Sequence[str]) -> np.ndarray:
    """Counts per cell (n, g) if counts lay evenly in every spot and its surroundings: spot counts per area."""
    measurement = spots.measurement(grid)
    spot = measurement.nearest.ravel()  # (bins,)
    spoken = np.flatnonzero(spot >= 0)
    seen = np.maximum(measurement.bins_seen, measurement.bins_seen.max(initial=1.0))
    density = sp.csr_matrix(
        (1 / seen[spot[spoken]], (spoken, spot[spoken])), (len(spot), measurement.spots)
    )  # (bins, spots)
    return ((parts @ density) @ spots.select(genes)).toarray()


def bilinear_values(spots, grid: Grid, parts: sp.csr_matrix, genes: Sequence[str]) -> np.ndarray:
    """Counts per cell (n, g) from spots interpolated by straight lines.

    Raises
    ------
    ValueError
        If the grid is no whole number of low-resolution pixels.
    """
    lr, mask = spots.measurement(grid).raster(spots.select(genes))  # (g, h, w), (1, h, w)
    coarse = grid.at(LR_UM)
    factor = grid.height // coarse.height
    lines = sp.kron(_straight(coarse.height, factor), _straight(coarse.width, factor), format="csr")
    pixels = lr.reshape(len(genes), -1)[:, _nearest_known(mask[0] > 0)].T  # (pixels, g)
    return ((parts @ lines) @ pixels) / factor**2


def _straight(coarse: int, factor: int) -> sp.csr_matrix:
    """Linear interpolation (coarse x factor, coarse) between the middles of coarse pixels, level beyond the last."""
    fine = np.arange(coarse * factor)
    place = ((fine + 0.5) / factor - 0.5).clip(0, coarse - 1)
    first = np.floor(place).astype(int)
    second = np.minimum(first + 1, coarse - 1)
    weight = place - first
    entries = np.concatenate([1 - weight, weight]), (np.tile(fine, 2), np.concatenate([first, second]))
    return sp.csr_matrix(entries, (len(fine), coarse))


def _nearest_known(known: np.ndarray) -> np.ndarray:
    """For each pixel (h * w,) the flat index of the nearest one that was measured."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return (rows * known.shape[1] + columns).ravel()


# ------------------------------------------------------------------------------------------------------ scores


def scores(
    counts: dict[str, np.ndarray], truth: np.ndarray, cells: Sequence[str], genes: Sequence[str]
) -> pd.DataFrame:
    """Correlation and error against measured counts, per gene over cells and per cell over genes.

    Parameters
    ----------
    counts
        {method: counts per cell (n, g)}.
    truth
        Measured counts (n, g).
    cells, genes
        Names (n,) and (g,).

    Returns
    -------
    scores
        One row for each gene and each cell: ``of`` ("gene" or "cell"), ``name``, ``counts`` (measured), for genes
        ``noise_ceiling`` (see `metrics.noise_ceiling`), and for each method ``pcc_METHOD`` and ``rmse_METHOD``, counts
        per cell. Correlations with what is constant are nan.
    """
    parts = []
    for of, names, turned in (("gene", genes, True), ("cell", cells, False)):
        measured = truth.T if turned else truth
        columns = {"of": of, "name": list(names), "counts": measured.sum(1)}
        if turned:
            columns["noise_ceiling"] = metrics.noise_ceiling(measured)
        for method, values in counts.items():
            found = values.T if turned else values
            columns[f"pcc_{method}"] = metrics.pearson(found, measured)
            columns[f"rmse_{method}"] = metrics.rmse(found, measured)
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)
