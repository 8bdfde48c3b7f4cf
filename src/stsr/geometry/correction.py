"""Correction of maps, so that their bins add up to the measured spots."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement

_SHARED = 0.5  # exponent of the surrounding spots' mean factor, for bins between spots
_TOLERANCE = 1e-3  # relative error, summed over the spots of a gene, at which to stop
_ROUNDS = 50  # at most, where spots share bins
_SMOOTH_PITCHES = 0.7  # standard deviation of the weights of spots, in distances between neighbouring spots
_SMOOTH_REACH = 3.0  # standard deviations
_WHOLE = 0.9  # of the median spot's area must lie in the grid
_LEAST_COUNTS = 0.1  # added to counts of a spot, which limits ratios of single counts
_DUST = 1e-6  # smaller fractions of a bin or spot are rounding errors


class Correction:
    """Makes maps add up to the measured counts: ``x <- x A^T(y / Ax) / A^T 1``, repeated where spots share bins.

    Bins between spots take a part of the correction of the surrounding spots; bins far from any spot keep their
    values. Where the map is zero over a spot with counts, these are spread evenly over the spot.

    Corrected values in a window depend only on the map in `area`, and equal those of the whole section bit for bit:
    everything that depends on all spots (pitch, neighbours, spot size) is taken from the whole measurement. Spots
    that share no bin are exact after one round. If spots share bins, all bins of the section depend on each other,
    and `area` is the whole grid.

    Parameters
    ----------
    measurement
        All spots, over the whole section's grid.
    window
        The part of the grid to correct; all of it by default.
    support
        (height, width) bool, over the whole grid: bins that are not set to zero later; all by default. The
        error is computed over spots that lie entirely inside.

    Attributes
    ----------
    window, area
        The bins to correct, and the bins that must be given for it.
    spots
        Indices of the spots whose counts must be given.
    beyond
        Number of spots in the window that reach beyond the support.
    """

    def __init__(
        self, measurement: Measurement, window: Grid | None = None, support: np.ndarray | None = None
    ):
        grid = measurement.grid
        self.window = window or grid
        wanted = _inside(grid, self.window).ravel()  # (bins,) bool
        kept = wanted if support is None else wanted & support.ravel()
        matrix, sizes = measurement.matrix, measurement.bins_seen
        unseen, weights = measurement.around
        mine = wanted[unseen]
        self._shares_bins = bool(((matrix > _DUST).sum(0) > 1).any())
        if self._shares_bins:
            self.spots = np.arange(measurement.spots)
            self.area = grid
        else:
            gives = np.asarray(weights[mine].sum(0)).ravel()
            self.spots = np.flatnonzero((matrix @ wanted > 0) | (gives > 0))
            reached = wanted | (np.asarray(matrix[self.spots].sum(0)).ravel() > 0)
            self.area = _around(grid, reached)
        place = np.zeros(len(wanted), int)  # of a bin in the area
        place[_inside(grid, self.area).ravel()] = np.arange(self.area.height * self.area.width)
        own = matrix[self.spots]
        bins = np.flatnonzero(np.asarray(own.sum(0)).ravel())
        seen = np.asarray(matrix.sum(0)).ravel()[bins]
        self._bins, self._unseen = place[bins], place[unseen[mine]]
        self._matrix = own[:, bins].astype(np.float64)
        # A^T / A^T 1 (bins, spots): the mean over the spots that cover a bin.
        self._back = (sp.diags(1.0 / seen) @ own[:, bins].T).tocsr().astype(np.float64)
        self._weights = weights[mine][:, self.spots]
        self._seeing = sizes[self.spots, None] > 0
        lost = matrix @ ~kept
        self._whole = ((sizes > 0) & (lost <= _DUST * sizes))[self.spots]
        outside = 0 * sizes if support is None else matrix @ ~support.ravel()
        self.beyond = int(((matrix @ wanted > _DUST * sizes) & (outside > _DUST * sizes)).sum())

    def apply(self, maps: np.ndarray, counts: np.ndarray) -> float | None:
        """Correct maps in place.

        Parameters
        ----------
        maps
            (g, height, width) float32 over `area`, contiguous: counts per bin, not negative. Only values in the
            window are corrected in full.
        counts
            Measured counts (spots, g) of `spots`.

        Returns
        -------
        float or None
            The largest remaining relative error of a gene, ``sum |Ax - y| / sum y`` over the spots that lie entirely
            inside window and support; None if there are none.
        """
        flat = maps.reshape(len(maps), -1)  # (g, bins of the area), a view
        measured = np.where(self._seeing, counts, 0).astype(np.float64)  # (spots, g)
        values = flat[:, self._bins].T.astype(np.float64)  # (bins, g)
        empty = (self._matrix @ values <= 0) & (measured > 0)
        values += 1e-9 * (self._matrix.T @ empty)
        self._correct_between(flat, values, measured)
        for number in range(_ROUNDS if self._shares_bins else 1):
            expected = self._matrix @ values
            if number and _error(expected, measured) < _TOLERANCE / 2:  # half is left for rounding
                break
            factor = np.divide(measured, expected, out=np.zeros_like(measured), where=expected > 0)
            values *= self._back @ factor
        flat[:, self._bins] = values.T
        if not self._whole.any():
            return None
        written = flat[:, self._bins].T.astype(np.float64)
        return _error((self._matrix @ written)[self._whole], measured[self._whole])

    def _correct_between(self, flat: np.ndarray, values: np.ndarray, measured: np.ndarray) -> None:
        """Multiply bins between spots by the square root of the mean ``y / Ax`` of the surrounding spots, in place.

        On Visium discs with known truth, half of the correction in logarithms gave the smallest error between spots
        (docs/experiments.md). One count is added to y and Ax to limit noise.
        """
        if not len(self._unseen):
            return
        factor = np.log((measured + 1) / (self._matrix @ values + 1))  # (spots, g)
        flat[:, self._unseen] *= np.exp(_SHARED * (self._weights @ factor)).T.astype(flat.dtype)


class SmoothCorrection:
    """Moves maps towards the spots over some spots' distance, so that detail stays and the noise of one spot does not.

    A map is multiplied by ``exp(sum_s k_s log((y_s + e) / ((Ax)_s + e)))``, where the Gaussian weights k of the spots
    around a bin add up to 1. Bins far from any spot keep their values. Values in a window equal those of the whole
    section. Parameters and attributes are those of `Correction`.
    """

    def __init__(
        self, measurement: Measurement, window: Grid | None = None, support: np.ndarray | None = None
    ):
        grid = measurement.grid
        self.window = window or grid
        sigma = _SMOOTH_PITCHES * measurement.pitch_um
        sizes, centres = measurement.bins_seen, measurement.centres_um
        whole = np.flatnonzero(sizes > _WHOLE * np.median(sizes[sizes > 0]))
        wanted = _inside(grid, self.window).ravel()
        x, y = (axis.ravel()[wanted] for axis in np.meshgrid(*grid.centres_um()))
        # Only spots that matter here, in the order of the section.
        tree = cKDTree(np.column_stack([x, y]))
        apart = tree.sparse_distance_matrix(
            cKDTree(centres[whole]), _SMOOTH_REACH * sigma, output_type="coo_matrix"
        )
        used = np.unique(apart.col)
        self.spots = whole[used]
        weights = sp.coo_matrix(
            (np.exp(-(apart.data**2) / (2 * sigma**2)), (apart.row, np.searchsorted(used, apart.col))),
            shape=(len(x), len(used)),
        ).tocsr()
        total = np.asarray(weights.sum(1)).ravel()
        self._weights = sp.diags(1 / np.maximum(total, _DUST)) @ weights
        reached = wanted | (np.asarray(measurement.matrix[self.spots].sum(0)).ravel() > 0)
        self.area = _around(grid, reached)
        within = _inside(grid, self.area).ravel()
        self._matrix = measurement.matrix[self.spots][:, within].astype(np.float64)
        self._bins = np.flatnonzero(wanted[within])
        self.beyond = 0

    def apply(self, maps: np.ndarray, counts: np.ndarray) -> None:
        """Correct maps (g, height, width) over `area` in place, towards counts (spots, g) of `spots`."""
        flat = maps.reshape(len(maps), -1)  # (g, bins of the area), a view
        expected = self._matrix @ flat.T.astype(np.float64)  # (spots, g)
        ratio = np.log((counts + _LEAST_COUNTS) / (expected + _LEAST_COUNTS))
        flat[:, self._bins] *= np.exp(self._weights @ ratio).T.astype(flat.dtype)


def _inside(grid: Grid, window: Grid) -> np.ndarray:
    """Mask of the bins of a grid that lie in a window of it: (height, width) bool."""
    row, column = grid.offset_of(window)
    inside = np.zeros(grid.shape, bool)
    inside[row : row + window.height, column : column + window.width] = True
    return inside


def _around(grid: Grid, bins: np.ndarray) -> Grid:
    """The smallest window of whole low-resolution pixels that contains the given bins, (bins,) bool."""
    rows, columns = np.nonzero(bins.reshape(grid.shape))
    top, left = int(rows.min()), int(columns.min())
    hull = grid.window(top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
    return grid.crop_um(*hull.bounds_um)


def _error(expected: np.ndarray, measured: np.ndarray) -> float:
    """Largest relative error of a gene over its spots; both (spots, g)."""
    total = np.maximum(measured.sum(0), 1e-12)
    return float((np.abs(expected - measured).sum(0) / total).max(initial=0.0))
