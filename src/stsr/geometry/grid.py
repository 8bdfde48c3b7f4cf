"""The grid of bins and its place in um: all arithmetic between um and bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

LR_UM = 100.0
"""Pitch of the low-resolution raster: the spot distance of Visium."""

Array = TypeVar("Array")
"""A numpy array or a torch tensor."""

_SNAP = 1e-6  # um; points closer than this to a bin edge lie on it
_RASTER_OFF = 0.1  # largest relative difference of a low-resolution pixel from `LR_UM`


@dataclass(frozen=True)
class Grid:
    """A raster of square bins in the plane of the section.

    Bin ``(row, column)`` covers ``[x0_um + column * bin_um, x0_um + (column + 1) * bin_um)`` and the same in y,
    so whole-number bin coordinates are bin *corners* and centres lie at halves.

    Parameters
    ----------
    x0_um, y0_um
        Corner of bin (0, 0), um.
    bin_um
        Side of a bin, um.
    height, width
        Number of bins in y and x.

    Raises
    ------
    ValueError
        If the bin size is not positive or the grid has no bin.
    """

    x0_um: float
    y0_um: float
    bin_um: float
    height: int
    width: int

    def __post_init__(self):
        if not self.bin_um > 0:
            raise ValueError(f"a bin must have a positive size, not {self.bin_um} um")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a grid needs at least one bin, not {self.height} x {self.width}")

    @classmethod
    def covering(cls, bounds_um: tuple[float, float, float, float], bin_um: float) -> Grid:
        """The smallest grid of whole low-resolution pixels (see `raster_um`) over ``(x0, y0, x1, y1)``.

        It starts at the corner (x0, y0).

        Raises
        ------
        ValueError
            If no low-resolution pixel is a multiple of the bin.
        """
        lr_um = raster_um(bin_um)
        per_lr = bins_per_lr(bin_um, lr_um)
        x0, y0, x1, y1 = bounds_um
        columns = max(1, int(np.ceil((x1 - x0) / lr_um - _SNAP)))
        rows = max(1, int(np.ceil((y1 - y0) / lr_um - _SNAP)))
        return cls(float(x0), float(y0), float(bin_um), rows * per_lr, columns * per_lr)

    @classmethod
    def over(cls, bounds_um: tuple[float, float, float, float], bin_um: float) -> Grid:
        """Bins of any size over ``(x0, y0, x1, y1)``, from its corner (x0, y0) to the nearest whole bin."""
        x0, y0, x1, y1 = bounds_um
        return cls(x0, y0, bin_um, max(1, round((y1 - y0) / bin_um)), max(1, round((x1 - x0) / bin_um)))

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in bins."""
        return self.height, self.width

    @property
    def bounds_um(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1), um."""
        return (
            self.x0_um,
            self.y0_um,
            self.x0_um + self.width * self.bin_um,
            self.y0_um + self.height * self.bin_um,
        )

    @property
    def bin_to_um(self) -> np.ndarray:
        """Affine (3, 3) from (column, row, 1) in bins to (x, y, 1) in um."""
        return np.array([[self.bin_um, 0, self.x0_um], [0, self.bin_um, self.y0_um], [0, 0, 1.0]])

    def rows_columns(self, x_um: ArrayLike, y_um: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the bin of each point.

        Parameters
        ----------
        x_um, y_um
            Coordinates (n,), um.

        Returns
        -------
        rows, columns, inside
            Indices (n,) int64, and whether each point lies in the grid (n,) bool. Indices of points outside are
            meaningless.
        """
        columns = np.floor((np.asarray(x_um, dtype=np.float64) - self.x0_um) / self.bin_um).astype(np.int64)
        rows = np.floor((np.asarray(y_um, dtype=np.float64) - self.y0_um) / self.bin_um).astype(np.int64)
        inside = (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)
        return rows, columns, inside

    def centres_um(self) -> tuple[np.ndarray, np.ndarray]:
        """x (width,) and y (height,) of the bin centres, um."""
        return (
            self.x0_um + (np.arange(self.width) + 0.5) * self.bin_um,
            self.y0_um + (np.arange(self.height) + 0.5) * self.bin_um,
        )

    def at(self, bin_um: float) -> Grid:
        """The same area with another bin size.

        Raises
        ------
        ValueError
            If the area is not a whole number of the new bins.
        """
        height = self.height * self.bin_um / bin_um
        width = self.width * self.bin_um / bin_um
        if abs(height - round(height)) > _SNAP * height or abs(width - round(width)) > _SNAP * width:
            raise ValueError(
                f"{self.height} x {self.width} bins of {self.bin_um} um do not divide into {bin_um} um"
            )
        return Grid(self.x0_um, self.y0_um, float(bin_um), round(height), round(width))

    def window(self, row: int, column: int, height: int, width: int) -> Grid:
        """The grid of a window whose first bin is (row, column); it may extend beyond this grid."""
        return Grid(
            self.x0_um + column * self.bin_um,
            self.y0_um + row * self.bin_um,
            self.bin_um,
            int(height),
            int(width),
        )

    def offset_of(self, other: Grid) -> tuple[int, int]:
        """Row and column in this grid of the first bin of ``other``.

        Raises
        ------
        ValueError
            If the bins of the two grids do not coincide.
        """
        column = (other.x0_um - self.x0_um) / self.bin_um
        row = (other.y0_um - self.y0_um) / self.bin_um
        aligned = max(abs(column - round(column)), abs(row - round(row))) < 1e-3
        if not aligned or abs(self.bin_um - other.bin_um) > _SNAP:
            raise ValueError("the bins of these grids do not coincide")
        return round(row), round(column)

    def crop_um(self, x0: float, y0: float, x1: float, y1: float) -> Grid:
        """The window of whole low-resolution pixels that covers a region, um, clipped to the grid.

        Raises
        ------
        ValueError
            If the region does not overlap the grid.
        """
        lr_um = raster_um(self.bin_um)
        per_lr = bins_per_lr(self.bin_um, lr_um)
        most = np.array(self.shape) // per_lr
        first = np.array([y0 - self.y0_um, x0 - self.x0_um]) / lr_um + _SNAP
        last = np.array([y1 - self.y0_um, x1 - self.x0_um]) / lr_um - _SNAP
        first, last = np.clip(np.floor(first), 0, most), np.clip(np.ceil(last), 0, most)
        if (last <= first).any():
            raise ValueError("the region lies outside the section")
        row, column, height, width = (np.concatenate([first, last - first]) * per_lr).astype(int).tolist()
        return self.window(row, column, height, width)


