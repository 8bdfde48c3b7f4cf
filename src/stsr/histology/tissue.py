"""Where there is tissue: a mask of bins."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement

_SMOOTH_UM = 20.0  # a cell and its neighbours: gaps between cells are tissue, gaps between pieces are not
_PART_OF_TYPICAL = 0.05  # of the typical density where anything was found; background has ten times less
_SPREAD = 1.645  # sigmas that a straight edge moves outward at 5 % of the density inside
_HOLE_UM2 = 100.0**2  # smaller holes are filled: a vessel's lumen still lies in tissue
_SPECK_UM2 = 50.0**2  # smaller pieces are dirt


def from_density(counts: np.ndarray, grid: Grid, apart_um: float = 0.0) -> np.ndarray:
    """Tissue where transcripts lie densely.

    Parameters
    ----------
    counts
        Transcripts of all genes per bin (height, width).
    grid
        The bins.
    apart_um
        How far apart the places are where transcripts were written, if they are cells and not transcripts.

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
    # The count-weighted median is the density a transcript sees: empty glass does not pull it down.
    density, weight = smooth.ravel()[found], counts.ravel()[found]
    order = np.argsort(density)
    weight = np.cumsum(weight[order])
    typical = density[order][np.searchsorted(weight, weight[-1] / 2)]
    dense = smooth > _PART_OF_TYPICAL * typical
    return _tidy(_shrink(dense, _SPREAD * sigma), grid.bin_um)


def from_spots(measurement: Measurement) -> np.ndarray:
    """Tissue where a measured spot speaks for the bin: (height, width) bool."""
    return measurement.nearest >= 0


def from_image(rgb: np.ndarray, bin_um: float) -> np.ndarray:
    """Tissue where the image is stained.

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
    if np.ptp(stain) < 0.05:  # a blank slide has no two classes to part
        return np.zeros(stain.shape, bool)
    # Half of Otsu's value: pale stroma is tissue too.
    return _tidy(stain > 0.5 * threshold_otsu(stain), bin_um)


def darkness(rgb: np.ndarray) -> np.ndarray:
    """Optical density of an image (3, h, w) uint8, mean over colours: (h, w) float32, 0 for white."""
    return -np.log10((rgb.astype(np.float32) + 1) / 256).mean(0)


def _shrink(mask: np.ndarray, by: float) -> np.ndarray:
    """Take off the rim that smoothing added, ``by`` bins wide, but not where the mask ends with the grid."""
    around = int(np.ceil(by)) + 1
    padded = np.pad(mask, around, mode="edge")
    return (ndimage.distance_transform_edt(padded) > by)[around:-around, around:-around]


def _tidy(mask: np.ndarray, bin_um: float) -> np.ndarray:
    from skimage.morphology import remove_small_holes, remove_small_objects

    mask = remove_small_holes(mask, max_size=int(_HOLE_UM2 / bin_um**2))
    return remove_small_objects(mask, max_size=int(_SPECK_UM2 / bin_um**2))
