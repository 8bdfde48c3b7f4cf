"""Write a simulated tissue as the output folder of Space Ranger for a Visium HD section."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from stsr.simulate.formats import empty_folder, write_features, write_matrix_h5, write_rgb_tiff
from stsr.simulate.histology import image_frame, render_he
from stsr.simulate.tissue import Tissue
from stsr.simulate.visium import write_small_images

BIN_UM = 2
_TISSUE_UM = (
    16  # bins of this size are wholly in tissue or not, so that bins of all sizes hold the same counts
)


def write_visium_hd(
    tissue: Tissue,
    folder: str | Path,
    bins_um: Sequence[int] = (2, 8, 16),
    image_um_per_px: float = 2.0,
    *,
    mirror: bool = False,
    turn_deg: float = 0.0,
    slices: bool = True,
) -> Path:
    """Write the output of Space Ranger for Visium HD; return the folder.

    `binned_outputs/square_002um` and the like, each with `filtered_feature_bc_matrix.h5` (bins in tissue with counts)
    and `spatial/`; `feature_slice.h5` and `he_fullres.tif`. A bin's counts are exactly the good transcripts in it.

    Parameters
    ----------
    tissue : Tissue
    folder : path
        New or empty.
    bins_um : sequence of int
        Bin sizes: multiples of 2 um that divide 16 um.
    image_um_per_px : float
        Pixel size of the full-resolution image.
    mirror, turn_deg
        Orientation of the H&E against the array; see `histology.image_frame`.
    slices : bool
        Whether to write `feature_slice.h5`.

    Raises
    ------
    FileExistsError
        If the folder is not empty.
    """
    folder = empty_folder(folder)
    px_to_um, shape = image_frame(tissue, image_um_per_px, mirror, turn_deg)
    image = render_he(tissue, 0, px_to_um, shape)
    row, column = (np.floor(axis / BIN_UM).astype(int) for axis in (tissue.good.y_um, tissue.good.x_um))
    rows, columns = (int(np.ceil(side / _TISSUE_UM)) for side in (tissue.height_um, tissue.width_um))
    x, y = ((np.arange(number) + 0.5) * _TISSUE_UM for number in (columns, rows))
    in_tissue = tissue.is_tissue(*(axis.ravel() for axis in np.meshgrid(x, y))).reshape(rows, columns)
    for bin_um in bins_um:
        times = bin_um // BIN_UM
        on = in_tissue.repeat(_TISSUE_UM // bin_um, 0).repeat(_TISSUE_UM // bin_um, 1)
        square = folder / "binned_outputs" / f"square_{bin_um:03d}um"
        (square / "spatial").mkdir(parents=True)
        place = (row // times) * on.shape[1] + column // times
        _write_square(square, tissue, place, on, bin_um, np.linalg.inv(px_to_um))
        write_small_images(
            square / "spatial",
            image,
            image_um_per_px,
            spot_um=bin_um,
            bin_size_um=float(bin_um),
            microns_per_pixel=image_um_per_px,
        )
    if slices:
        on = in_tissue.repeat(_TISSUE_UM // BIN_UM, 0).repeat(_TISSUE_UM // BIN_UM, 1)
        _write_slices(folder / "feature_slice.h5", tissue, row, column, on, np.linalg.inv(px_to_um))
    write_rgb_tiff(folder / "he_fullres.tif", image, image_um_per_px, ome=False)
    return folder


def _write_square(
    square: Path, tissue: Tissue, place: np.ndarray, on: np.ndarray, bin_um: int, um_to_px: np.ndarray
) -> None:
    """The matrix and positions of one bin size; ``place`` is the bin of each good transcript."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ones = np.ones(len(place), np.int32)
    counts = sparse.coo_matrix((ones, (place, tissue.good.feature)), (on.size, len(tissue.genes))).tocsr()
    row, column = np.indices(on.shape).reshape(2, -1)
    barcodes = [f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)]
    kept = np.flatnonzero(on.ravel() & (np.diff(counts.indptr) > 0))
    attributes: dict[str, object] = {"filetype": "matrix", "software_version": "spaceranger-3.1.0"}
    write_matrix_h5(
        square / "filtered_feature_bc_matrix.h5",
        counts[kept],
        [barcodes[number].encode() for number in kept],
        tissue.genes,
        attributes,
    )
    centres_um = np.stack([(column + 0.5) * bin_um, (row + 0.5) * bin_um, np.ones(on.size)])
    x_px, y_px, _ = um_to_px @ centres_um
    table = {
        "barcode": barcodes,
        "in_tissue": on.ravel().astype(np.int64),
        "array_row": row,
        "array_col": column,
        "pxl_row_in_fullres": y_px,
        "pxl_col_in_fullres": x_px,
    }
    pq.write_table(pa.table(table), square / "spatial" / "tissue_positions.parquet")


def _write_slices(
    file: Path, tissue: Tissue, row: np.ndarray, column: np.ndarray, on: np.ndarray, um_to_px: np.ndarray
) -> None:
    """Counts of each gene in all bins of 2 um, in tissue or not; the mask; and the place of bins in the image."""
    import h5py

    centre = np.array(
        [[BIN_UM, 0, BIN_UM / 2], [0, BIN_UM, BIN_UM / 2], [0, 0, 1.0]]
    )  # of a bin, from its indices
    metadata = {
        "nrows": on.shape[0],
        "ncols": on.shape[1],
        "spot_pitch": float(BIN_UM),
        "hd_layout_json": json.dumps({"file_format": "1.0"}),
        "transform_matrices": {"spot_colrow_to_microscope_colrow": (um_to_px @ centre).tolist()},
    }
    with h5py.File(file, "w") as h5:
        h5.attrs["metadata_json"] = json.dumps(metadata)
        write_features(h5, tissue.genes)
        groups = {"masks/filtered": (*np.nonzero(on), np.ones(int(on.sum()), np.uint8))}
        for number in range(len(tissue.genes)):
            mine = tissue.good.feature == number
            place, counts = np.unique(row[mine] * on.shape[1] + column[mine], return_counts=True)
            if len(place):
                groups[f"feature_slices/{number}"] = (
                    *np.divmod(place, on.shape[1]),
                    counts.astype(np.uint32),
                )
        for name, values in groups.items():
            group = h5.create_group(name)
            for key, value in zip(("row", "col", "data"), values, strict=True):
                group[key] = value
