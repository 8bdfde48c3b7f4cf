"""Formats of the instruments' files: versions, identifiers, feature classes, the 10x matrix and TIFF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class XoaLayout:
    """Differences between versions of the Xenium Onboard Analysis that matter to readers."""

    software: str
    """`analysis_sw_version` in `experiment.xenium`."""
    text: str
    """Type of text in parquet files: "binary" (bytes) before 2.0, "large_string" since."""
    text_cell_id: bool
    """Whether cells have names such as `aaaaaaab-1` (since 1.3), or numbers (before), where -1 is no cell."""
    transcript_extras: tuple[str, ...]
    """Columns of `transcripts.parquet` beyond the first eight."""
    cell_extras: tuple[str, ...]
    """Columns of `cells.parquet` beyond those of 1.0."""
    label_id: bool
    """Whether boundaries have `label_id`, and `cells.zarr.zip` has `polygon_sets`."""


_FOV = ("fov_name", "nucleus_distance")
_UNASSIGNED = ("unassigned_codeword_counts", "deprecated_codeword_counts")
_LAYOUTS = {
    (1, 0): XoaLayout("xenium-1.0.2", "binary", False, (), (), False),
    (1, 3): XoaLayout("xenium-1.3.0.6", "binary", True, _FOV, _UNASSIGNED[:1], False),
    (2, 0): XoaLayout("xenium-2.0.0.10", "large_string", True, (*_FOV, "codeword_index"), _UNASSIGNED, True),
    (3, 0): XoaLayout(
        "xenium-3.0.0.15",
        "large_string",
        True,
        (*_FOV, "codeword_index", "codeword_category", "is_gene"),
        ("genomic_control_counts", *_UNASSIGNED, "nucleus_count", "segmentation_method"),
        True,
    ),
}


def xoa_layout(version: str) -> XoaLayout:
    """The layout of a version such as "1.0", "1.6", "2.0" or "3.0": the last known one up to it.

    Raises
    ------
    ValueError
        If the version is not a number, or is 4 or newer, which is not supported.
    """
    try:
        major, minor = (int(part) for part in [*version.split("."), "0"][:2])
    except ValueError:
        raise ValueError(
            f"{version!r} is not a version of the Xenium Onboard Analysis; give for example 3.0"
        ) from None
    known = [at for at in _LAYOUTS if at <= (major, minor)]
    if not known or major > 3:
        raise ValueError(f"the layout of version {version} is not covered; choose a version from 1.0 to 3.x")
    return _LAYOUTS[max(known)]


def cell_names(index: np.ndarray, layout: XoaLayout) -> np.ndarray:
    """Identifiers of cells by index (-1: in no cell): integers from 1, or names such as `aaaaaaab-1`.

    A name is the 32-bit number of the cell in hexadecimal digits written as the letters a to p.
    """
    index = np.asarray(index)
    if not layout.text_cell_id:
        return np.where(index < 0, -1, index + 1).astype(np.int32)
    nibbles = ((index[:, None] + 1) >> np.arange(28, -1, -4)) & 15
    letters = (nibbles + ord("a")).astype(np.uint8).view("S8").ravel()
    return np.where(index < 0, b"UNASSIGNED", np.char.add(letters, b"-1")).astype("S10")


def feature_name(name: str, layout: XoaLayout) -> str:
    """The name of a feature in a layout: blank codewords are called unassigned since 2.0."""
    return name.replace("BLANK_", "UnassignedCodeword_") if layout.text == "large_string" else name


def feature_class(name: str) -> tuple[str, str]:
    """Class of a feature in the matrix, and its `codeword_category`."""
    classes = {
        "NegControlProbe_": ("Negative Control Probe", "negative_control_probe"),
        "antisense_": ("Negative Control Probe", "negative_control_probe"),
        "NegControlCodeword_": ("Negative Control Codeword", "negative_control_codeword"),
        "BLANK_": ("Blank Codeword", "unassigned_codeword"),
        "UnassignedCodeword_": ("Unassigned Codeword", "unassigned_codeword"),
    }
    for start, spelled in classes.items():
        if name.startswith(start):
            return spelled
    return "Gene Expression", "predesigned_gene"


def write_matrix_h5(
    path: Path,
    counts: sparse.spmatrix,
    barcodes: Sequence[bytes],
    features: Sequence[str],
    attributes: dict[str, object],
) -> None:
    """Write counts (barcode, feature) as a 10x matrix: CSC of features by barcodes under `/matrix`."""
    import h5py

    rows = sparse.csr_matrix(counts)
    rows.sort_indices()
    rows.eliminate_zeros()
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.asarray(barcodes, "S")
        for name, values, dtype in (
            ("data", rows.data, "i4"),
            ("indices", rows.indices, "i8"),
            ("indptr", rows.indptr, "i8"),
        ):
            matrix.create_dataset(name, data=values.astype(dtype), compression="gzip", compression_opts=1)
        matrix["shape"] = np.array(rows.shape[::-1], np.int32)
        write_features(matrix, features)


def write_features(group: Any, features: Sequence[str]) -> None:
    """Write the names, ids and classes of features into an open HDF5 group, as its group `features`."""
    table = group.create_group("features")
    table["_all_tag_keys"] = np.array([b"genome"])
    table["feature_type"] = np.array([feature_class(name)[0] for name in features], "S")
    table["genome"] = np.array(
        ["GRCh38" if feature_class(name)[0] == "Gene Expression" else "" for name in features], "S6"
    )
    ids = [f"GENE_{name}" if feature_class(name)[0] == "Gene Expression" else name for name in features]
    table["id"] = np.array(ids, "S")
    table["name"] = np.array(features, "S")


def write_rgb_tiff(path: Path, image: np.ndarray, um_per_px: float, ome: bool) -> None:
    """Write (y, x, 3) uint8 as a tiled TIFF; OME adds its physical size and, if large, smaller levels."""
    import tifffile

    options: dict[str, Any] = {
        "photometric": "rgb",
        "tile": (256, 256),
        "compression": "zlib",
        "compressionargs": {"level": 3},
    }
    levels = [image]
    while ome and max(levels[-1].shape) > 2048:
        levels.append(_halved(levels[-1]))
    metadata: dict[str, Any] = {"axes": "YXS"}
    if ome:
        metadata |= {"PhysicalSizeX": um_per_px, "PhysicalSizeXUnit": "µm"}
        metadata |= {"PhysicalSizeY": um_per_px, "PhysicalSizeYUnit": "µm"}
    per_cm = 1e4 / um_per_px
    with tifffile.TiffWriter(path, ome=ome) as file:
        file.write(
            levels[0],
            subifds=len(levels) - 1,
            metadata=metadata,
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
            **options,
        )
        for level in levels[1:]:
            file.write(level, subfiletype=1, metadata=None, **options)


def _halved(image: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels, rounded; an odd last row or column is dropped."""
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].astype(np.uint16)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def empty_folder(folder: str | Path) -> Path:
    """Make the folder.

    Raises
    ------
    FileExistsError
        If it exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; remove it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
