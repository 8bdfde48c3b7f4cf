"""The measurement: how bins add up to spots, as a sparse matrix that simulates and rasterises spots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stsr.geometry.grid import LR_UM, Grid
from stsr.geometry.lattice import VISIUM_SPOT_UM, hexagonal_lattice, median_pitch

_SUBSAMPLES = 16  # points per side of a bin, for the fraction that a disc covers; accurate to 0.4 % of a bin
_NEIGHBOURS = 6  # surrounding spots of a bin between spots: the corners of a hexagon
IN_TISSUE = 0.25
"""Smallest fraction of a spot's area in tissue; Visium also keeps partly covered spots at the tissue's edge."""
_SHARE_REACH = 1.2  # spot pitches; farther from a spot its correction has no effect
_REACH = 0.75  # spot pitches; bins farther from every spot are unmeasured. More than half a square's diagonal
_POINTS = 2**20  # bins whose nearest spots are searched at once, for bounded memory
_SPOTS = 2**12  # spots whose bins are computed at once, likewise


@dataclass(frozen=True)
class Measurement:
    """Spots over a grid, and the fraction of each bin that they cover.

    Parameters
    ----------
    grid
        The bins.
    matrix
        A (spots, bins), in [0, 1]: share of each bin's area that a spot covers. Bins are in row-major order.
    centres_um
        Spot centres (spots, 2) as x, y, um.
    """

    grid: Grid
    matrix: sp.csr_matrix
    centres_um: np.ndarray

    @classmethod
    def squares(cls, grid: Grid, centres_um: np.ndarray | None = None, side_um: float = LR_UM) -> Measurement:
        """Square spots; side by side over the whole grid if ``centres_um`` is not given."""
        if centres_um is None:
            x, y = grid.at(side_um).centres_um()
            centres_um = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        return cls(
            grid, _coverage(grid, centres_um, _square_fraction, side_um), np.asarray(centres_um, float)
        )

    @classmethod
    def discs(cls, grid: Grid, centres_um: np.ndarray, diameter_um: float = VISIUM_SPOT_UM) -> Measurement:
        """Round spots, as of Visium (55 um) and first-generation ST (100 um)."""
        return cls(
            grid, _coverage(grid, centres_um, _disc_fraction, diameter_um), np.asarray(centres_um, float)
        )

    @classmethod
    def hexagonal(cls, grid: Grid) -> Measurement:
        """Visium's hexagonal lattice over the grid, with the spots that lie wholly inside."""
        return cls.discs(grid, hexagonal_lattice(grid.bounds_um))

    @property
    def spots(self) -> int:
        """Number of spots."""
        return self.matrix.shape[0]

    @cached_property
    def bins_seen(self) -> np.ndarray:
        """Area of each spot inside the grid, in bins (spots,); 0 for spots outside."""
        return np.asarray(self.matrix.sum(1)).ravel()

    @cached_property
    def pitch_um(self) -> float:
        """Distance between neighbouring spots, um; 100 for a single spot."""
        return median_pitch(self.centres_um) or LR_UM

    @cached_property
    def nearest(self) -> np.ndarray:
        """Index of the nearest spot of each bin; see `nearest_spot`."""
        return nearest_spot(self.grid, self.centres_um)

    def add_up(self, maps: np.ndarray) -> np.ndarray:
        """Sum maps of counts over spots: (g, height, width) -> (spots, g)."""
        flat = maps.reshape(len(maps), -1)  # (g, bins)
        return self.matrix @ flat.T

    @cached_property
    def around(self) -> tuple[np.ndarray, sp.csr_matrix]:
        """Bins between spots, and their weights (bins, spots) for the surrounding spots: inverse squared distances."""
        seen = np.asarray(self.matrix.sum(0)).ravel() > 0
        x, y = self.grid.centres_um()
        points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        count = min(_NEIGHBOURS, self.spots)
        reach = _SHARE_REACH * self.pitch_um
        # Adjacent squares leave no bins between them: bins without a spot are unmeasured.
        unseen = np.zeros(0, int) if self._side_by_side else np.flatnonzero(~seen)
        distance, spot = cKDTree(self.centres_um).query(points[unseen], k=count, distance_upper_bound=reach)
        distance, spot = distance.reshape(-1, count), spot.reshape(-1, count)
        near = np.isfinite(distance)
        weight = np.where(near, np.maximum(distance, self.grid.bin_um) ** -2.0, 0)
        some = near.any(1)
        weight = weight[some] / weight[some].sum(1, keepdims=True)
        rows = np.broadcast_to(np.arange(some.sum())[:, None], weight.shape)
        keep = near[some]
        shape = (int(some.sum()), self.spots)
        return unseen[some], sp.csr_matrix((weight[keep], (rows[keep], spot[some][keep])), shape)

    @property
    def _side_by_side(self) -> bool:
        """Whether spots leave no bins between them."""
        return bool(self.bins_seen.max(initial=0.0) * self.grid.bin_um**2 > 0.95 * self.pitch_um**2)

    def of_spots(self, spots: np.ndarray) -> Measurement:
        """The measurement by some of the spots, by index."""
        return Measurement(self.grid, self.matrix[spots], self.centres_um[spots])

    def of_seeing_spots(self) -> tuple[Measurement, np.ndarray]:
        """The measurement by the spots that cover any bin, and their indices."""
        spots = np.flatnonzero(self.bins_seen > 0)
        return self.of_spots(spots), spots

    def in_tissue(self, tissue: np.ndarray) -> np.ndarray:
        """Indices of the spots that lie in tissue, (height, width) bool, with a quarter of their area or more."""
        covered = self.matrix @ tissue.ravel()
        return np.flatnonzero((covered > 0) & (covered >= IN_TISSUE * self.bins_seen))

    def raster(self, counts: np.ndarray | sp.spmatrix, lr_um: float = LR_UM) -> tuple[np.ndarray, np.ndarray]:
        """Rasterise spots to the low-resolution pixels that networks read.

        Every bin takes the density of its nearest spot, and low-resolution pixels average over their bins. For square
        spots these are the counts themselves; for discs the counts that a whole pixel would have had. Squares side by
        side that are much smaller than a pixel, such as bins of 16 um, are added up by their area in it.

        Parameters
        ----------
        counts
            Spot counts (spots, g), dense or sparse.
        lr_um
            Side of a low-resolution pixel, um.

        Returns
        -------
        lr, mask
            Counts per low-resolution pixel (g, h, w) float32; share of the pixel near any spot (1, h, w) float32.
            Where the mask is 0, lr is 0.
        """
        weights, mask = self._raster_weights(lr_um)
        lr = np.asarray(
            (weights @ counts).todense() if sp.issparse(counts) else weights @ counts
        )  # (pixels, g)
        return lr.T.reshape(-1, *mask.shape).astype(np.float32), mask[None].astype(np.float32)

    def _raster_weights(self, lr_um: float) -> tuple[sp.csr_matrix, np.ndarray]:
        coarse = self.grid.at(lr_um)
        per_lr = self.grid.height // coarse.height
        rows, columns = np.indices(self.grid.shape)
        pixel = ((rows // per_lr) * coarse.width + columns // per_lr).ravel()
        pixels = coarse.height * coarse.width
        # Spots that extend beyond the grid measured with their whole area.
        area = np.maximum(self.bins_seen, self.bins_seen.max(initial=1.0))
        if self._side_by_side and 2 * self.pitch_um < lr_um:
            seen: sp.coo_matrix = self.matrix.tocoo()
            spot, bins, part = seen.row, seen.col, seen.data
        else:
            bins = np.flatnonzero(self.nearest.ravel() >= 0)
            spot, part = self.nearest.ravel()[bins], np.ones(len(bins))
        share = sp.coo_matrix((part / area[spot], (pixel[bins], spot)), (pixels, self.spots)).tocsr()
        covered = np.bincount(pixel[bins], weights=part, minlength=pixels) / per_lr**2
        scale = np.divide(1.0, covered, out=np.zeros_like(covered), where=covered > 0)
        return sp.diags(scale) @ share, covered.reshape(coarse.shape)


def nearest_spot(grid: Grid, centres_um: np.ndarray) -> np.ndarray:
    """Index (height, width) of the spot nearest to each bin's centre, -1 beyond 0.75 of the spot pitch."""
    nearest = np.full(grid.shape, -1)
    if not len(centres_um):
        return nearest
    x, y = grid.centres_um()
    tree, reach = cKDTree(centres_um), _REACH * (median_pitch(centres_um) or LR_UM)
    step = max(1, _POINTS // grid.width)
    for top in range(0, grid.height, step):
        points = np.stack(np.meshgrid(x, y[top : top + step]), axis=-1)  # (rows, width, 2)
        distance, index = tree.query(points, distance_upper_bound=reach)
        nearest[top : top + step] = np.where(np.isfinite(distance), index, -1)
    return nearest


def _square_fraction(dx: np.ndarray, dy: np.ndarray, bin_um: float, side_um: float) -> np.ndarray:
    """Share of a bin at (dx, dy) from a square's centre that the square covers, exactly."""

    def overlap(d: np.ndarray) -> np.ndarray:
        return np.clip(
            np.minimum(d + bin_um / 2, side_um / 2) - np.maximum(d - bin_um / 2, -side_um / 2), 0, None
        )

    return overlap(dx) * overlap(dy) / bin_um**2


def _disc_fraction(dx: np.ndarray, dy: np.ndarray, bin_um: float, diameter_um: float) -> np.ndarray:
    """Share of a bin at (dx, dy) from a disc's centre that the disc covers, by subsampling."""
    offsets = ((np.arange(_SUBSAMPLES) + 0.5) / _SUBSAMPLES - 0.5) * bin_um
    covered = np.zeros(dx.shape, np.float32)
    for offset_y in offsets:  # a loop over one axis limits memory
        inside = (dx[..., None] + offsets) ** 2 + (dy[..., None] + offset_y) ** 2 <= (diameter_um / 2) ** 2
        covered += inside.sum(-1)
    return covered / _SUBSAMPLES**2


def _coverage(
    grid: Grid, centres_um: np.ndarray, fraction: Callable[..., np.ndarray], size_um: float
) -> sp.csr_matrix:
    """A (spots, bins) from a function that gives the covered share of a bin at an offset from a spot's centre."""
    centres = np.asarray(centres_um, dtype=float).reshape(-1, 2)
    parts = [
        _coverage_of_some(grid, centres[start : start + _SPOTS], fraction, size_um)
        for start in range(0, max(len(centres), 1), _SPOTS)
    ]
    return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


def _coverage_of_some(
    grid: Grid, centres: np.ndarray, fraction: Callable[..., np.ndarray], size_um: float
) -> sp.csr_matrix:
    """`_coverage` by a few spots."""
    reach = int(np.ceil(size_um / 2 / grid.bin_um)) + 1
    around = np.arange(-reach, reach + 1)
    column0 = np.floor((centres[:, 0] - grid.x0_um) / grid.bin_um).astype(int)
    row0 = np.floor((centres[:, 1] - grid.y0_um) / grid.bin_um).astype(int)
    rows = np.broadcast_to((row0[:, None] + around)[:, :, None], (len(centres), len(around), len(around)))
    columns = np.broadcast_to((column0[:, None] + around)[:, None, :], rows.shape)
    dx = grid.x0_um + (columns + 0.5) * grid.bin_um - centres[:, 0, None, None]
    dy = grid.y0_um + (rows + 0.5) * grid.bin_um - centres[:, 1, None, None]
    part = fraction(dx, dy, grid.bin_um, size_um)  # (spots, k, k)
    keep = (part > 0) & (rows >= 0) & (rows < grid.height) & (columns >= 0) & (columns < grid.width)
    spot = np.broadcast_to(np.arange(len(centres))[:, None, None], rows.shape)
    bins = rows[keep] * grid.width + columns[keep]
    matrix = sp.coo_matrix((part[keep], (spot[keep], bins)), shape=(len(centres), grid.height * grid.width))
    return matrix.tocsr()
