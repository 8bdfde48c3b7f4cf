"""Write a simulated tissue as the output folder of a Xenium instrument.

Of older versions it writes the differences that matter to readers: in 1.0 to 1.2 cells have numbers and names are
bytes; in 1.3 to 1.9 cells have names, as bytes, and `seg_mask_value` replaces `polygon_sets`; since 2.0 text is
`large_string`; 3.0 adds `is_gene` and `codeword_category`. The columns of counts in `cells.parquet` of 1.x are
simplified. Not written: morphology images, `analysis`, the csv and zarr copies of the tables, and the vertices of
polygons in `cells.zarr.zip`. So `spatialdata_io.xenium` needs `morphology_focus=False` and `morphology_mip=False`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stsr.simulate.formats import (
    XoaLayout,
    cell_names,
    empty_folder,
    feature_class,
    feature_name,
    write_matrix_h5,
    write_rgb_tiff,
    xoa_layout,
)
from stsr.simulate.histology import image_frame, render_he
from stsr.simulate.tissue import FOV_UM, MIN_QV, Tissue, polygon_areas

#: Pixel of the instrument, in which masks and the alignment file are given.
XENIUM_PX_UM = 0.2125

_FIRST_ID = 2**48  # first transcript id of real runs
_MASK_CHUNK = 1024


def write_xenium(
    tissue: Tissue,
    folder: str | Path,
    xoa: str = "3.0",
    image_um_per_px: float = 1.0,
    mirror: bool = False,
    turn_deg: float = 0.0,
    labels: bool = True,
) -> Path:
    """Write the files of a Xenium run with an H&E of the same section and its alignment; return the folder.

    Files: `experiment.xenium`, `transcripts.parquet` (several row groups), `cells.parquet`,
    `cell_boundaries.parquet`, `nucleus_boundaries.parquet`, `cell_feature_matrix.h5` (genes and controls),
    `cells.zarr.zip`, `he_image.ome.tif`, `he_imagealignment.csv`. The transcripts of each cell with
    qv of 20 or more and without controls are the counts in the matrix.

    See the head of this file for older versions and what is not written.

    Parameters
    ----------
    tissue : Tissue
    folder : path
        New or empty.
    xoa : str
        Version whose layout to write, "1.0" to "3.x".
    image_um_per_px : float
        Pixel size of the H&E.
    mirror, turn_deg
        Orientation of the H&E; see `histology.image_frame`.
    labels : bool
        Fill the masks of `cells.zarr.zip` (slow for a large section) instead of leaving them zero.

    Raises
    ------
    FileExistsError
        If the folder is not empty.
    ValueError
        If the version is not supported, or the pixel size is not positive.
    """
    layout = xoa_layout(xoa)
    px_to_um, shape = image_frame(tissue, image_um_per_px, mirror, turn_deg)
    folder = empty_folder(folder)
    _write_transcripts_parquet(tissue, folder / "transcripts.parquet", layout)
    counts = _feature_counts(tissue)
    features = [feature_name(name, layout) for name in tissue.features]
    barcodes = cell_names(np.arange(len(tissue.cells)), layout).astype("S").tolist()
    write_matrix_h5(folder / "cell_feature_matrix.h5", counts, barcodes, features, {})
    _write_cells_parquet(tissue, folder / "cells.parquet", counts, features, layout)
    for name, outline in (("cell", tissue.cells.outline_um), ("nucleus", tissue.cells.nucleus_um)):
        _write_boundaries(folder / f"{name}_boundaries.parquet", outline, layout)
    _write_cells_zarr(tissue, folder / "cells.zarr.zip", layout, labels)
    write_rgb_tiff(
        folder / "he_image.ome.tif", render_he(tissue, 0, px_to_um, shape), image_um_per_px, ome=True
    )
    to_xenium_px = np.diag([1 / XENIUM_PX_UM, 1 / XENIUM_PX_UM, 1]) @ px_to_um
    np.savetxt(folder / "he_imagealignment.csv", to_xenium_px, delimiter=",")
    _write_experiment(tissue, folder, layout)
    return folder


def _write_experiment(tissue: Tissue, folder: Path, layout: XoaLayout) -> None:
    """Written last, so that a folder with this file is complete."""
    facts = {
        "major_version": 5,
        "minor_version": 0,
        "run_name": "simulated tissue",
        "region_name": folder.name,
        "preservation_method": "ffpe",
        "panel_name": "simulated, genes of the human breast",
        "panel_organism": "Human",
        "panel_num_targets_predesigned": len(tissue.genes),
        "pixel_size": XENIUM_PX_UM,
        "analysis_sw_version": layout.software,
        "num_cells": len(tissue.cells),
        "num_transcripts": len(tissue.transcripts),
        "num_transcripts_high_quality": len(tissue.good),
        "instrument_sn": "",
        "images": {},
    }
    (folder / "experiment.xenium").write_text(json.dumps(facts, indent=1))


def _feature_counts(tissue: Tissue) -> sparse.csr_matrix:
    """Counts (cell, feature) of good quality, with controls, as in the instrument's matrix."""
    t = tissue.transcripts.take((tissue.transcripts.qv >= MIN_QV) & (tissue.transcripts.cell >= 0))
    ones = np.ones(len(t), np.int32)
    return sparse.coo_matrix(
        (ones, (t.cell, t.feature)), shape=(len(tissue.cells), len(tissue.features))
    ).tocsr()


