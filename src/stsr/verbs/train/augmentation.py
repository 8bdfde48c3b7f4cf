"""Ways to show a tile anew: turned, mirrored, in other colours."""

from __future__ import annotations

import numpy as np


def turned(array: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight ways to turn and mirror the last two axes; 0 leaves them."""
    array = np.rot90(array, turn % 4, axes=(-2, -1))
    return array[..., ::-1] if turn >= 4 else array


_ORDERS: dict[tuple[int, int], np.ndarray] = {}


def turned_places(side: int, turn: int) -> np.ndarray:
    """(side * side,) the place that each bin of a window takes when it is turned."""
    if (side, turn) not in _ORDERS:
        order = np.empty(side * side, np.int64)
        order[turned(np.arange(side * side).reshape(side, side), turn).ravel()] = np.arange(side * side)
        _ORDERS[side, turn] = order
    return _ORDERS[side, turn]


def stained(image: np.ndarray, gains: np.ndarray | None) -> np.ndarray:
    """The image (3, y, x) uint8 with each colour's optical density, -log(I / 255), times its gain."""
    if gains is None:
        return image
    light = np.arange(256) / 255
    table = np.rint(255 * light[None, :] ** gains[:, None]).astype(np.uint8)  # (3, 256)
    return np.stack([table[colour][image[colour]] for colour in range(3)])
