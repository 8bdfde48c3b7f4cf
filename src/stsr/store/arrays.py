"""Zarr arrays of a store, with damage reported in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stsr.files import reading


class StoredArray:
    """A zarr array, read window by window.

    Parameters
    ----------
    path
        Folder of the array.

    Raises
    ------
    StsrError
        When the array is opened or read, if it is damaged.
    """

    def __init__(self, path: Path):
        import zarr

        self._path = path
        with reading(path):
            self._array = zarr.open_array(path, mode="r")
        self.shape: tuple[int, ...] = self._array.shape
        self.chunks: tuple[int, ...] = self._array.chunks
        self.dtype: np.dtype = self._array.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, window: slice | tuple[slice, ...]) -> np.ndarray:
        with reading(self._path):
            return np.asarray(self._array[window])

    def rows(self, index: np.ndarray, *window: slice) -> np.ndarray:
        """Rows of the first axis in any order, within a window of the other axes."""
        with reading(self._path):
            return np.asarray(self._array.oindex[(index, *window)])
