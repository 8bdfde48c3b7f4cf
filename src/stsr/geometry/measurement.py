"""The measurement: how bins add up to spots, as a sparse matrix that simulates and rasterises spots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stsr.geometry.grid import LR_UM, Grid
from stsr.geometry.lattice import VISIUM_PITCH_UM, VISIUM_SPOT_UM, hexagonal_lattice, median_pitch

_SUBSAMPLES = 16  # per side of a bin, for the part of a bin that a disc covers: good to 0.4 % of a bin
_NEIGHBOURS = 6  # spots that speak for a bin between them: the sides of a hexagon
_SHARE_REACH = 1.2  # of the spot pitch: how far from a spot its correction is felt
_SHARED = 0.5
_REACH = 0.75  # of the spot pitch: how far a spot speaks for its surroundings; over half a square's diagonal
_POINTS = 2**20  # bins whose nearest spots are searched at once, for bounded memory


@dataclass(frozen=True)
class Measurement:
    """Spots over a grid.

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
    def hexagonal(
        cls, grid: Grid, pitch_um: float = VISIUM_PITCH_UM, diameter_um: float = VISIUM_SPOT_UM
    ) -> Measurement:
        """Visium's hexagonal lattice over the grid, with the spots that lie wholly inside."""
        return cls.discs(grid, hexagonal_lattice(grid.bounds_um, pitch_um, diameter_um), diameter_um)

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

    def correct(
        self, maps: np.ndarray, counts: np.ndarray, tolerance: float = 1e-3, rounds: int = 50
    ) -> float:
        """Make maps add up to what was measured, in place: ``x <- x A^T(y / Ax) / A^T 1`` until they do.

        Bins between spots, which no spot sees, take a part of what the spots around them say (`_share`); bins far from
        any spot keep their values. A spot that measured something where the map has nothing gets it spread evenly; one
        that sees no bin is left out.

        Parameters
        ----------
        maps
            (g, height, width) float32, counts per bin, not negative.
        counts
            Measured counts (spots, g).
        tolerance
            Largest relative error, summed over the spots of any one gene, at which to stop.

        Returns
        -------
        float
            The largest relative error of a gene that is left: ``sum |Ax - y| / sum y``.
        """
        if not self.spots:
            return 0.0
        flat = maps.reshape(len(maps), -1)  # (g, bins), a view
        measured = np.where(self.bins_seen[:, None] > 0, counts, 0).astype(np.float64)  # (spots, g)
        total = np.maximum(measured.sum(0), 1e-12)
        seen = np.asarray(self.matrix.sum(0)).ravel()
        bins = np.flatnonzero(seen)
        matrix, back = self.matrix[:, bins].astype(np.float64), self._back(seen, bins)
        values = flat[:, bins].T.astype(np.float64)  # (bins, g)
        empty = (matrix @ values <= 0) & (measured > 0)
        values += 1e-9 * (matrix.T @ empty)
        self._share(flat, values, matrix, measured, seen)
        for _ in range(rounds):
            expected = matrix @ values
            error = float((np.abs(expected - measured).sum(0) / total).max(initial=0.0))
            if error < tolerance / 2:  # float32 takes the rest
                break
            values *= back @ np.divide(measured, expected, out=np.zeros_like(measured), where=expected > 0)
        flat[:, bins] = values.T
        return error

    def _share(self, flat, values, matrix, measured, seen) -> None:
        """Multiply bins between spots by the root of the mean factor ``y / Ax`` of the spots around them, in place.

        The root, not the whole: measured on Visium discs over known truth, half of the correction in logarithms has the
        least error between spots (docs/experiments.md). One count is added to both sides against noise.
        """
        unseen, weights = self._around
        if not len(unseen):
            return
        factor = np.log((measured + 1) / (matrix @ values + 1))  # (spots, g)
        flat[:, unseen] *= np.exp(_SHARED * (weights @ factor)).T.astype(flat.dtype)

    @cached_property
    def _around(self) -> tuple[np.ndarray, sp.csr_matrix]:
        """Bins between spots, and their weights (bins, spots) on the spots around: inverse squares of distances."""
        seen = np.asarray(self.matrix.sum(0)).ravel() > 0
        x, y = self.grid.centres_um()
        points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        count = min(_NEIGHBOURS, self.spots)
        reach = _SHARE_REACH * self.pitch_um
        side_by_side = self.bins_seen.max() * self.grid.bin_um**2 > 0.95 * self.pitch_um**2
        # Between spots that touch there is nothing: what they leave out is where nobody looked.
        unseen = np.zeros(0, int) if side_by_side else np.flatnonzero(~seen)
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

    def _back(self, seen: np.ndarray, bins: np.ndarray) -> sp.csr_matrix:
        """A^T / A^T 1 (bins seen, spots): the mean of what the spots say that see a bin."""
        return (sp.diags(1.0 / seen[bins]) @ self.matrix[:, bins].T).tocsr().astype(np.float64)

    def window(self, grid: Grid) -> tuple[Measurement, np.ndarray]:
        """The measurement inside a window of the grid, cut where the window sticks out.

        Returns
        -------
        measurement, spots
            Only spots that lie in the window with all that they see, and their indices here.
        """
        row, column = self.grid.offset_of(grid)
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + grid.height, self.grid.height), min(column + grid.width, self.grid.width)
        grid = self.grid.window(top, left, bottom - top, right - left)
        wanted = (np.arange(top, bottom)[:, None] * self.grid.width + np.arange(left, right)).ravel()
        part = self.matrix[:, wanted].tocsr()
        inside = np.asarray(part.sum(1)).ravel()
        spots = np.flatnonzero((inside > 0) & (inside >= self.bins_seen * (1 - 1e-6)))
        return Measurement(grid, part[spots], self.centres_um[spots]), spots

    def raster(self, counts: np.ndarray | sp.spmatrix, lr_um: float = LR_UM) -> tuple[np.ndarray, np.ndarray]:
        """Rasterise spots to the low-resolution pixels that networks read.

        Every bin takes the density of its nearest spot, and low-resolution pixels average over their bins. For square
        spots these are the counts themselves; for discs the counts that a whole pixel would have had.

        Parameters
        ----------
        counts
            Spot counts (spots, g), dense or sparse.

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
        pixel = (rows // per_lr) * coarse.width + columns // per_lr
        spot = self.nearest.ravel()
        spoken = spot >= 0
        # Spots that extend beyond the grid measured with their whole area.
        area = np.maximum(self.bins_seen, self.bins_seen.max(initial=1.0))
        share = sp.coo_matrix(
            (1.0 / area[spot[spoken]], (pixel.ravel()[spoken], spot[spoken])),
            shape=(coarse.height * coarse.width, self.spots),
        ).tocsr()
        covered = (
            np.bincount(pixel.ravel(), weights=spoken, minlength=coarse.height * coarse.width) / per_lr**2
        )
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
