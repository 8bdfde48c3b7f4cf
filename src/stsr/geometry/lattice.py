"""Lattices of spots: their pitch, how well positions follow them, and the raster of a section around them."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from stsr.geometry.grid import LR_UM, Grid

VISIUM_SPOT_UM = 55.0
VISIUM_PITCH_UM = 100.0

_NEIGHBOURS = 6  # on a hexagonal lattice
_PITCH_TOLERANCE = 0.15  # relative deviation from the pitch within which spots count as neighbours


def median_pitch(centres: np.ndarray) -> float | None:
    """Median distance from a centre (n, 2) to its nearest neighbour; None for fewer than two centres."""
    if len(centres) < 2:
        return None
    distance, _ = cKDTree(centres).query(centres, k=2)
    return float(np.median(distance[:, 1]))


def is_visium_pitch(pitch_um: float | None) -> bool:
    """Whether a pitch is that of Visium, 100 um, within 15 %."""
    return pitch_um is not None and abs(pitch_um / VISIUM_PITCH_UM - 1) < _PITCH_TOLERANCE


def is_hexagonal(centres: np.ndarray) -> bool:
    """Whether nearest neighbours are equally far apart and spots have up to six of them."""
    if len(centres) < _NEIGHBOURS + 1:
        return False
    distance, _ = cKDTree(centres).query(centres, k=_NEIGHBOURS + 1)  # (n, 7): itself and its neighbours
    pitch = np.median(distance[:, 1])
    near = np.abs(distance[:, 1:] / pitch - 1) < _PITCH_TOLERANCE
    return bool(near[:, 0].mean() > 0.9 and near.sum(1).max() == _NEIGHBOURS)


def hexagonal_um(array_row: np.ndarray, array_col: np.ndarray) -> np.ndarray:
    """Positions (n, 2) as x, y of a Visium array, um: columns are 50 um apart, rows 100 um x sqrt(3) / 2."""
    return np.stack([array_col * VISIUM_PITCH_UM / 2, array_row * VISIUM_PITCH_UM * np.sqrt(3) / 2], axis=1)


def fitted(design: np.ndarray, positions: np.ndarray) -> tuple[float, float]:
    """Fit an affine from a lattice to measured positions by least squares.

    Parameters
    ----------
    design
        Lattice positions (n, 2), or (n, 3) with a column of ones for the shift.
    positions
        Measured positions (n, 2).

    Returns
    -------
    scale, misfit
        Units of ``positions`` per unit of the lattice (root of the determinant), and the largest residual in units of
        ``positions``.
    """
    affine, *_ = np.linalg.lstsq(design, positions, rcond=None)  # (2 or 3, 2)
    scale = abs(np.linalg.det(affine[:2])) ** 0.5
    return float(scale), float(np.abs(design @ affine - positions).max())


def with_shift(lattice: np.ndarray) -> np.ndarray:
    """Lattice positions (n, 2) as a design (n, 3) for `fitted`, with a column of ones."""
    return np.column_stack([lattice, np.ones(len(lattice))])


def lattice_um(centres: np.ndarray, array_row: np.ndarray, array_col: np.ndarray) -> float | None:
    """um per unit of the centres (n, 2) of a hexagonal array; None for a square array.

    Row plus column is even for every spot of Visium's hexagonal array. The pitch of a square array is not known.
    """
    if np.any((array_row + array_col) % 2):
        return None
    ideal = hexagonal_um(array_row, array_col)
    ideal, centred = ideal - ideal.mean(0), centres - centres.mean(0)
    if np.linalg.matrix_rank(ideal) == 2:
        scale, _ = fitted(ideal, centred)
        return 1 / scale if scale else None
    length, units = np.linalg.norm(ideal), np.linalg.norm(centred)  # spots on one line
    return float(length / units) if units else None


def bounds_of(centres_um: np.ndarray, size_um: float) -> tuple[float, float, float, float]:
    """Bounds (x0, y0, x1, y1) of all spots (n, 2) in their full size, um."""
    reach = size_um / 2
    (x0, y0), (x1, y1) = centres_um.min(0) - reach, centres_um.max(0) + reach
    return float(x0), float(y0), float(x1), float(y1)


def grid_around(centres_um: np.ndarray, size_um: float, bin_um: float) -> Grid:
    """The raster of a section with measured spots, on which all layers of the section lie.

    It contains all spots in their full size, with a margin of half the gap between two spots.

    Parameters
    ----------
    centres_um
        Spot centres (n, 2) as x, y, um.
    size_um
        Diameter or side of a spot, um.
    bin_um
        Bin size, um.

    Raises
    ------
    ValueError
        If bins do not nest in 100 um.
    """
    x0, y0, x1, y1 = bounds_of(centres_um, size_um)
    pitch_um = median_pitch(centres_um) or size_um
    around = max(0.0, (min(pitch_um, 2 * LR_UM) - size_um) / 2)
    return Grid.covering((x0 - around, y0 - around, x1 + around, y1 + around), bin_um)


def hexagonal_lattice(bounds_um: tuple[float, float, float, float]) -> np.ndarray:
    """Centres (n, 2) of Visium's hexagonal lattice, whose discs lie inside the bounds, row by row, um."""
    x0, y0, x1, y1 = bounds_um
    radius, pitch_um = VISIUM_SPOT_UM / 2, VISIUM_PITCH_UM
    ys = np.arange(y0 + radius, y1 - radius + 1e-9, pitch_um * np.sqrt(3) / 2)
    rows = []
    for number, y in enumerate(ys):
        xs = np.arange(x0 + radius + (number % 2) * pitch_um / 2, x1 - radius + 1e-9, pitch_um)
        rows.append(np.stack([xs, np.full_like(xs, y)], axis=1))
    return np.concatenate(rows) if rows else np.zeros((0, 2))
