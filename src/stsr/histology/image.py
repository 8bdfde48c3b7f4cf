"""The H&E image in um: any affine, any pyramid, read window by window in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stsr.errors import StsrError
from stsr.geometry.grid import Grid

_BLOCK_BYTES = 48 * 2**20  # of source pixels read at once
_MARGIN = 4  # averaged pixels around a window: one for the interpolation, two for the smoothing, one to spare
_COARSER = 1.5  # ratio of pixel sizes from which an image lacks detail; scans of 20x have 0.45 to 0.65 um
_SLACK = 1e-6  # px or bins; rounding of affines
_STRAIGHT = 1e-4  # px; smaller distances change no grey level
_AT_ONCE = 2**14  # values that are interpolated together, for the processor's cache


class Pixels(Protocol):
    """An array of pixels (numpy, zarr, dask or `stsr.store.arrays.StoredArray`), sliced as numpy slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""

    @property
    def dtype(self) -> Any:
        """Type of the values."""

    def __getitem__(self, window: Any) -> Any:
        """The pixels of a window."""


@dataclass(frozen=True)
class _Level:
    """One resolution: the array, its number of pixels, and the affine from um to its pixels."""

    array: Pixels
    height: int
    width: int
    um_to_px: np.ndarray
    um_per_px: float