def raster_um(bin_um: float) -> float:
    """Side of the low-resolution pixels over bins of a size, um.

    100 um where bins nest in it, else the multiple of the bin within 90..110 um that is nearest to 100 um: 96 um for
    bins of 8 and 16 um.

    Raises
    ------
    ValueError
        If there is no such multiple.
    """
    per_lr = max(1, round(LR_UM / bin_um))
    lr_um = per_lr * bin_um
    if abs(lr_um - LR_UM) < _SNAP * per_lr:
        return LR_UM
    if abs(lr_um - LR_UM) > _RASTER_OFF * LR_UM + _SNAP:
        raise ValueError(
            f"no multiple of bins of {bin_um} um is about {LR_UM:g} um: they do not nest in a raster"
        )
    return lr_um


def bins_per_lr(bin_um: float, lr_um: float | None = None) -> int:
    """Number of bins along a side of a low-resolution pixel, by default that of `raster_um`.

    Raises
    ------
    ValueError
        If the pixel is not a multiple of the bin.
    """
    lr_um = raster_um(bin_um) if lr_um is None else lr_um
    per_lr = lr_um / bin_um
    if abs(per_lr - round(per_lr)) > _SNAP or round(per_lr) < 1:
        raise ValueError(f"bins of {bin_um} um do not nest in {lr_um:g} um")
    return round(per_lr)


def add_up(values: Array, factor: int) -> Array:
    """Sum blocks of ``factor`` x ``factor`` bins: (..., y, x) -> (..., y / factor, x / factor).

    For numpy arrays and torch tensors. Counts at 10 um become exact counts at 20 um.
    """
    if factor == 1:
        return values
    whole: Any = values
    *lead, height, width = whole.shape
    blocks = whole.reshape(*lead, height // factor, factor, width // factor, factor)
    return blocks.sum(-1).sum(-2)  # (..., y / factor, x / factor)
