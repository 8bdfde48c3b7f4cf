"""A section's low-resolution raster and image on a grid, ready to be cut into batches."""

from __future__ import annotations

import numpy as np
import torch

from stsr.geometry.grid import LR_UM, Grid, bins_per_lr
from stsr.methods.batch import Batch, cut, lr_mean


class Field:
    """A section's low-resolution raster on a grid, ready to be cut into batches.

    Parameters
    ----------
    grid
        The bins to predict.
    image
        Anything with ``read(grid) -> (3, H, W) uint8``, as `stsr.histology.image.Image`.
    lr, mask
        Raster (g, h, w) and mask (1, h, w) over the whole grid, as `Measurement.raster` gives them; None without
        spots.
    genes, names
        (g, p) mixtures of panel genes, and the genes' names.
    image_um
        Size of the image pixels to read, um.
    """

    def __init__(
        self,
        grid: Grid,
        image,
        lr: np.ndarray | None,
        mask: np.ndarray | None,
        genes: np.ndarray,
        names: list[str],
        image_um: float,
        lr_um: float = LR_UM,
    ):
        self.grid = grid
        self.image = image
        self.image_um = image_um
        self.per_lr = bins_per_lr(grid.bin_um, lr_um)
        self.genes = torch.as_tensor(genes, dtype=torch.float32)
        self.names = tuple(names)
        self.lr = lr
        self.mask = mask
        self.lr_mean = lr_mean(lr, mask) if lr is not None else np.zeros(len(genes), np.float32)

    def batch(self, window: Grid, image: torch.Tensor | None = None) -> Batch:
        """One tile (b = 1); white beyond the slide, no spots beyond the grid.

        ``image`` (1, 3, I, I) saves reading it again where another field of the section has done so.
        """
        row, column = (start // self.per_lr for start in self.grid.offset_of(window))
        height, width = window.height // self.per_lr, window.width // self.per_lr
        if image is None:
            image = torch.as_tensor(np.ascontiguousarray(self.image.read(window.at(self.image_um))))[None]
        if self.lr is None:
            lr = np.zeros((len(self.genes), height, width), np.float32)
            mask = np.zeros((1, height, width), np.float32)
        else:
            lr = cut(self.lr, row, column, height, width)
            mask = cut(self.mask, row, column, height, width)
        return Batch(
            image=image,
            lr=torch.as_tensor(lr)[None],
            lr_mask=torch.as_tensor(mask)[None],
            has_lr=torch.tensor([self.lr is not None]),
            lr_mean=torch.as_tensor(self.lr_mean)[None],
            genes=self.genes,
            names=self.names,
        )
