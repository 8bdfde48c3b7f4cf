"""H&E files: opened lazily, placed by their alignment, and checked against what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import reading
from stsr.geometry.grid import Grid

TIFF_ENDINGS = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".qptiff", ".scn")
_UM_PER_PX = (0.05, 60.0)  # from a 100x objective to an overview on which a spot is two pixels
_UNEQUAL_SIDES = 1.25  # of a pixel: real scanners stay below 1.01, registrations below 1.1
_UNIT_UM = {"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_CHUNK = 1024
_CONTRADICTION = 1.2  # between the file's own pixel size and the one that its alignment implies


@dataclass(frozen=True)
class Picture:
    """An H&E image and its place.

    Parameters
    ----------
    levels
        Lazy arrays (3, y, x) of uint8 (dask), finest first.
    px_to_um
        Affine (3, 3) from (column, row, 1) of the finest level to (x, y, 1) in um; pixel i spans [i, i + 1).
    path
        Where it was read.
    """

    levels: list[Any]
    px_to_um: np.ndarray
    path: Path | None = None

    @property
    def um_per_px(self) -> float:
        """Side of a pixel of the finest level, um."""
        return um_per_px_of(self.px_to_um)

    @property
    def bounds_um(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of its corners, um."""
        return self._image().bounds_um

    def overview(self, um_per_px: float) -> Picture:
        """A small copy in memory, so that looking at it again and again costs nothing."""
        own = self.um_per_px
        _, height, width = self.levels[0].shape
        size = max(um_per_px, own)
        shape = max(1, round(height * own / size)), max(1, round(width * own / size))
        grid = Grid(0.0, 0.0, size, *shape)
        small = Picture(self.levels, scaling(own)).on(grid)
        return Picture([small], self.px_to_um @ scaling(size / own))

    def on(self, grid: Grid) -> np.ndarray:
        """The image drawn on a grid: (3, height, width) uint8."""
        return self._image().read(grid)

    def covered(self, grid: Grid) -> np.ndarray:
        """Which bins the image covers: (height, width) bool."""
        return np.asarray(self._image().covered(grid)) > 0.5

    def _image(self):
        from stsr.histology.image import Image

        return Image(self.levels, self.px_to_um)


def um_per_px_of(px_to_um: np.ndarray) -> float:
    """Side of a pixel, um: the root of the area that the affine gives it."""
    return float(np.sqrt(abs(np.linalg.det(px_to_um[:2, :2]))))


def scaling(um_per_px: float) -> np.ndarray:
    """Affine (3, 3) of an image whose corner is the origin."""
    return np.diag([um_per_px, um_per_px, 1.0])


def read_alignment(path: Path) -> np.ndarray:
    """A 3 x 3 (or 2 x 3) affine from a csv.

    Raises
    ------
    StsrError
        If the file does not hold one that can be inverted.
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
            f"{path} is not an affine alignment; export 3 rows of 3 numbers, the last one being 0,0,1"
        )
    return matrix


def open_levels(path: Path) -> tuple[list[Any], float | None]:
    """Open an RGB image without reading its pixels, where the format allows that.

    Returns
    -------
    levels, um_per_px
        Lazy arrays (3, y, x) uint8, finest first, and the pixel size that the file itself tells, or None.

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
    """Refuse a pixel size that no slide scanner has, or that contradicts the image's own.

    Raises
    ------
    StsrError
        Naming both sizes and what to do.
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
            f"{what} says {named_um:.4g} um per pixel but its alignment gives {size:.4g}; use the alignment made for "
            f"this image, or say the true size with --um-per-px"
        )


def _open_tiff(path: Path) -> tuple[list[Any], float | None]:
    import dask.array as da
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as tiff:
        series = max(tiff.series, key=lambda s: int(np.prod(s.shape)))  # beside it lie labels and thumbnails
        index = tiff.series.index(series)
        axes, count = series.axes, len(series.levels)
        um_per_px = _named_pixel(tiff)
        _check_not_cut(tiff, path)
    keep = [axis for axis in axes if axis in "YXSC"]
    levels = []
    for level in range(count):
        store = tifffile.imread(path, aszarr=True, series=index, level=level)
        array = da.from_array(zarr.open(store, mode="r"), chunks="auto")
        array = array[tuple(slice(None) if axis in keep else 0 for axis in axes)]
        order = [keep.index(axis) for axis in keep if axis not in "YX"] + [keep.index("Y"), keep.index("X")]
        levels.append(array.transpose(order))  # (c, y, x)
    return levels, um_per_px


def _check_not_cut(tiff, path: Path) -> None:
    """tifffile opens a file whose pixels are cut off; say so now rather than in the middle of writing."""
    size = path.stat().st_size
    for page in tiff.pages:
        ends = np.add(page.dataoffsets, page.databytecounts) if page.dataoffsets else [0]
        if np.max(ends) > size:
            raise OSError("its pixels end before they should")


def _named_pixel(tiff) -> float | None:
    """The pixel size in um that OME metadata tell; 1.0 exactly is what writers put who do not know."""
    if not tiff.ome_metadata:
        return None
    size = re.search(r'PhysicalSizeX="([^"]+)"', tiff.ome_metadata)
    unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', tiff.ome_metadata)
    factor = _UNIT_UM.get(unit[1] if unit else "µm")
    if not size or factor is None or float(size[1]) == 1.0:
        return None
    return float(size[1]) * factor


def _open_plain(path: Path):
    import dask.array as da
    from PIL import Image as PillowImage

    PillowImage.MAX_IMAGE_PIXELS = None  # scans of slides are larger than Pillow's limit against attacks
    with PillowImage.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return da.from_array(pixels, chunks=(_CHUNK, _CHUNK, 3)).transpose(2, 0, 1)


def as_level(pixels, path: Path, axes: str = "yxc"):
    """One level (3, y, x) of uint8, lazy, of an array of pixels of 8 or 16 bits or from 0 to 1.

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