def _write_transcripts_parquet(tissue: Tissue, path: Path, layout: XoaLayout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    t = tissue.transcripts
    features = [feature_name(name, layout) for name in tissue.features]
    fov_x, fov_y = (t.x_um // FOV_UM).astype(np.int64), (t.y_um // FOV_UM).astype(np.int64)
    across = int(tissue.width_um // FOV_UM) + 1
    fovs = [
        f"{chr(ord('A') + row % 26)}{column + 1}"
        for row in range(fov_y.max() + 1)
        for column in range(across)
    ]
    cells = cell_names(np.append(np.arange(len(tissue.cells)), -1), layout)
    columns = {
        "transcript_id": np.uint64(_FIRST_ID) + np.arange(len(t), dtype=np.uint64),
        "cell_id": _text(cells, t.cell, layout) if layout.text_cell_id else cells[t.cell],
        "overlaps_nucleus": t.in_nucleus.astype(np.uint8),
        "feature_name": _text(features, t.feature, layout),
        "x_location": t.x_um,
        "y_location": t.y_um,
        "z_location": t.z_um,
        "qv": t.qv,
        "fov_name": _text(fovs, fov_y * across + fov_x, layout),
        "nucleus_distance": _nucleus_distance_um(tissue),
        "codeword_index": t.feature.astype(np.int32),
        "codeword_category": _text([feature_class(name)[1] for name in features], t.feature, layout),
        "is_gene": t.feature < len(tissue.genes),
    }
    wanted = list(columns)[:8] + list(layout.transcript_extras)
    table = pa.table({name: columns[name] for name in wanted})
    # Always several row groups, so that streaming is tested.
    rows = int(np.clip(np.ceil(len(t) / 4), 1, 500_000))
    pq.write_table(table, path, row_group_size=rows, compression="zstd")


def _text(words, index: np.ndarray, layout: XoaLayout):
    """The strings at the given indices, as an arrow array of the layout's text type."""
    import pyarrow as pa

    spelled = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    index = np.where(index < 0, len(spelled) - 1, index).astype(np.int32)  # the last entry stands for "none"
    words = pa.array(spelled, pa.binary())
    if layout.text == "large_string":
        words = words.cast(pa.large_string())
    return words.take(pa.array(index))


def _nucleus_distance_um(tissue: Tissue) -> np.ndarray:
    """Distance (n,) float32 of each transcript to the nucleus of its cell, or to the nearest one; 0 inside."""
    t, cells = tissue.transcripts, tissue.cells
    owner = t.cell.copy()
    lost = owner < 0
    xy = np.column_stack([t.x_um, t.y_um]).astype(np.float64)
    if lost.any():
        owner[lost] = cKDTree(np.column_stack([cells.x_um, cells.y_um])).query(xy[lost])[1]
    nearest = np.full(len(t), np.inf)
    for corner in range(cells.nucleus_um.shape[1]):
        start = cells.nucleus_um[owner, corner - 1]
        side = cells.nucleus_um[owner, corner] - start
        way = xy - start
        along = np.clip((way * side).sum(1) / np.maximum((side * side).sum(1), 1e-12), 0, 1)
        nearest = np.minimum(nearest, np.hypot(*(way - along[:, None] * side).T))
    return np.where(t.in_nucleus, 0, nearest).astype(np.float32)


def _write_cells_parquet(tissue: Tissue, path: Path, counts, features: list[str], layout: XoaLayout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = len(tissue.cells)
    kinds = np.array([feature_class(name)[1] for name in features])

    def of(kind: str) -> np.ndarray:
        return np.asarray(counts[:, np.flatnonzero(kinds == kind)].sum(1)).ravel().astype(np.int64)

    columns = {
        "cell_id": _cell_column(np.arange(n), layout),
        "x_centroid": tissue.cells.x_um,
        "y_centroid": tissue.cells.y_um,
        "transcript_counts": of("predesigned_gene"),
        "control_probe_counts": of("negative_control_probe"),
        "genomic_control_counts": np.zeros(n, np.int64),
        "control_codeword_counts": of("negative_control_codeword"),
        "unassigned_codeword_counts": of("unassigned_codeword"),
        "deprecated_codeword_counts": np.zeros(n, np.int64),
        "total_counts": np.asarray(counts.sum(1)).ravel().astype(np.int64),
        "cell_area": polygon_areas(tissue.cells.outline_um),
        "nucleus_area": polygon_areas(tissue.cells.nucleus_um),
        "nucleus_count": np.ones(n, np.int64),
        "segmentation_method": pa.array(["Segmented by nucleus expansion of 5.0µm"] * n, pa.large_string()),
    }
    newer = set(xoa_layout("3.0").cell_extras)  # columns that some older version lacks
    wanted = [name for name in columns if name not in newer or name in layout.cell_extras]
    pq.write_table(pa.table({name: columns[name] for name in wanted}), path, compression="zstd")


def _cell_column(index: np.ndarray, layout: XoaLayout):
    names = cell_names(index, layout)
    return _text(names, np.arange(len(names)), layout) if layout.text_cell_id else names


def _write_boundaries(path: Path, outline: np.ndarray, layout: XoaLayout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    closed = np.concatenate([outline, outline[:, :1]], 1)  # the first corner is repeated at the end
    owner = np.repeat(np.arange(len(closed)), closed.shape[1])
    columns = {
        "cell_id": _cell_column(owner, layout),
        "vertex_x": closed[..., 0].ravel().astype(np.float32),
        "vertex_y": closed[..., 1].ravel().astype(np.float32),
    }
    if layout.label_id:
        columns["label_id"] = (owner + 1).astype(np.uint32)
    pq.write_table(pa.table(columns), path, compression="zstd")


def _write_cells_zarr(tissue: Tissue, path: Path, layout: XoaLayout, labels: bool) -> None:
    """The zipped zarr (version 2) store of cell numbers, summaries and masks (0: nuclei, 1: cells)."""
    import zarr

    n, cells = len(tissue.cells), tissue.cells
    number = np.arange(1, n + 1, dtype=np.uint32)
    centre = np.column_stack([cells.x_um, cells.y_um])
    areas = polygon_areas(cells.outline_um), polygon_areas(cells.nucleus_um)
    summary = np.column_stack([centre, areas[0], centre, areas[1], np.zeros(n), np.ones(n)])
    names = ["cell_centroid_x", "cell_centroid_y", "cell_area", "nucleus_centroid_x", "nucleus_centroid_y"]
    names += ["nucleus_area", "z_level", "nucleus_count"]
    kept = 8 if layout.label_id else 7
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        root = zarr.open_group(f"{scratch}/cells.zarr", mode="w", zarr_format=2)
        numbers = np.column_stack([number, np.ones(n, np.uint32)]) if layout.text_cell_id else number
        root.create_array("cell_id", data=numbers)
        root.create_array("cell_summary", data=summary[:, :kept]).attrs["column_names"] = names[:kept]
        masks = root.create_group("masks")
        shape = tuple(int(np.ceil(side / XENIUM_PX_UM)) for side in (tissue.height_um, tissue.width_um))
        for which, outline in enumerate((cells.nucleus_um, cells.outline_um)):
            mask = masks.create_array(str(which), shape=shape, chunks=(_MASK_CHUNK, _MASK_CHUNK), dtype="u4")
            if labels:
                _paint_mask(mask, outline / XENIUM_PX_UM)
            if layout.label_id:
                root.create_array(f"polygon_sets/{which}/cell_index", data=number - 1)
        if layout.text_cell_id and not layout.label_id:
            root.create_array("seg_mask_value", data=number)
        part = Path(scratch) / "cells.zip"
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(Path(scratch, "cells.zarr").rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(Path(scratch, "cells.zarr")).as_posix())
        shutil.move(part, path)


def _paint_mask(mask, outline_px: np.ndarray) -> None:
    """Fill a zarr array (y, x) with the number of each outline, from 1, one row of chunks at a time."""
    from PIL import Image, ImageDraw

    first, last = outline_px[..., 1].min(1), outline_px[..., 1].max(1)
    for top in range(0, mask.shape[0], _MASK_CHUNK):
        rows = min(_MASK_CHUNK, mask.shape[0] - top)
        # Pillow's scan line fill is fast enough for thousands of outlines.
        band = Image.new("I", (mask.shape[1], rows))
        pen = ImageDraw.Draw(band)
        for i in np.flatnonzero((last >= top) & (first < top + rows)):
            pen.polygon((outline_px[i] - (0.5, top + 0.5)).ravel().tolist(), fill=int(i) + 1)
        mask[top : top + rows] = np.asarray(band).astype(np.uint32)
