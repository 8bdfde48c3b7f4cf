"""H&E files: lazy pixels, alignments, and checks of the pixel size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import reading
from stsr.histology.image import um_per_px_of

TIFF_ENDINGS = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".qptiff", ".scn")
_UM_PER_PX = (0.05, 60.0)  # from a 100x objective to an overview with spots of two pixels
_UNEQUAL_SIDES = 1.25  # ratio of the sides of a pixel: below 1.01 for scanners, below 1.1 for registrations
_UNIT_UM = {"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_CHUNK = 1024
_CONTRADICTION = 1.2  # ratio of the file's own pixel size and that of its alignment


def read_alignment(path: Path) -> np.ndarray:
    """Read a 3 x 3 (or 2 x 3) affine from a csv file.

    Raises
    ------
    StsrError
        If the file holds no affine, or one that cannot be inverted.
    """
    with reading(path):
        rows = [line for line in path.read_text().replace(";", ",").splitlines() if line.strip()]
    try:
        matrix = np.array([[float(part) for part in row.split(",") if part.strip()] for row in rows])
    except ValueError:
        matrix = np.zeros((0, 0))
    if matrix.shape == (2, 3):
        matrix = np.vstack([matrix, [0, 0, 1]])
    ok = matrix.shape == (3, 3) and np.isfinite(matrix).all() and np.allclose(matrix[2], [0, 0, 1], atol=1e-9)
    if not ok or abs(np.linalg.det(matrix)) < 1e-12:
        raise StsrError(
            f"{path} is not an affine alignment; it must hold 3 rows of 3 numbers, the last row being 0,0,1"
        )
    return matrix


def open_levels(path: Path) -> tuple[list[Any], float | None]:
    """Open an RGB image without reading its pixels, if the format allows that.

    Returns
    -------
    levels, um_per_px
        Lazy arrays (3, y, x) uint8, finest first, and the pixel size in the file's own metadata, or None. Pixels that
        turn out to be damaged raise StsrError when they are read.

    Raises
    ------
    StsrError
        If the file is damaged or is not an 8- or 16-bit RGB image.
    """
    with reading(path):
        if path.name.lower().endswith(TIFF_ENDINGS):
            raw, um_per_px = _open_tiff(path)
        else:
            raw, um_per_px = [_open_plain(path)], None
        return [as_level(level, path, "cyx") for level in raw], um_per_px


def check_pixel(px_to_um: np.ndarray, named_um: float | None, what: str) -> None:
    """Refuse a pixel size that no slide scanner has, or that contradicts the image's metadata.

    Parameters
    ----------
    px_to_um
        Affine (3, 3) from pixels to um.
    named_um
        Pixel size in the image's metadata, um, or None.
    what
        Name of the image, for the message.

    Raises
    ------
    StsrError
        If the pixel size is implausible, pixels are far from square, or the two sizes differ by more than 20 %.
    """
    size = um_per_px_of(px_to_um)
    if not _UM_PER_PX[0] <= size <= _UM_PER_PX[1]:
        raise StsrError(
            f"a pixel of {size:.3g} um is implausible for {what}; check the alignment and --um-per-px"
        )
    sides = np.linalg.svd(px_to_um[:2, :2], compute_uv=False)
    if sides[0] / sides[1] > _UNEQUAL_SIDES:
        raise StsrError(
            f"the alignment of {what} makes pixels of {sides[0]:.3g} x {sides[1]:.3g} um; check the alignment file"
        )
    if named_um and max(size / named_um, named_um / size) > _CONTRADICTION:
        raise StsrError(
            f"{what} gives {named_um:.4g} um per pixel but its alignment {size:.4g}; use the alignment made for "
            f"this image, or give the true size with --um-per-px"
        )


def _open_tiff(path: Path) -> tuple[list[Any], float | None]:
    import dask.array as da
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as tiff:
        series = max(tiff.series, key=lambda s: int(np.prod(s.shape)))  # the others are labels and thumbnails
        index = tiff.series.index(series)
        axes, count = series.axes, len(series.levels)
        um_per_px = _named_pixel(tiff)
        _check_not_cut(tiff, path)
    keep = [axis for axis in axes if axis in "YXSC"]
    levels = []
    for level in range(count):
        store = tifffile.imread(path, aszarr=True, series=index, level=level)
        pixels = _Guarded(zarr.open_array(store, mode="r"), path)
        array = da.from_array(pixels, chunks="auto", name=False)
        array = array[tuple(slice(None) if axis in keep else 0 for axis in axes)]
        order = [keep.index(axis) for axis in keep if axis not in "YX"] + [keep.index("Y"), keep.index("X")]
        levels.append(array.transpose(order))  # (c, y, x)
    return levels, um_per_px


class _Guarded:
    """A zarr array of a file's pixels; damage found while reading raises a `StsrError` that names the file."""

    def __init__(self, array: Any, path: Path):
        self._array, self._path = array, path
        self.shape, self.dtype, self.chunks, self.ndim = array.shape, array.dtype, array.chunks, array.ndim

    def __getitem__(self, window: Any) -> np.ndarray:
        with reading(self._path):
            return self._array[window]


