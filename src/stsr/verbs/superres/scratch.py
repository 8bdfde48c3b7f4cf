"""Blended maps of a block of genes, kept in a file until their last row is complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stsr.files import disk_errors

_BYTES = 4  # of a float32


class Scratch:
    """Maps (genes, height, width) float32 in a file: written band by band, read a few genes at a time.

    The file holds nothing but the values. It survives an interruption, and is not read into memory as a whole.

    Parameters
    ----------
    path
        The file; created if it is missing.
    shape
        (genes, height, width).

    Attributes
    ----------
    fresh
        Whether the file was not there before.

    Raises
    ------
    StsrError
        If the disk is full.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path = path
        self._shape = shape
        size = int(np.prod(shape)) * _BYTES
        self.fresh = not path.exists() or path.stat().st_size != size
        if self.fresh:
            with disk_errors(path), open(path, "wb") as file:
                file.truncate(size)

    def write(self, row: int, values: np.ndarray) -> None:
        """Write rows of all genes: (genes, rows, width), the first at ``row``."""
        _, height, width = self._shape
        with disk_errors(self.path), open(self.path, "r+b") as file:
            for gene, rows in enumerate(np.ascontiguousarray(values, np.float32)):
                file.seek((gene * height + row) * width * _BYTES)
                file.write(rows.data)

    def read(self, genes: slice) -> np.ndarray:
        """Maps of some genes (genes, height, width)."""
        _, height, width = self._shape
        count = genes.stop - genes.start
        offset = genes.start * height * width * _BYTES
        return np.fromfile(self.path, np.float32, count * height * width, offset=offset).reshape(
            count, height, width
        )

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
