"""Segment nuclei on the H&E by colour deconvolution, a threshold and a watershed; no learned weights."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.geometry.outlines import traced
from stsr.histology.image import Image
from stsr.histology.tissue import darkness
from stsr.progress import Progress
from stsr.store.parts import Cells

COARSEST_UM_PER_PX = 2.5
"""At this pixel size a nucleus is three pixels wide; coarser images are refused."""
DOUBTFUL_UM_PER_PX = 1.0
"""On coarser images many nuclei are missed or merged; see docs/singlecell.md."""

_FINEST_UM_PER_PX = 0.5  # finer images are averaged to this: outlines hardly change, and it is much faster
_TILE_UM = 500.0
_MARGIN_UM = 40.0  # around a tile, so that nuclei at its edge are complete
_THRESHOLD_TILES = 25  # sampled for the threshold of the whole section
_GLASS = 0.05  # optical density: paler pixels are background, which Otsu's method would take as a class
_SMOOTH_UM = 1.0
_SURROUNDINGS_UM = 25.0  # sigma: a nucleus is darker than its surroundings, whatever the section's thickness
_SEED_DISTANCE_UM = 2.5
_MIN_NUCLEUS_UM2 = 12.0  # a disc of 4 um: smaller than any nucleus
_MAX_EXPANSION_UM = 20.0


def find_nuclei(
    image: Image, bounds_um: tuple[float, float, float, float], expand_um: float, progress: Progress
) -> Cells:
    """Segment nuclei and expand each by ``expand_um``, without overlap.

    The hematoxylin stain is separated by colour deconvolution (Ruifrok and Johnston 2001, with the stain vectors of
    `skimage.color.rgb2hed`). Nuclei are pixels above Otsu's threshold of the section that are also darker than their
    surroundings. Touching nuclei are split by a watershed on the distance to their boundary.

    Parameters
    ----------
    image
        The H&E.
    bounds_um
        (x0, y0, x1, y1) of the area to segment.
    expand_um
        How far a cell extends beyond its nucleus.
    progress
        Called with (done, total, label).

    Raises
    ------
    UsageError
        If ``expand_um`` is not within 0..20.
    StsrError
        If the image is too coarse or no nuclei are found.
    """
    if not 0 <= expand_um <= _MAX_EXPANSION_UM:
        raise UsageError(f"--expand-um must be 0 to {_MAX_EXPANSION_UM:g} um, not {expand_um:g}")
    if image.um_per_px > COARSEST_UM_PER_PX * (1 + 1e-3):
        raise StsrError(
            f"the H&E has pixels of {image.um_per_px:.3g} um, but nuclei need {COARSEST_UM_PER_PX:g} um or finer; "
            f"prepare the section with a finer image, or import cells with --segmentation FILE"
        )
    px = max(image.um_per_px, _FINEST_UM_PER_PX)
    whole = Grid.over(bounds_um, px)
    tiles = _tiles(whole)
    threshold = _threshold(image, whole, tiles)
    found = []
    for number, tile in enumerate(tiles):
        found.append(_in_tile(image, whole, *tile, threshold, expand_um))
        progress(number + 1, len(tiles), "segmenting nuclei")
    outlines = np.concatenate(found)
    if not len(outlines):
        raise StsrError("no nuclei were found on the H&E; import cells with --segmentation FILE")
    names = np.array([f"nucleus-{number}" for number in range(1, len(outlines) + 1)])
    return Cells.of_polygons(names, outlines, f"nuclei of the H&E, grown by {expand_um:g} um")


def _tiles(whole: Grid) -> list[tuple[slice, slice]]:
    side = round(_TILE_UM / whole.bin_um)
    return [
        (slice(row, min(row + side, whole.height)), slice(column, min(column + side, whole.width)))
        for row in range(0, whole.height, side)
        for column in range(0, whole.width, side)
    ]


def _hematoxylin(rgb: np.ndarray, px_um: float) -> np.ndarray:
    """Smoothed hematoxylin stain (h, w) float32 of an image (3, h, w)."""
    from skimage.color import rgb2hed

    return _smooth(rgb2hed(np.moveaxis(rgb, 0, -1))[..., 0].astype(np.float32), px_um)


def _smooth(values: np.ndarray, px_um: float, by_um: float = _SMOOTH_UM) -> np.ndarray:
    return ndimage.gaussian_filter(values, by_um / px_um)


def _threshold(image: Image, whole: Grid, tiles: list[tuple[slice, slice]]) -> float:
    """Otsu's threshold for the section, from the stained pixels of tiles spread over it."""
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


def _in_tile(
    image: Image, whole: Grid, rows: slice, columns: slice, threshold: float, expand_um: float
) -> np.ndarray:
    """Outlines of the cells whose nucleus has its centroid in the tile."""
    from skimage.segmentation import expand_labels

    margin = round(_MARGIN_UM / whole.bin_um)
    grid = _window(whole, rows, columns, margin)
    nuclei = _split_nuclei(image.read(grid), threshold, grid.bin_um)
    numbers = np.arange(1, nuclei.max() + 1)
    middle = np.array(ndimage.center_of_mass(nuclei > 0, nuclei, numbers)).reshape(-1, 2) + 0.5
    last = margin + np.array([rows.stop - rows.start, columns.stop - columns.start])
    mine = ((middle >= margin) & (middle < last)).all(1)
    cells = expand_labels(nuclei, expand_um / grid.bin_um)
    # Dropped only after the expansion: nuclei of other tiles keep their area.
    kept = np.concatenate([[0], np.where(mine, numbers, 0)])
    return traced(kept[cells], grid.bin_to_um)[1]


def _split_nuclei(rgb: np.ndarray, threshold: float, px_um: float) -> np.ndarray:
    """Labels (h, w) of nuclei in an image (3, h, w), numbered 1, 2, ... without gaps."""
    from skimage.feature import peak_local_max
    from skimage.morphology import remove_small_holes, remove_small_objects
    from skimage.segmentation import relabel_sequential, watershed

    stain, dark = _hematoxylin(rgb, px_um), _smooth(darkness(rgb), px_um)
    found = stain > threshold
    for values in (stain, dark):  # above the surroundings in both: either alone also marks grey background
        found &= values > _smooth(values, px_um, _SURROUNDINGS_UM)
    least = round(_MIN_NUCLEUS_UM2 / px_um**2)
    found = remove_small_holes(remove_small_objects(found, max_size=least - 1), max_size=least)
    depth = _smooth(ndimage.distance_transform_edt(found), px_um)
    distance = max(1, round(_SEED_DISTANCE_UM / px_um))
    peaks = peak_local_max(depth, min_distance=distance, labels=found.astype(int), exclude_border=False)
    seeds = np.zeros(found.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    parts = remove_small_objects(watershed(-depth, seeds, mask=found), max_size=least - 1)
    return relabel_sequential(parts)[0]
