"""Masks of bins: tissue, and the part of a section where a map may be believed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from stsr.geometry.grid import Grid, add_up
from stsr.geometry.measurement import nearest_spot
from stsr.histology.image import Image

SUPPORT_UM = 10.0
"""Bin size at which the support is computed; that of coarser bins is derived from it."""

_SMOOTH_UM = 20.0  # a cell and its neighbours: gaps between cells are tissue, gaps between pieces are not
_PART_OF_TYPICAL = 0.05  # fraction of the typical density in tissue; background has a tenth of this
_SPREAD = 1.645  # sigmas that a straight edge moves outward at 5 % of the density inside
_HOLE_UM2 = 100.0**2  # smaller holes are filled: a vessel's lumen still lies in tissue
_SPECK_UM2 = 50.0**2  # smaller pieces are dirt


def from_density(counts: np.ndarray, grid: Grid, apart_um: float = 0.0) -> np.ndarray:
    """Tissue mask from the density of transcripts.

    Parameters
    ----------
    counts
        Transcripts of all genes per bin (height, width).
    grid
        The bins.
    apart_um
        Distance between cells, if transcripts have only the position of their cell.

    Returns
    -------
    mask
        (height, width) bool.
    """
    sigma = max(_SMOOTH_UM, apart_um) / grid.bin_um  # bins
    smooth = ndimage.gaussian_filter(counts.astype(np.float32), sigma, mode="constant")
    found = np.flatnonzero(counts)
    if not len(found):
        return np.zeros(grid.shape, bool)
    # The count-weighted median is the density around a transcript: empty glass does not lower it.
    density, weight = smooth.ravel()[found], counts.ravel()[found]
    order = np.argsort(density)
    weight = np.cumsum(weight[order])
    typical = density[order][np.searchsorted(weight, weight[-1] / 2)]
    dense = smooth > _PART_OF_TYPICAL * typical
    return _tidy(_shrink(dense, _SPREAD * sigma), grid.bin_um)


def from_spots(grid: Grid, centres_um: np.ndarray) -> np.ndarray:
    """Tissue mask from the centres (n, 2) of spots, um: bins near a spot, (height, width) bool."""
    return nearest_spot(grid, centres_um) >= 0


def from_image(rgb: np.ndarray, bin_um: float) -> np.ndarray:
    """Tissue mask from the staining of an image.

    Parameters
    ----------
    rgb
        (3, height, width) uint8, white glass.
    bin_um
        Size of its pixels, um.

    Returns
    -------
    mask
        (height, width) bool; all False for an image without contrast.
    """
    from skimage.filters import threshold_otsu

    stain = darkness(rgb)
    stain = ndimage.gaussian_filter(stain, _SMOOTH_UM / 2 / bin_um)
    if np.ptp(stain) < 0.05:  # Otsu's threshold needs two classes; a blank slide has one
        return np.zeros(stain.shape, bool)
    # Half of Otsu's value: pale stroma is tissue too.
    return _tidy(stain > 0.5 * threshold_otsu(stain), bin_um)


def supported(
    grid: Grid,
    image: Image | None,
    tissue: Callable[[Grid], np.ndarray] | None,
    centres_um: np.ndarray | None,
) -> np.ndarray:
    """Bins where a map may be believed.

    A bin counts if the H&E covers it, it lies in tissue, and a spot is near. Bins that are multiples of `SUPPORT_UM`
    count if at least half of their area does.

    Parameters
    ----------
    grid
        The bins.
    image
        The H&E.
    tissue
        Gives the tissue mask (height, width) on a grid.
    centres_um
        Spot centres (n, 2) as x, y, um. Image, tissue and spots are None if the section has none; that condition is
        then skipped.

    Returns
    -------
    mask
        (height, width) bool.
    """
    factor = round(grid.bin_um / SUPPORT_UM)
    if factor > 1 and abs(factor * SUPPORT_UM - grid.bin_um) < 1e-6:
        fine = supported(grid.at(SUPPORT_UM), image, tissue, centres_um)
        return 2 * add_up(fine.astype(np.int64), factor) >= factor**2
    mask = np.ones(grid.shape, bool)
    if image is not None:
        mask &= image.covered(grid)
    if tissue is not None:
        mask &= tissue(grid)
    if centres_um is not None:
        mask &= from_spots(grid, centres_um)
    return mask


def darkness(rgb: np.ndarray) -> np.ndarray:
    """Optical density (h, w) float32 of an image (3, h, w) uint8, mean over colours; 0 for white."""
    return -np.log10((rgb.astype(np.float32) + 1) / 256).mean(0)


def _shrink(mask: np.ndarray, by: float) -> np.ndarray:
    """Remove the rim of ``by`` bins that smoothing added, but not where the mask meets the border of the grid."""
    around = int(np.ceil(by)) + 1
    padded = np.pad(mask, around, mode="edge")
    return (ndimage.distance_transform_edt(padded) > by)[around:-around, around:-around]


def _tidy(mask: np.ndarray, bin_um: float) -> np.ndarray:
    from skimage.morphology import remove_small_holes, remove_small_objects

    mask = remove_small_holes(mask, max_size=int(_HOLE_UM2 / bin_um**2))
    return remove_small_objects(mask, max_size=int(_SPECK_UM2 / bin_um**2))
