"""A section's spots and image on a grid, cut into the batches that methods read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from stsr.geometry.grid import LR_UM, Grid, bins_per_lr
from stsr.methods.batch import Batch, cut, lr_mean
from stsr.spots.kriging import Kriged
from stsr.store.parts import FeatureMap


class Picture(Protocol):
    """Anything that gives pixels on a grid, such as `stsr.histology.image.Image`."""

    def read(self, grid: Grid) -> np.ndarray:
        """RGB (3, height, width) uint8."""
        ...


class White:
    """An empty slide, for methods that need no image."""

    def read(self, grid: Grid) -> np.ndarray:
        """White pixels (3, height, width) uint8."""
        return np.full((3, *grid.shape), 255, np.uint8)


class Field:
    """A section's spots and image on a grid.

    Parameters
    ----------
    grid
        The bins of the whole section.
    image
        The H&E.
    lr, mask
        Raster (g, h, w) and mask (1, h, w) over the whole grid, as `Measurement.raster` gives them; None without
        spots.
    genes, names
        (g, p) mixtures of panel genes, and the genes' names.
    image_um
        Size of the image pixels to read, um.
    lr_um
        Pitch of the low-resolution raster, um.
    known
        (g,) bool: whether the spots measured each gene; all of them if None.
    features
        Patch features, for methods that read them.
    kriged
        Densities between spots, if they are the base of the maps.
    """

    def __init__(
        self,
        grid: Grid,
        image: Picture,
        lr: np.ndarray | None,
        mask: np.ndarray | None,
        genes: np.ndarray,
        names: list[str],
        image_um: float,
        lr_um: float = LR_UM,
        known: np.ndarray | None = None,
        features: FeatureMap | None = None,
        kriged: Kriged | None = None,
    ):
        self.grid = grid
        self.image = image
        self.image_um = image_um
        self.features = features
        self.kriged = kriged
        self.per_lr = bins_per_lr(grid.bin_um, lr_um)
        self.genes = torch.as_tensor(genes, dtype=torch.float32)
        self.names = tuple(names)
        self.measured = lr is not None and mask is not None
        self.known = None if known is None or known.all() else torch.as_tensor(known)[None]  # (1, g)
        shape = grid.height // self.per_lr, grid.width // self.per_lr
        self.lr = np.zeros((len(genes), *shape), np.float32) if lr is None else lr
        self.mask = np.zeros((1, *shape), np.float32) if mask is None else mask
        self.lr_mean = lr_mean(self.lr, self.mask)

    def batch(
        self, window: Grid, image: torch.Tensor | None = None, features: torch.Tensor | None = None
    ) -> Batch:
        """One tile (b = 1); white outside the image, without spots outside the grid.

        Parameters
        ----------
        window
            The tile's bins, which coincide with those of the grid.
        image, features
            (1, 3, I, I) and (1, c, F, F) of this window, if another field of the section has read them.
        """
        row, column = (start // self.per_lr for start in self.grid.offset_of(window))
        height, width = window.height // self.per_lr, window.width // self.per_lr
        if image is None:
            image = torch.as_tensor(np.ascontiguousarray(self.image.read(window.at(self.image_um))))[None]
        if features is None and self.features is not None:
            values = self.features.read(window.at(self.features.pixel_um))
            features = torch.as_tensor(np.ascontiguousarray(values))[None]
        return Batch(
            image=image,
            lr=torch.as_tensor(cut(self.lr, row, column, height, width))[None],
            lr_mask=torch.as_tensor(cut(self.mask, row, column, height, width))[None],
            has_lr=torch.tensor([self.measured]),
            lr_mean=torch.as_tensor(self.lr_mean)[None],
            genes=self.genes,
            names=self.names,
            measured=self.known,
            features=features,
            base=None if self.kriged is None else torch.from_numpy(self.kriged.maps(window))[None],
        )
