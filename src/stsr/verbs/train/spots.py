"""Simulated spots of training tiles: lattices relative to a tile, and a section's mean counts under them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from stsr.geometry.grid import Grid, raster_um
from stsr.geometry.lattice import VISIUM_PITCH_UM, VISIUM_SPOT_UM, hexagonal_lattice
from stsr.geometry.measurement import Measurement

_OFFSETS = 4  # shifts of the hexagonal lattice per axis: 16 in all, 25 x 22 um apart
_WHOLE = 1 - 1e-4  # fraction of a spot's area that must be measured


def _squares(grid: Grid) -> list[np.ndarray]:
    """Centres of the low-resolution pixels."""
    x, y = grid.at(raster_um(grid.bin_um)).centres_um()
    return [np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)]


def _measure_squares(grid: Grid, centres_um: np.ndarray) -> Measurement:
    return Measurement.squares(grid, centres_um, raster_um(grid.bin_um))


def _hexagons(grid: Grid) -> list[np.ndarray]:
    """Lattices whose discs lie in the grid, at even offsets of up to a pitch in x and a row of spots in y."""
    x0, y0, x1, y1 = grid.bounds_um
    cell = np.array([1, np.sqrt(3) / 2]) * VISIUM_PITCH_UM
    radius = VISIUM_SPOT_UM / 2
    lattices = []
    for number in range(_OFFSETS**2):
        dx, dy = (np.array(divmod(number, _OFFSETS)) + 0.5) / _OFFSETS * cell
        centres = hexagonal_lattice((x0 - cell[0] + dx, y0 - cell[1] + dy, x1, y1))
        inside = (centres >= np.array([x0, y0]) + radius).all(1)
        lattices.append(centres[inside])
    return lattices


_LATTICES: dict[str, tuple[Callable[[Grid], list[np.ndarray]], Callable[[Grid, np.ndarray], Measurement]]] = {
    "square": (_squares, _measure_squares),
    "visium": (_hexagons, Measurement.discs),
}
SPOT_KINDS = tuple(_LATTICES)
"""Kinds of spots that can be simulated from counts per bin."""


@dataclass(frozen=True)
class Lattice:
    """Spots over a tile and a margin of one low-resolution pixel."""

    measurement: Measurement
    lr_um: float

    @property
    def area(self) -> float:
        """Area of a spot, in low-resolution pixels."""
        seen = self.measurement.bins_seen.max(initial=0.0)
        return float(seen) * (self.measurement.grid.bin_um / self.lr_um) ** 2

    def simulate(
        self, counts: sp.csr_matrix, tissue: np.ndarray, usable: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measure a tile; only by spots that lie in tissue, as `prepare` keeps them, and wholly in measured bins.

        Parameters
        ----------
        counts
            (bins, g) of the tile and its margin.
        tissue, usable
            (height, width) bool, likewise: tissue, and measured bins that are not excluded.

        Returns
        -------
        lr, mask
            (g, h, w) and (1, h, w) float32 of the tile, as `Measurement.raster` gives them.
        """
        kept = spots_in(self.measurement, tissue, usable)
        if len(kept) == self.measurement.spots:
            matrix, weights, mask = self._matrix, self._weights, self._mask
        else:
            matrix, (weights, mask) = (
                self._matrix[kept],
                _operator(self.measurement.of_spots(kept), self.lr_um),
            )
        spots = (matrix @ counts).toarray()  # (spots, g)
        lr = np.ascontiguousarray((weights @ spots).T)  # (g, h w)
        return lr.reshape(-1, *mask.shape[1:]), mask

    @cached_property
    def _matrix(self) -> sp.csr_matrix:
        return self.measurement.matrix.astype(np.float32)

    @cached_property
    def _weights(self) -> np.ndarray:
        return _operator(self.measurement, self.lr_um)[0]

    @cached_property
    def _mask(self) -> np.ndarray:
        return _operator(self.measurement, self.lr_um)[1]


def _operator(measurement: Measurement, lr_um: float) -> tuple[np.ndarray, np.ndarray]:
    """`Measurement.raster` as weights (h w, spots), and its mask (1, h, w), without the margin."""
    raster, mask = measurement.raster(np.eye(measurement.spots), lr_um)
    inner = raster[:, 1:-1, 1:-1]  # (spots, h, w)
    return np.ascontiguousarray(inner.reshape(len(inner), -1).T), np.ascontiguousarray(mask[:, 1:-1, 1:-1])


def spots_in(measurement: Measurement, tissue: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Indices of the spots with a quarter of their area or more in tissue, and all of it in usable bins."""
    whole = measurement.matrix @ usable.ravel() >= _WHOLE * measurement.bins_seen
    return np.intersect1d(measurement.in_tissue(tissue), np.flatnonzero(whole), assume_unique=True)


def lattices_of(kind: str, side_lr: int, bin_um: float, lr_um: float) -> list[Lattice]:
    """Lattices of a kind of spots over tiles of ``side_lr`` low-resolution pixels and their margin."""
    side = round((side_lr + 2) * lr_um / bin_um)
    grid = Grid(0.0, 0.0, bin_um, side, side)
    centres, measure = _LATTICES[kind]
    return [Lattice(measure(grid, each), lr_um) for each in centres(grid)]


def spots_over(
    kind: str, grid: Grid, tissue: np.ndarray, usable: np.ndarray, lattice: int = 0
) -> Measurement:
    """The spots of a lattice over a section that `Lattice.simulate` would measure."""
    centres, measure = _LATTICES[kind]
    lattices = centres(grid)
    whole = measure(grid, lattices[lattice % len(lattices)])
    return whole.of_spots(spots_in(whole, tissue, usable))


def mean_weights(kind: str, grid: Grid, tissue: np.ndarray, usable: np.ndarray, lr_um: float) -> np.ndarray:
    """Weights of bins (height, width) whose weighted sum of counts is a section's `stsr.methods.batch.lr_mean`.

    Spots lie over the whole section. ``tissue`` and ``usable`` are as in `Lattice.simulate`; bins that are not usable
    do not enter.
    """
    measurement = spots_over(kind, grid, tissue, usable)
    nearest = measurement.nearest[usable]
    seen = np.bincount(nearest[nearest >= 0], minlength=measurement.spots)  # bins to which a spot is nearest
    per_spot = seen / measurement.bins_seen.max(initial=1.0)  # as in `Measurement.raster`
    total = seen.sum() / (lr_um / grid.bin_um) ** 2  # low-resolution pixels
    return (measurement.matrix.T @ per_spot).reshape(grid.shape) / max(total, 1e-9)