def _check_not_cut(tiff: Any, path: Path) -> None:
    """Refuse a TIFF file that ends before its pixels do: tifffile would open it, and fail while pixels are read."""
    size = path.stat().st_size
    for page in tiff.pages:
        ends = np.add(page.dataoffsets, page.databytecounts) if page.dataoffsets else [0]
        if np.max(ends) > size:
            raise OSError("its pixels end before they should")


def _named_pixel(tiff: Any) -> float | None:
    """Pixel size in um from OME metadata; exactly 1.0 is a placeholder for an unknown size."""
    if not tiff.ome_metadata:
        return None
    size = re.search(r'PhysicalSizeX="([^"]+)"', tiff.ome_metadata)
    unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', tiff.ome_metadata)
    factor = _UNIT_UM.get(unit[1] if unit else "µm")
    if not size or factor is None or float(size[1]) == 1.0:
        return None
    return float(size[1]) * factor


def _open_plain(path: Path) -> Any:
    import dask.array as da
    from PIL import Image as PillowImage

    PillowImage.MAX_IMAGE_PIXELS = None  # slide scans exceed Pillow's limit against decompression bombs
    with PillowImage.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return da.from_array(pixels, chunks=(_CHUNK, _CHUNK, 3)).transpose(2, 0, 1)


def as_level(pixels: Any, path: Path, axes: str = "yxc") -> Any:
    """Convert an array of pixels to one level of an image: lazy, (3, y, x) uint8.

    Parameters
    ----------
    pixels
        numpy or dask array with three or four channels: 8 bit, 16 bit, or float in 0..1.
    path
        File, for the message.
    axes
        ``"yxc"`` or ``"cyx"``.

    Raises
    ------
    StsrError
        If it is not a colour image.
    """
    import dask.array as da

    level = pixels if hasattr(pixels, "dask") else da.from_array(np.asarray(pixels))
    if level.ndim == 3 and axes == "yxc":
        level = level.transpose(2, 0, 1)
    if level.ndim != 3 or level.shape[0] not in (3, 4):
        raise StsrError(f"{path} is not a colour image (shape {level.shape}); give the H&E, as RGB")
    level = level[:3]
    if level.dtype == np.uint16:
        level = (level // 257).astype(np.uint8)
    elif level.dtype.kind == "f":
        level = (da.clip(level, 0, 1) * 255).round().astype(np.uint8)
    elif level.dtype != np.uint8:
        raise StsrError(f"{path} has pixels of type {level.dtype}; save the H&E as 8-bit RGB")
    return level.rechunk((3, _CHUNK, _CHUNK))
