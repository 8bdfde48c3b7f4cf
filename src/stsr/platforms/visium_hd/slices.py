"""``feature_slice.h5`` of Visium HD: counts of each gene in bins of 2 um, the tissue, and the registration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import reading
from stsr.platforms.source import BinChunk, choose_genes
from stsr.platforms.tenx import read_genes
from stsr.platforms.visium_hd.matrix import ENTRIES, Stream, binned, gene_index
from stsr.platforms.visium_hd.positions import Positions, fitted_to

BIN_UM = 2.0
_MASK = "masks/filtered"  # bins in tissue
_SAMPLE = 100_000  # bins that the alignment is fitted to


def read_tissue(file: Path) -> np.ndarray | None:
    """Bins in tissue (rows, columns) bool according to the file's mask; None if it has none.

    Raises
    ------
    StsrError
        If the file is damaged, or the mask is empty.
    """
    import h5py

    with reading(file), h5py.File(file) as h5:
        if _MASK not in h5:
            return None
        made = _metadata(h5)
        in_tissue = np.zeros((int(made["nrows"]), int(made["ncols"])), bool)
        row, column, on = (h5[f"{_MASK}/{key}"][:] for key in ("row", "col", "data"))
        in_tissue[row[on > 0].astype(np.int64), column[on > 0].astype(np.int64)] = True
    if not in_tissue.any():
        raise StsrError(f"no tissue found: the mask in {file} is empty; check the file")
    return in_tissue


def read_positions(file: Path) -> Positions:
    """Tissue and registration, from the mask and the transform in the file.

    Raises
    ------
    StsrError
        If the file is damaged or has no mask or no registration of the microscope image.
    """
    import h5py

    in_tissue = read_tissue(file)
    with reading(file), h5py.File(file) as h5:
        matrices = _metadata(h5).get("transform_matrices") or {}
        transform = matrices.get("spot_colrow_to_microscope_colrow")
    if transform is None or in_tissue is None:
        raise StsrError(
            f"{file} holds no registration of the microscope image or no mask, and there is no "
            f"tissue_positions.parquet; copy binned_outputs from the output of Space Ranger"
        )
    row, column = np.nonzero(in_tissue)
    step = max(1, len(row) // _SAMPLE)
    column_row = np.stack([column[::step], row[::step], np.ones(len(row[::step]))])
    x, y, w = np.asarray(transform, float) @ column_row  # maps indices of bins to their centres, in pixels
    array_um = (column_row[:2].T + 0.5) * BIN_UM
    return fitted_to(array_um, np.stack([x / w, y / w], 1), BIN_UM, in_tissue, None, file)


def open_stream(
    file: Path, in_tissue: np.ndarray, wanted: tuple[str, ...] | None
) -> tuple[Stream, list[str], int]:
    """Open the counts of all genes in bins of 2 um, gene by gene; as `stsr.platforms.visium_hd.matrix.open_stream`."""
    import h5py

    with reading(file), h5py.File(file) as h5:
        made = _metadata(h5)
        if float(made.get("spot_pitch", BIN_UM)) != BIN_UM:
            raise ValueError(f"its bins are of {made['spot_pitch']} um instead of 2 um")
        features, names = read_genes(h5, file)
        slices = h5["feature_slices"]
        number = {int(key): len(slices[key]["data"]) for key in slices}
    genes = choose_genes(names, wanted, file.name)
    gene_of = gene_index(features, names, genes, max([*number, *features.tolist()]) + 1)

    def chunks() -> Iterator[BinChunk]:
        with reading(file), h5py.File(file) as h5:
            for parts in _groups(number):
                whole = [
                    [h5[f"feature_slices/{feature}/{key}"][first:last] for key in ("row", "col", "data")]
                    for feature, first, last in parts
                ]
                row, column, count = (np.concatenate(columns) for columns in zip(*whole, strict=True))
                gene = np.concatenate(
                    [np.full(last - first, gene_of[feature]) for feature, first, last in parts]
                )
                yield binned(row.astype(np.int64), column.astype(np.int64), gene, count, in_tissue, file)

    return chunks, genes, sum(number.values())


def _metadata(h5: Any) -> dict[str, Any]:
    text = h5.attrs["metadata_json"]
    return json.loads(text.decode() if isinstance(text, bytes) else str(text))


def _groups(number: dict[int, int]) -> Iterator[list[tuple[int, int, int]]]:
    """Pieces (feature, first, last) of all features, together about `ENTRIES` counts each."""
    group: list[tuple[int, int, int]] = []
    left = ENTRIES
    for feature in sorted(number):
        for first in range(0, number[feature], ENTRIES):
            last = min(first + ENTRIES, number[feature])
            group.append((feature, first, last))
            left -= last - first
            if left <= 0:
                yield group
                group, left = [], ENTRIES
    if group:
        yield group
