"""Arrays of a store whose damage is told in a sentence, when they are opened and when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stsr.files import reading


class StoredArray:
    """A zarr array, read window by window.

    Parameters
    ----------
    path
        Its folder.

    Raises
    ------
    StsrError
        Here, and whenever something is read, if what is on disk is damaged.
    """

    def __init__(self, path: Path):
        import zarr

        self._path = path
        with reading(path):
            self._array = zarr.open_array(path, mode="r")
        self.shape, self.dtype, self.chunks = self._array.shape, self._array.dtype, self._array.chunks
        self.ndim = len(self.shape)

    def __getitem__(self, window) -> np.ndarray:
        with reading(self._path):
            return self._array[window]

    def rows(self, index: np.ndarray, *window: slice) -> np.ndarray:
        """Rows of the first axis in any order, within a window of the others."""
        with reading(self._path):
            return self._array.oindex[(index, *window)]
