"""Where the bins of a Visium HD array lie in the full-resolution image, and which of them are in tissue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stsr.errors import StsrError
from stsr.files import reading
from stsr.geometry.grid import add_up

_COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
_ROWS = 500_000  # per batch
_SAMPLE = 200_000  # rows that the affine is fitted to
_LARGEST = 20_000  # rows or columns of an array; the largest slides have 5,500 of 2 um
_MISFIT_UM = 20.0  # largest distance of a position from the affine; the image's perspective stays far below


@dataclass(frozen=True)
class Positions:
    """Positions of the bins of an array."""

    bin_um: float
    """Size of the bins that `in_tissue` refers to."""
    in_tissue: np.ndarray
    """(rows, columns) bool."""
    px_to_um: np.ndarray
    """Affine (3, 3) from pixels of the full-resolution image, where pixel i spans [i, i + 1), to um."""
    pixels: np.ndarray
    """(n, 2) x and y in pixels of a sample of the bins in tissue."""
    misfit_um: float
    """Largest distance of a position from the affine."""
    named_um_per_px: float | None
    """um per pixel according to Space Ranger."""
    file: Path

    def in_tissue_at(self, bin_um: float) -> np.ndarray:
        """`in_tissue` for bins of another size; coarser bins are in tissue if any part of them is.

        Raises
        ------
        StsrError
            If the sizes do not nest.
        """
        factor = bin_um / self.bin_um
        if factor <= 1:
            times = round(1 / factor)
            if abs(times * factor - 1) < 1e-6:
                return self.in_tissue.repeat(times, 0).repeat(times, 1)
        elif abs(factor - round(factor)) < 1e-6:
            height, width = self.in_tissue.shape
            around = [(0, -size % round(factor)) for size in (height, width)]
            return add_up(np.pad(self.in_tissue, around).astype(np.uint16), round(factor)) > 0
        raise StsrError(
            f"{self.file} has positions of bins of {self.bin_um:g} um, which do not fit bins of {bin_um:g} um; copy "
            f"the folder of one bin size completely"
        )


def read_positions(file: Path, bin_um: float, named_um_per_px: float | None) -> Positions:
    """Read ``tissue_positions.parquet`` in batches.

    Parameters
    ----------
    file
        Its columns are barcode, in_tissue, array_row, array_col, pxl_row_in_fullres and pxl_col_in_fullres; barcodes
        are not read.
    bin_um
        Size of its bins, um.
    named_um_per_px
        um per pixel according to Space Ranger.

    Raises
    ------
    StsrError
        If it is damaged, has no bin in tissue, or positions do not follow the array.
    """
    import pyarrow.parquet as pq

    in_tissue = np.zeros((1, 1), bool)
    sample = []
    with reading(file), pq.ParquetFile(file) as parquet:
        missing = set(_COLUMNS) - set(parquet.schema_arrow.names)
        if missing:
            raise StsrError(
                f"{file} has no column {sorted(missing)[0]}; give the original file of Space Ranger"
            )
        step = max(1, parquet.metadata.num_rows // _SAMPLE)
        for batch in parquet.iter_batches(_ROWS, columns=list(_COLUMNS), use_threads=False):
            table = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in _COLUMNS}
            on = table["in_tissue"] == 1
            row, column = (table[key].astype(np.int64) for key in ("array_row", "array_col"))
            if len(row) and not (
                min(row.min(), column.min()) >= 0 and max(row.max(), column.max()) < _LARGEST
            ):
                raise ValueError("rows or columns of the array are out of range")
            in_tissue = _grown(in_tissue, row, column)
            in_tissue[row[on], column[on]] = True
            sample.append(np.stack([table[name][::step].astype(float) for name in _COLUMNS], 1))
    whole = np.concatenate(sample or [np.zeros((0, len(_COLUMNS)))])
    if not in_tissue.any():
        raise StsrError(f"no tissue found: no bin in {file} is marked as in tissue; check the file")
    on = whole[whole[:, 0] == 1]
    return fitted_to((on[:, [2, 1]] + 0.5) * bin_um, on[:, [4, 3]], bin_um, in_tissue, named_um_per_px, file)


def fitted_to(
    array_um: np.ndarray,
    pixels: np.ndarray,
    bin_um: float,
    in_tissue: np.ndarray,
    named_um_per_px: float | None,
    file: Path,
) -> Positions:
    """Positions from a sample of bins: their centres in the array (n, 2), um, and in the image (n, 2), pixels.

    Raises
    ------
    StsrError
        If the two are not related by an affine.
    """
    um_to_px, misfit_um = _affine(array_um, pixels, file)
    return Positions(bin_um, in_tissue, np.linalg.inv(um_to_px), pixels, misfit_um, named_um_per_px, file)


def _grown(mask: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The mask, large enough for these bins."""
    if not len(row):
        return mask
    more = max(0, int(row.max()) + 1 - mask.shape[0]), max(0, int(column.max()) + 1 - mask.shape[1])
    return np.pad(mask, ((0, more[0]), (0, more[1]))) if any(more) else mask


def _affine(array_um: np.ndarray, pixels: np.ndarray, file: Path) -> tuple[np.ndarray, float]:
    """Affine (3, 3) um -> pixels by least squares, and the largest distance of a position from it, um."""
    if len(array_um) < 4 or not np.isfinite(pixels).all() or np.ptp(array_um, axis=0).min() == 0:
        raise StsrError(
            f"{file} has too few bins, or bins without positions; give the file of a whole section"
        )
    centre = array_um.mean(0)
    design = np.column_stack([array_um - centre, np.ones(len(array_um))])
    fitted, *_ = np.linalg.lstsq(design, pixels, rcond=None)  # (3, 2)
    px_per_um = abs(np.linalg.det(fitted[:2])) ** 0.5
    apart = np.linalg.norm(design @ fitted - pixels, axis=1).max()
    if not px_per_um > 0 or apart / px_per_um > _MISFIT_UM:
        raise StsrError(
            f"positions in {file} do not follow the rows and columns of the array; give the file of this run, unchanged"
        )
    um_to_px = np.eye(3)
    um_to_px[:2, :2] = fitted[:2].T
    um_to_px[:2, 2] = fitted[2] - fitted[:2].T @ centre
    return um_to_px, float(apart / px_per_um)
