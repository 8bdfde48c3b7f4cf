"""Augmentation of training tiles: rotations, mirroring, stain variation and coarser scans."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from stsr.geometry.grid import Grid
from stsr.histology.image import Image

COARSE_UM = (4.0, 10.0)
"""Pixels of coarser scans, um: of a 2.5x objective, and of an overview."""


def turned(array: np.ndarray, turn: int) -> np.ndarray:
    """Rotate and mirror the last two axes in one of eight ways; 0 leaves them unchanged."""
    array = np.rot90(array, turn % 4, axes=(-2, -1))
    return array[..., ::-1] if turn >= 4 else array


@lru_cache(maxsize=64)
def turned_places(side: int, turn: int, margin: int = 0) -> np.ndarray:
    """New position (bins,) of each bin of a window when it is rotated by ``turn``; -1 in a margin around it."""
    places = np.full((side + 2 * margin, side + 2 * margin), -1, np.int64)
    inside = np.empty(side * side, np.int64)
    inside[turned(np.arange(side * side).reshape(side, side), turn).ravel()] = np.arange(side * side)
    places[margin : margin + side, margin : margin + side] = inside.reshape(side, side)
    return places.ravel()


def stained(image: np.ndarray, gains: np.ndarray | None) -> np.ndarray:
    """Multiply the optical density, -log(I / 255), of each channel of an image (3, y, x) uint8 by its gain."""
    if gains is None:
        return image
    light = np.arange(256) / 255
    table = np.rint(255 * light[None, :] ** gains[:, None]).astype(np.uint8)  # (3, 256)
    return np.stack([table[colour][image[colour]] for colour in range(3)])


def coarsened(image: Image, window: Grid, coarse_um: float) -> np.ndarray:
    """Read a window (3, height, width) uint8 as from a scan with pixels of ``coarse_um``, interpolated to its own."""
    scan = window.at(coarse_um)
    return Image([image.read(scan)], scan.bin_to_um).read(window)
