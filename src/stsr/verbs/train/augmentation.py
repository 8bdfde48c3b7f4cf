"""Augmentation of training tiles: rotations, mirroring and stain variation."""

from __future__ import annotations

import numpy as np


def turned(array: np.ndarray, turn: int) -> np.ndarray:
    """Rotate and mirror the last two axes in one of eight ways; 0 leaves them unchanged."""
    array = np.rot90(array, turn % 4, axes=(-2, -1))
    return array[..., ::-1] if turn >= 4 else array


_ORDERS: dict[tuple[int, int], np.ndarray] = {}


def turned_places(side: int, turn: int) -> np.ndarray:
    """New position (side * side,) of each bin of a window when it is rotated by ``turn``."""
    if (side, turn) not in _ORDERS:
        order = np.empty(side * side, np.int64)
        order[turned(np.arange(side * side).reshape(side, side), turn).ravel()] = np.arange(side * side)
        _ORDERS[side, turn] = order
    return _ORDERS[side, turn]


def stained(image: np.ndarray, gains: np.ndarray | None) -> np.ndarray:
    """Multiply the optical density, -log(I / 255), of each channel of an image (3, y, x) uint8 by its gain."""
    if gains is None:
        return image
    light = np.arange(256) / 255
    table = np.rint(255 * light[None, :] ** gains[:, None]).astype(np.uint8)  # (3, 256)
    return np.stack([table[colour][image[colour]] for colour in range(3)])
