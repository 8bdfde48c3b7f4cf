"""Patch features of an H&E: arrays that other programs wrote, their place in um, and resampling on a grid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.files import reading
from stsr.geometry.grid import Grid
from stsr.histology.image import Image, Pixels, um_per_px_of

PIXELS_UM = (10.0, 20.0, 50.0, 100.0)
"""Pixel sizes of cached features: all nest in the low-resolution raster."""
_TOLERANCE = 1.05  # a spacing of 20.06 um still counts as 20
_PLACING = ("stride_px", "offset_px", "um_per_px")


def features_um_of(spacing_um: float) -> float:
    """Pixel size for patches at a distance of ``spacing_um``: the smallest of `PIXELS_UM` that is not finer."""
    return next((size for size in PIXELS_UM if size * _TOLERANCE >= spacing_um), PIXELS_UM[-1])


def resampled(values: np.ndarray, um_to_patch: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample patches on a grid; exact for values that change linearly.

    Interpolated linearly at the centre of each pixel, or, where pixels are larger than patches, averaged over points
    that are evenly spread over the pixel. Beyond the outer centres the edge is repeated.

    Parameters
    ----------
    values
        (y, x, c); patch i spans [i, i + 1).
    um_to_patch
        Affine (3, 3) from um to these coordinates (x, y).
    grid
        Where to resample.

    Returns
    -------
    ndarray
        (height, width, c) float32.
    """
    points = max(1, int(np.ceil(grid.bin_um * um_per_px_of(um_to_patch) - (_TOLERANCE - 1))))
    steps = ((np.arange(points) + 0.5) / points - 0.5) * grid.bin_um  # from the centre, um
    x, y = grid.centres_um()
    total = np.zeros((*grid.shape, values.shape[2]), np.float32)
    for dy in steps:
        for dx in steps:
            columns, rows = _transformed(um_to_patch, x[None, :] + dx, y[:, None] + dy)
            total += _interpolated(values, rows - 0.5, columns - 0.5)
    return total / points**2