class Image:
    """An H&E image and its place in the section.

    Pixel ``i`` spans ``[i, i + 1)``: its centre is at ``i + 0.5``. This is the convention of Xenium's alignment files
    and of SpatialData. Pixels are read on demand.

    Parameters
    ----------
    levels
        Arrays (c, y, x) from fine to coarse, all of the same area. 8 bit, 16 bit or float in 0..1; three or four
        channels (the fourth is ignored) or one (grey).
    px_to_um
        Affine (3, 3) from (x, y, 1) in pixels of ``levels[0]`` to (x, y, 1) in um. It may mirror, rotate and shear.
    path
        File that the image comes from, if any.

    Raises
    ------
    StsrError
        If the affine cannot be inverted, or the arrays are not an image.
    """

    def __init__(self, levels: Sequence[Pixels], px_to_um: np.ndarray, path: Path | None = None):
        if not levels or any(len(level.shape) != 3 for level in levels):
            raise StsrError("an image needs arrays with axes cyx; check the image file")
        self.px_to_um = np.asarray(px_to_um, dtype=np.float64)
        determinant = np.linalg.det(self.px_to_um[:2, :2]) if self.px_to_um.shape == (3, 3) else 0.0
        if not np.isfinite(self.px_to_um).all() or abs(determinant) < 1e-12:
            raise StsrError("the alignment of the image cannot be inverted; check the alignment file")
        self.levels = list(levels)
        self.path = path
        self.height, self.width = levels[0].shape[1:]
        self._levels = [self._level(array) for array in levels]
        self._white = _white(levels[-1])

    @property
    def um_per_px(self) -> float:
        """Side of a square with the area of a pixel of the finest level, um."""
        return um_per_px_of(self.px_to_um)

    @property
    def bounds_um(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the image's corners, um."""
        w, h = self.width, self.height
        corners = self.px_to_um[:2] @ np.array([[0, w, 0, w], [0, 0, h, h], [1, 1, 1, 1.0]])  # (2, 4)
        (x0, y0), (x1, y1) = corners.min(1), corners.max(1)
        return float(x0), float(y0), float(x1), float(y1)

    def resolves(self, um_per_px: float) -> bool:
        """Whether the pixels are about as small as ``um_per_px`` or smaller."""
        return self.um_per_px <= _COARSER * um_per_px

    def moved(self, px_to_um: np.ndarray) -> Image:
        """The same pixels under another affine (3, 3) from pixels to um."""
        return Image(self.levels, px_to_um, self.path)

    def overview(self, um_per_px: float) -> Image:
        """A small copy in memory, for checks that sample the image many times."""
        own = self.um_per_px
        size = max(um_per_px, own)
        shape = max(1, round(self.height * own / size)), max(1, round(self.width * own / size))
        small = self.moved(scaling(own)).read(Grid(0.0, 0.0, size, *shape))
        return Image([small], self.px_to_um @ scaling(size / own))

    def covered(self, grid: Grid) -> np.ndarray:
        """Bins whose centre lies inside the image: (height, width) bool."""
        x, y = grid.centres_um()
        return self.contains(x[None, :], y[:, None])

    def contains(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Whether points, um, lie inside the image; x and y broadcast."""
        (a, b, c), (d, e, f) = np.linalg.inv(self.px_to_um)[:2]
        u = a * np.asarray(x_um) + b * np.asarray(y_um) + c
        v = d * np.asarray(x_um) + e * np.asarray(y_um) + f
        return (u >= -_SLACK) & (u <= self.width + _SLACK) & (v >= -_SLACK) & (v <= self.height + _SLACK)

    def read(self, grid: Grid) -> np.ndarray:
        """Resample the image on a grid.

        Where a bin is larger than a pixel, pixels are averaged over its area; where it is smaller, they are
        interpolated linearly. Only the needed window of the best level is read, block by block.

        Parameters
        ----------
        grid
            ``grid.bin_um`` is the um per pixel of the result. Bins outside the image are 255, the white of the slide.

        Returns
        -------
        rgb
            (3, height, width) uint8.
        """
        rgb = np.full((3, *grid.shape), 255, dtype=np.uint8)
        level = self._level_for(grid.bin_um)
        for rows, columns in _blocks(grid, level):
            part = grid.window(
                rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
            )
            inside = self._covers(part) or self.covered(part)
            if inside is True:
                rgb[:, rows, columns] = self._sample(level, part)
            elif inside.any():
                np.copyto(rgb[:, rows, columns], self._sample(level, part), where=inside)
        return rgb

    def _covers(self, grid: Grid) -> bool:
        """Whether all bin centres lie inside the image; those at the corners decide."""
        x, y = grid.centres_um()
        return bool(self.contains(x[[0, 0, -1, -1]], y[[0, -1, 0, -1]]).all())

    def _level(self, array: Pixels) -> _Level:
        height, width = array.shape[1:]
        scale = np.diag([self.width / width, self.height / height, 1.0])
        to_um = self.px_to_um @ scale
        return _Level(array, height, width, np.linalg.inv(to_um), um_per_px_of(to_um))

    def _level_for(self, bin_um: float) -> _Level:
        fine_enough = [level for level in self._levels if level.um_per_px <= bin_um * (1 + 1e-3)]
        return fine_enough[-1] if fine_enough else self._levels[0]

    def _sample(self, level: _Level, grid: Grid) -> np.ndarray:
        """Values (3, height, width) uint8 at the bin centres; beyond the image its edge is repeated."""
        x, y = grid.centres_um()
        (a, b, c), (d, e, f) = level.um_to_px[:2]
        corners = np.stack(np.meshgrid(x[[0, -1]], y[[0, -1]])).reshape(2, 4)
        u, v = a * corners[0] + b * corners[1] + c, d * corners[0] + e * corners[1] + f  # px
        ratio = grid.bin_um / level.um_per_px  # pixels per bin, along a side
        block, whole = _block_side(ratio, level.um_to_px)
        margin = _MARGIN * block
        # If a bin is a block, the first bins' centres lie in the middle of one; else blocks count from the corner.
        top, left = (
            int(np.floor(at.min() - block / 2 + 0.5 + _SLACK)) - margin
            if whole
            else (int(np.floor(at.min())) // block) * block - margin
            for at in (v, u)
        )
        height, width = int(np.ceil(v.max())) + margin - top, int(np.ceil(u.max())) + margin - left
        pixels = self._pixels(level, top, left, -(-height // block) * block, -(-width // block) * block)
        planes = _smooth(_average(pixels, block), ratio / block)
        to_plane = np.array([[a, b, c - left], [d, e, f - top]]) / block - [[0, 0, 0.5], [0, 0, 0.5]]
        return _interpolated(planes, to_plane, x, y)

    def _pixels(self, level: _Level, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window (3, height, width) in 0..255; beyond the image its edge is repeated."""
        rows = np.clip((top, top + height), 0, level.height)
        columns = np.clip((left, left + width), 0, level.width)
        window = np.asarray(level.array[:, slice(*rows), slice(*columns)])
        window = window[:3] if window.shape[0] >= 3 else np.repeat(window[:1], 3, axis=0)  # (3, y, x)
        if self._white != 255:
            window = window.astype(np.float32) * (255 / self._white)
        around_y = (rows[0] - top, top + height - rows[1])
        around_x = (columns[0] - left, left + width - columns[1])
        return np.pad(window, ((0, 0), around_y, around_x), mode="edge")


def um_per_px_of(px_to_um: np.ndarray) -> float:
    """Side of a pixel, um: the root of its area under the affine."""
    return float(np.sqrt(abs(np.linalg.det(px_to_um[:2, :2]))))


def scaling(um_per_px: float) -> np.ndarray:
    """Affine (3, 3) of an image whose corner is the origin."""
    return np.diag([um_per_px, um_per_px, 1.0])


def _white(array: Pixels) -> float:
    """Value of white: 255, 65535, or 1 for floats within 0..1."""
    kind = np.dtype(array.dtype)
    if kind == np.uint8 or kind == np.bool_:
        return 255.0 if kind == np.uint8 else 1.0
    if kind == np.uint16:
        return 65535.0
    coarse = np.asarray(array[tuple(slice(None, None, max(1, size // 256)) for size in array.shape)])
    return 1.0 if kind.kind == "f" and coarse.size and float(np.nanmax(coarse)) <= 1.0 else 255.0


def _average(pixels: np.ndarray, block: int) -> np.ndarray:
    """Means of block x block pixels: (3, y, x) -> (3, y / block, x / block) float32; single pixels as they are."""
    if block == 1:
        return pixels
    wide = np.uint32 if pixels.dtype.kind == "u" else np.float32
    rows = np.zeros((pixels.shape[0], pixels.shape[1] // block, pixels.shape[2]), wide)
    # Sums of strided views are several times faster than a mean over two short axes.
    for offset in range(block):
        rows += pixels[:, offset::block]
    total = np.zeros((*rows.shape[:2], rows.shape[2] // block), wide)
    for offset in range(block):
        total += rows[:, :, offset::block]
    return total.astype(np.float32) / block**2


def _block_side(ratio: float, um_to_px: np.ndarray) -> tuple[int, bool]:
    """Side, in pixels, of the blocks to average before sampling at ``ratio`` pixels per bin, and whether it is a bin.

    Blocks of a whole bin are exact where bins are whole numbers of pixels along the image's own axes. Otherwise blocks
    are a third of a bin, and `_smooth`, which handles fractions of pixels, does the rest.
    """
    direction = np.abs(um_to_px[:2, :2]) / np.abs(um_to_px[:2, :2]).max()
    along_axes = max(direction[0, 1], direction[1, 0]) < 1e-4 or max(direction[0, 0], direction[1, 1]) < 1e-4
    if along_axes and abs(ratio - round(ratio)) < 1e-3:
        return max(1, round(ratio)), True
    return max(1, int(ratio / 3)), False


def _smooth(pixels: np.ndarray, ratio: float) -> np.ndarray:
    """Average over a square of ``ratio`` (below 5) pixels around each pixel; linear ramps stay unchanged."""
    if ratio <= 1 + 1e-3:
        return pixels
    from scipy.ndimage import correlate1d

    side = (ratio - 1) / 2  # pixels of the square on either side
    steps = np.arange(1, int(np.ceil(side)) + 1)
    arm = np.minimum(1.0, side - (steps - 1))  # the last pixel lies in it in part
    weights = np.concatenate([arm[::-1], [1.0], arm]) / ratio
    return correlate1d(correlate1d(pixels.astype(np.float32), weights, axis=1), weights, axis=2)


def _interpolated(planes: np.ndarray, to_plane: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate planes (3, rows, columns) linearly.

    Parameters
    ----------
    to_plane
        Affine (2, 3) from (x, y, 1) to column and row.
    x, y
        Coordinates (width,) and (height,) of the result.

    Returns
    -------
    values
        (3, height, width) uint8.
    """
    (a, b, c), (d, e, f) = to_plane
    wide, tall = np.ptp(x), np.ptp(y)
    if max(abs(a) * wide, abs(e) * tall) < _STRAIGHT:  # rows and columns change places
        planes, (a, b, c), (d, e, f) = planes.swapaxes(1, 2), (d, e, f), (a, b, c)
    straight = max(abs(b) * tall, abs(d) * wide) < _STRAIGHT
    if straight:
        planes = _along(planes, a * x + b * y.mean() + c, 2)  # (3, rows, width)
        down = e * y + d * x.mean() + f
    else:
        flat = np.ascontiguousarray(planes, np.float32).reshape(len(planes), -1)
    out = np.empty((len(planes), len(y), len(x)), np.uint8)
    step = max(1, _AT_ONCE // len(x))
    for start in range(0, len(y), step):
        rows = slice(start, start + step)
        if straight:
            out[:, rows] = _rounded(_along(planes, down[rows], 1))
        else:
            out[:, rows] = _rounded(_bilinear(flat, planes.shape[1:], to_plane, x, y[rows]))
    return out


def _along(planes: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Interpolate planes linearly at positions ``at`` (n,) along one axis."""
    first = np.floor(at + _STRAIGHT).astype(np.int64)
    part = (at - first).astype(np.float32)
    last = planes.shape[axis] - 1
    near = _taken(planes, first.clip(0, last), axis)
    if np.abs(part).max() <= 2 * _STRAIGHT:  # on the pixels
        return near
    shape = [1, 1, 1]
    shape[axis] = len(at)
    near = near.astype(np.float32)
    values = _taken(planes, (first + 1).clip(0, last), axis) - near
    values *= part.reshape(shape)
    values += near
    return values


def _taken(planes: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """Rows or columns of planes; a view where they follow each other."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if abs(step) == 1 and (np.diff(index) == step).all():
        stop = int(index[-1]) + step
        window: list[slice] = [slice(None)] * planes.ndim
        window[axis] = slice(int(index[0]), None if stop < 0 else stop, step)
        return planes[tuple(window)]
    return planes.take(index, axis)


def _bilinear(
    flat: np.ndarray, shape: tuple[int, ...], to_plane: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Values (3, y, x) float32 of planes (3, rows * columns) of a shape (rows, columns)."""
    (a, b, c), (d, e, f) = to_plane
    height, width = shape
    column = (a * x[None, :] + b * y[:, None] + c).clip(0, width - 1 - _STRAIGHT)  # (y, x)
    row = (d * x[None, :] + e * y[:, None] + f).clip(0, height - 1 - _STRAIGHT)
    left, top = column.astype(np.int64), row.astype(np.int64)
    right, below = (column - left).astype(np.float32), (row - top).astype(np.float32)
    first = top * width + left
    both = right * below
    corners = ((0, 1 - right - below + both), (1, right - both), (width, below - both), (width + 1, both))
    values = np.zeros((len(flat), *first.shape), np.float32)
    for offset, weight in corners:
        at = first + offset
        for value, plane in zip(values, flat, strict=True):
            value += plane.take(at) * weight
    return values


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values in 0..255 to the nearest whole number, uint8."""
    if values.dtype == np.uint8:
        return values
    return (values + np.float32(0.5)).clip(0, 255).astype(np.uint8)


def _blocks(grid: Grid, level: _Level) -> Iterator[tuple[slice, slice]]:
    """Squares of the grid whose source pixels fit in memory, whatever the rotation of the image."""
    ratio = max(grid.bin_um / level.um_per_px, 1e-3)
    side = int(np.sqrt(_BLOCK_BYTES / 6) / ratio)  # 3 channels, and twice the area when rotated by 45 degrees
    side = int(np.clip(side, 16, 2048))
    for row in range(0, grid.height, side):
        for column in range(0, grid.width, side):
            yield slice(row, min(row + side, grid.height)), slice(column, min(column + side, grid.width))
