"""Augmentation of training tiles: rotations, mirroring, stain variation and coarser scans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from stsr.geometry.grid import Grid
from stsr.histology.image import Image

COARSE_UM = (4.0, 10.0)
"""Pixels of coarser scans, um: of a 2.5x objective, and of an overview."""

_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of haematoxylin, eosin and a third colour in red, green and blue (Ruifrok and Johnston 2001)."""

_BOUND = np.sqrt(3)  # largest draw, in standard deviations
_HUE = 0.25  # change of a stain's colour, relative to that of its log amount
_BACKGROUND = 0.1  # optical density of the glass, likewise
_TINT = 0.03  # its differences between channels, likewise
_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)  # of black as of 1


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


@dataclass(frozen=True)
class Stain:
    """A change of staining and scanner, in optical density."""

    mixing: np.ndarray
    """(3, 3) from the optical densities of red, green and blue to new ones."""
    background: np.ndarray
    """(3,) optical density of the glass."""


def drawn_stain(strength: float, rng: np.random.Generator) -> Stain:
    """Draw the staining of another laboratory.

    The amounts of haematoxylin, eosin and of what is neither change, and the colour of each of them: optical density is
    separated into the three with their usual colours, and mixed with new ones. Glass stays white up to a slight tint.

    Parameters
    ----------
    strength
        Standard deviation of the log amount of each stain; the other changes are in proportion.
    rng
        Random numbers.
    """
    # Of variance 1. The tails of a normal distribution would be false colours, and so would stains without blue.
    drawn = _BOUND * rng.uniform(-1, 1, (6, 3))
    amounts = np.exp(strength * drawn[0])
    changed = np.maximum(_STAINS + strength * _HUE * drawn[1:4], _STAINS / 2)
    changed /= np.linalg.norm(changed, axis=1, keepdims=True)
    background = strength * (_BACKGROUND * abs(drawn[4, 0]) + _TINT * np.abs(drawn[5]))
    return Stain(np.linalg.solve(_STAINS, amounts[:, None] * changed).T, background)


def stained(image: np.ndarray, stain: Stain | None) -> np.ndarray:
    """Change the staining of an image (3, y, x) uint8."""
    if stain is None:
        return image
    density = _DENSITY[image].reshape(3, -1)  # (3, pixels)
    changed = stain.mixing.astype(np.float32) @ density + stain.background.astype(np.float32)[:, None]
    light = 255 * np.exp(-np.maximum(changed, 0))
    return np.rint(light).astype(np.uint8).reshape(image.shape)


def coarsened(image: Image, window: Grid, coarse_um: float) -> np.ndarray:
    """Read a window (3, height, width) uint8 as from a scan with pixels of ``coarse_um``, interpolated to its own."""
    scan = window.at(coarse_um)
    return Image([image.read(scan)], scan.bin_to_um).read(window)