def _transformed(affine: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (a, b, c), (d, e, f) = affine[:2]
    return a * x + b * y + c, d * x + e * y + f


def _interpolated(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Linear interpolation of (y, x, c) at fractional indices (h, w): (h, w, c) float32."""
    height, width = values.shape[:2]
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = (
        np.clip(np.floor(at).astype(np.int64), 0, max(size - 2, 0))
        for at, size in ((rows, height), (columns, width))
    )
    down, right = ((at - first)[..., None].astype(np.float32) for at, first in ((rows, top), (columns, left)))
    below, beside = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    upper = values[top, left] * (1 - right) + values[top, beside] * right
    lower = values[below, left] * (1 - right) + values[below, beside] * right
    return upper * (1 - down) + lower * down


@dataclass(frozen=True)
class PatchArray:
    """Features (y, x, c) of patches on a raster over an H&E, read window by window.

    Parameters
    ----------
    name
        Of the file, for messages.
    values
        (y, x, c), on disk.
    patch_to_um
        Affine (3, 3) from (x, y, 1) in patches, of which patch i spans [i, i + 1), to um.
    """

    name: str
    values: Pixels
    patch_to_um: np.ndarray

    @property
    def spacing_um(self) -> float:
        """Distance of neighbouring patches, um."""
        return um_per_px_of(self.patch_to_um)

    @property
    def channels(self) -> int:
        """Length of a vector."""
        return int(self.values.shape[2])

    def read(self, grid: Grid) -> np.ndarray:
        """Resample on a grid: (c, height, width) float32, 0 at pixels whose centre no patch covers.

        Raises
        ------
        StsrError
            If a value in this window is NaN or infinite.
        """
        um_to_patch = np.linalg.inv(self.patch_to_um)
        x, y = grid.centres_um()
        columns, rows = _transformed(um_to_patch, x[None, :], y[:, None])  # (h, w)
        height, width = self.values.shape[:2]
        covered = (rows >= 0) & (rows <= height) & (columns >= 0) & (columns <= width)
        if not covered.any():
            return np.zeros((self.channels, *grid.shape), np.float32)
        around = grid.bin_um / self.spacing_um + 2  # patches beyond a pixel's centre that may count
        (top, bottom), (left, right) = (
            np.clip((np.floor(at[covered].min() - around), np.ceil(at[covered].max() + around)), 0, size)
            for at, size in ((rows, height), (columns, width))
        )
        with reading(Path(self.name)):
            window = np.asarray(self.values[int(top) : int(bottom), int(left) : int(right)])
        window = window.astype(np.float32)
        if not np.isfinite(window).all():
            row, column, _ = np.argwhere(~np.isfinite(window))[0] + (int(top), int(left), 0)
            raise StsrError(
                f"{self.name} is NaN or infinite at patch (y, x) = ({row}, {column}); "
                f"write 0 where there are no features"
            )
        moved = np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]]) @ um_to_patch
        return np.where(covered[..., None], resampled(window, moved, grid), np.float32(0)).transpose(2, 0, 1)


def open_patches(path: Path, image: Image) -> PatchArray:
    """Open an array (y, x, channels) of features of an H&E, without reading it.

    It covers the image evenly, unless attributes of the zarr array, or a JSON file of the same stem beside the npy
    file, place it: ``stride_px`` and ``offset_px`` (centre of the first patch) in pixels of the finest level, or
    ``um_per_px``, the distance of patches in um; numbers or pairs (y, x).

    Raises
    ------
    StsrError
        If it is damaged, has another number of axes, or cannot belong to this image.
    UsageError
        If its attributes are not numbers.
    """
    values, attributes = _open_npy(path) if path.suffix == ".npy" else _open_zarr(path)
    shape = tuple(int(size) for size in values.shape)
    if len(shape) != 3 or 0 in shape or np.dtype(values.dtype).kind not in "fiu":
        raise StsrError(
            f"{path} has the shape {shape} and type {values.dtype}; write numbers with axes (y, x, channels)"
        )
    size = np.array([image.height, image.width], float)
    patches = np.array(shape[:2], float)
    stride, offset = _placing(attributes, image, path)
    if stride is None:
        _check_aspect(path, shape, image)
        stride = size / patches
    offset = stride / 2 if offset is None else offset
    first, last = offset - stride / 2, offset + (patches - 0.5) * stride  # px, outer edges
    if (first < -stride).any() or (last > size + stride).any():
        raise StsrError(
            f"{path} of {shape[0]} x {shape[1]} patches reaches beyond the H&E of {image.height} x {image.width} "
            f"px; correct its stride_px and offset_px"
        )
    patch_to_px = np.array([[stride[1], 0, first[1]], [0, stride[0], first[0]], [0, 0, 1]])
    return PatchArray(path.name, values, image.px_to_um @ patch_to_px)


def placing_file(path: Path) -> Path:
    """The JSON file that places an npy array."""
    return path.with_suffix(".json")


def _open_npy(path: Path) -> tuple[Any, Mapping[str, Any]]:
    with reading(path):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    beside = placing_file(path)
    if not beside.is_file():
        return values, {}
    with reading(beside):
        attributes = json.loads(beside.read_text())
    if not isinstance(attributes, dict):
        raise UsageError(f'{beside} must place the array, such as {{"stride_px": 224, "offset_px": 112}}')
    return values, attributes


def _open_zarr(path: Path) -> tuple[Any, Mapping[str, Any]]:
    import zarr

    with reading(path):
        found = zarr.open(path, mode="r")
    if not isinstance(found, zarr.Array):
        raise UsageError(f"{path} is a zarr group; name the array in it, such as {path}/features")
    return found, dict(found.attrs)


def _placing(
    attributes: Mapping[str, Any], image: Image, path: Path
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Stride and offset (y, x) in pixels, or None."""
    given: dict[str, np.ndarray] = {}
    for key in _PLACING:
        if attributes.get(key) is not None:
            try:
                given[key] = np.broadcast_to(np.asarray(attributes[key], float), (2,))
            except (TypeError, ValueError):
                given[key] = np.full(2, np.nan)
            if not np.isfinite(given[key]).all() or (key != "offset_px" and (given[key] <= 0).any()):
                raise UsageError(
                    f"{key} of {path} must be a number or a pair (y, x), not {attributes[key]!r}; correct it"
                )
    stride = given.get("stride_px")
    if stride is None and "um_per_px" in given:
        stride = given["um_per_px"] / image.um_per_px
    if stride is None and "offset_px" in given:
        raise UsageError(f"{path} has an offset_px without stride_px; give both")
    return stride, given.get("offset_px")


def _check_aspect(path: Path, shape: tuple[int, ...], image: Image) -> None:
    """Refuse a number of patches that no stride gives on this image, give or take a patch."""
    strides = [
        (size / (patches + 1), size / max(patches - 1, 1e-9))
        for size, patches in ((image.height, shape[0]), (image.width, shape[1]))
    ]
    if max(low for low, _ in strides) > min(high for _, high in strides):
        raise StsrError(
            f"{path} has {shape[0]} x {shape[1]} patches, which cannot cover an H&E of {image.height} x "
            f"{image.width} px evenly; write axes (y, x, channels), or give stride_px and offset_px"
        )
