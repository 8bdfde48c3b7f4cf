"""How features of a block of a section are made: from an array, or by an encoder on windows of the H&E."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from stsr.features.files import FeatureFile
from stsr.geometry.grid import Grid
from stsr.histology.features import PatchArray, features_um_of, open_patches, resampled
from stsr.histology.image import Image
from stsr.nn.frozen import FrozenEncoder, load_encoder
from stsr.progress import Report

_MARGIN = 1 / 8  # of a window, on each side, whose patches see too little around them and are cropped
_CHUNK_PX, _BLOCK_UM = 32, 1000.0  # largest sides of a block, which is one chunk
_WINDOWS_AT_ONCE = 16
_COARSE = 1.5  # times the encoder's pixels, from which on an H&E is said to be coarse


class Maker(Protocol):
    """Makes the features of a section block by block."""

    channels: int
    pixel_um: float
    side: int
    """Side of a block, pixels."""
    details: dict[str, Any]
    """For provenance."""

    def prepare(self, window: Grid, wanted: np.ndarray) -> Any:
        """Read what a block needs; called in threads."""

    def make(self, window: Grid, wanted: np.ndarray, prepared: Any) -> np.ndarray:
        """Features (c, height, width) float32 of a block; those not ``wanted`` (height, width) may be 0."""


class ArrayMaker:
    """Features from an array of patches."""

    def __init__(self, patches: PatchArray, pixel_um: float | None):
        self.patches = patches
        self.channels = patches.channels
        self.pixel_um = pixel_um or features_um_of(patches.spacing_um)
        self.side = _CHUNK_PX
        self.details = {"spacing_um": round(patches.spacing_um, 4)}

    def prepare(self, window: Grid, wanted: np.ndarray) -> np.ndarray:
        """Resample the patches."""
        return self.patches.read(window)

    def make(self, window: Grid, wanted: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """Return what `prepare` made."""
        return prepared


class EncoderMaker:
    """Features of overlapping windows of the H&E, whose margins are cropped."""

    def __init__(self, encoder: FrozenEncoder, image: Image, pixel_um: float | None):
        self.encoder, self.image = encoder, image
        settings = encoder.settings
        probe = encoder.encode(np.full((1, 3, settings.image_px, settings.image_px), 255, np.uint8))
        self.per_side, self.channels = probe.shape[1], probe.shape[3]
        one = self.per_side == 1
        self.spacing_um = (
            (settings.stride_um or settings.side_um) if one else settings.side_um / self.per_side
        )
        self.pixel_um = pixel_um or features_um_of(self.spacing_um)
        kept_um = self.pixel_um if one else settings.side_um * (1 - 2 * _MARGIN)
        self.core = max(1, int(kept_um / self.pixel_um + 1e-6))  # pixels along the kept middle of a window
        self.margin_um = (settings.side_um - self.core * self.pixel_um) / 2
        most = min(_CHUNK_PX, _BLOCK_UM / self.pixel_um)
        self.side = self.core * max(1, round(most / self.core))
        self.details = {
            "spacing_um": round(self.spacing_um, 4),
            "um_per_px": settings.um_per_px,
            "image_px": settings.image_px,
            "tokens": settings.tokens,
        }

    def prepare(self, window: Grid, wanted: np.ndarray) -> np.ndarray:
        """Read the image of a block and its margins (3, y, x)."""
        um = self.encoder.settings.um_per_px
        height, width = (
            int(np.ceil((-(-size // self.core) * self.core * self.pixel_um + 2 * self.margin_um) / um)) + 1
            for size in window.shape
        )
        return self.image.read(
            Grid(window.x0_um - self.margin_um, window.y0_um - self.margin_um, um, height, width)
        )

    def make(self, window: Grid, wanted: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """Encode the windows that have a wanted pixel."""
        core, px = self.core, self.encoder.settings.image_px
        starts = [
            (row, column)
            for row in range(0, window.height, core)
            for column in range(0, window.width, core)
            if wanted[row : row + core, column : column + core].any()
        ]
        values = np.zeros((*window.shape, self.channels), np.float32)
        middle = Grid(self.margin_um, self.margin_um, self.pixel_um, core, core)  # within a window
        scale = self.per_side / self.encoder.settings.side_um  # patches per um
        for first in range(0, len(starts), _WINDOWS_AT_ONCE):
            batch = starts[first : first + _WINDOWS_AT_ONCE]
            tokens = self.encoder.encode(np.stack([self._cut(prepared, *start, px) for start in batch]))
            for (row, column), own in zip(batch, tokens, strict=True):
                target = values[row : row + core, column : column + core]
                cells = resampled(own, np.diag([scale, scale, 1.0]), middle)
                target[:] = cells[: target.shape[0], : target.shape[1]]
        return values.transpose(2, 0, 1)

    def _cut(self, image: np.ndarray, row: int, column: int, px: int) -> np.ndarray:
        y, x = (round(at * self.pixel_um / self.encoder.settings.um_per_px) for at in (row, column))
        return image[:, y : y + px, x : x + px]


def maker_of(
    file: FeatureFile, image: Image, pixel_um: float | None, device: torch.device, report: Report
) -> Maker:
    """The maker of a file's features.

    Raises
    ------
    StsrError
        If the file is damaged or does not fit the image.
    """
    if file.kind == "array":
        return ArrayMaker(open_patches(file.path, image), pixel_um)
    encoder = load_encoder(file.path, device)
    if image.um_per_px > _COARSE * encoder.settings.um_per_px:
        report(
            f"the H&E has {image.um_per_px:.3g} um per pixel and is enlarged to the {encoder.settings.um_per_px:g} "
            f"um of {file.path.name}"
        )
    return EncoderMaker(encoder, image, pixel_um)
