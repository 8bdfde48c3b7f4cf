"""Nuclei on the H&E: hematoxylin by colour deconvolution, threshold, watershed; no learned weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.geometry.outlines import traced
from stsr.histology.image import Image
from stsr.histology.tissue import darkness
from stsr.verbs.singlecell.segmentation import Segmentation

COARSEST_UM_PER_PX = 2.5
"""Where a nucleus is three pixels wide; coarser images are refused."""
DOUBTFUL_UM_PER_PX = 1.0
"""Coarser images lose many nuclei; see docs/singlecell.md."""

_FINEST_UM_PER_PX = (
    0.5  # finer images are averaged to this: outlines hardly change, time falls with the square
)
_TILE_UM = 500.0
_MARGIN_UM = 40.0  # beyond a tile, so that its nuclei are seen whole
_THRESHOLD_TILES = 25  # that one threshold for the whole section is taken from
_GLASS = 0.05  # optical density: paler is no tissue, and would make tissue and glass Otsu's two classes
_SMOOTH_UM = 1.0
_SURROUNDINGS_UM = 25.0  # a nucleus is darker than this around it, however thick the section is there
_SEED_DISTANCE_UM = 2.5
_LEAST_UM2 = 12.0  # a disc of 4 um: smaller than any nucleus
_WIDEST_EXPANSION_UM = 20.0


def find_nuclei(
    image: Image,
    bounds_um: tuple[float, float, float, float],
    expand_um: float,
    progress: Callable[[float, float, str], None],
) -> Segmentation:
    """Cells as nuclei grown by ``expand_um``, but not into each other.

    Hematoxylin after Ruifrok and Johnston (2001), with the stain vectors of `skimage.color.rgb2hed`; nuclei have
    more of it than Otsu's threshold of the section and are darker than their surroundings; touching ones are parted
    by a watershed on the distance to their rim.

    Parameters
    ----------
    image
        The H&E.
    bounds_um
        (x0, y0, x1, y1), where to look.
    expand_um
        How far a cell reaches beyond its nucleus.
    progress
        Called with (done, total, label).

    Raises
    ------
    UsageError
        If ``expand_um`` is not within 0..20.
    StsrError
        If the image is too coarse or no nucleus is found.
    """
    if not 0 <= expand_um <= _WIDEST_EXPANSION_UM:
        raise UsageError(f"--expand-um is a distance of 0 to {_WIDEST_EXPANSION_UM:g} um, not {expand_um:g}")
    if image.um_per_px > COARSEST_UM_PER_PX * (1 + 1e-3):
        raise StsrError(
            f"the H&E has pixels of {image.um_per_px:.3g} um and nuclei need {COARSEST_UM_PER_PX:g} um or finer; "
            f"prepare the section with a finer image, or import cells with --segmentation FILE"
        )
    px = max(image.um_per_px, _FINEST_UM_PER_PX)
    x0, y0, x1, y1 = bounds_um
    whole = Grid(x0, y0, px, max(1, round((y1 - y0) / px)), max(1, round((x1 - x0) / px)))
    tiles = _tiles(whole)
    threshold = _threshold(image, whole, tiles)
    found = []
    for number, tile in enumerate(tiles):
        found.append(_in_tile(image, whole, *tile, threshold, expand_um))
        progress(number + 1, len(tiles), "finding nuclei")
    outlines = np.concatenate(found)
    if not len(outlines):
        raise StsrError("no nucleus was found on the H&E; import cells with --segmentation FILE")
    names = np.array([f"nucleus-{number}" for number in range(1, len(outlines) + 1)])
    return Segmentation(names, outlines, f"nuclei of the H&E, grown by {expand_um:g} um")


def _tiles(whole: Grid) -> list[tuple[slice, slice]]:
    side = round(_TILE_UM / whole.bin_um)
    return [
        (slice(row, min(row + side, whole.height)), slice(column, min(column + side, whole.width)))
        for row in range(0, whole.height, side)
        for column in range(0, whole.width, side)
    ]


def _hematoxylin(rgb: np.ndarray, px_um: float) -> np.ndarray:
    """Smoothed stain (h, w) float32 of an image (3, h, w)."""
    from skimage.color import rgb2hed

    return _smooth(rgb2hed(np.moveaxis(rgb, 0, -1))[..., 0].astype(np.float32), px_um)


def _smooth(values: np.ndarray, px_um: float, by_um: float = _SMOOTH_UM) -> np.ndarray:
    return ndimage.gaussian_filter(values, by_um / px_um)


def _threshold(image: Image, whole: Grid, tiles: list[tuple[slice, slice]]) -> float:
    """One for the section, from the stained pixels of tiles spread over it."""
    from skimage.filters import threshold_otsu

    stains = []
    for rows, columns in tiles[:: max(1, len(tiles) // _THRESHOLD_TILES)]:
        rgb = image.read(_window(whole, rows, columns, 0))
        stains.append(_hematoxylin(rgb, whole.bin_um)[darkness(rgb) > _GLASS])
    stained = np.concatenate(stains)
    return float(threshold_otsu(stained)) if len(stained) else np.inf


def _window(whole: Grid, rows: slice, columns: slice, margin: int) -> Grid:
    height, width = rows.stop - rows.start + 2 * margin, columns.stop - columns.start + 2 * margin
    return whole.window(rows.start - margin, columns.start - margin, height, width)


def _in_tile(image: Image, whole: Grid, rows: slice, columns: slice, threshold: float, expand_um: float):
    """Outlines of the cells whose nucleus has its middle in the tile."""
    from skimage.segmentation import expand_labels

    margin = round(_MARGIN_UM / whole.bin_um)
    grid = _window(whole, rows, columns, margin)
    nuclei = _parted(image.read(grid), threshold, grid.bin_um)
    numbers = np.arange(1, nuclei.max() + 1)
    middle = np.array(ndimage.center_of_mass(nuclei > 0, nuclei, numbers)).reshape(-1, 2) + 0.5
    last = margin + np.array([rows.stop - rows.start, columns.stop - columns.start])
    mine = ((middle >= margin) & (middle < last)).all(1)
    cells = expand_labels(nuclei, expand_um / grid.bin_um)
    kept = np.concatenate(
        [[0], np.where(mine, numbers, 0)]
    )  # only now: those of other tiles hold their ground
    return traced(kept[cells], grid.bin_to_um)[1]


def _parted(rgb: np.ndarray, threshold: float, px_um: float) -> np.ndarray:
    """Labels (h, w) of nuclei in an image (3, h, w): 1, 2, ... without gaps."""
    from skimage.feature import peak_local_max
    from skimage.morphology import remove_small_holes, remove_small_objects
    from skimage.segmentation import relabel_sequential, watershed

    stain, dark = _hematoxylin(rgb, px_um), _smooth(darkness(rgb), px_um)
    found = stain > threshold
    for values in (stain, dark):  # the second: grey glass takes no colour, and is not blue
        found &= values > _smooth(values, px_um, _SURROUNDINGS_UM)
    least = round(_LEAST_UM2 / px_um**2)
    found = remove_small_holes(remove_small_objects(found, max_size=least - 1), max_size=least)
    depth = _smooth(ndimage.distance_transform_edt(found), px_um)
    distance = max(1, round(_SEED_DISTANCE_UM / px_um))
    peaks = peak_local_max(depth, min_distance=distance, labels=found.astype(int), exclude_border=False)
    seeds = np.zeros(found.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    parts = remove_small_objects(watershed(-depth, seeds, mask=found), max_size=least - 1)
    return relabel_sequential(parts)[0]
