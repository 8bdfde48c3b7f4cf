"""The feature-barcode matrix in HDF5 that 10x Genomics writes for every instrument.

Read with h5py: importing scanpy for its reader would add seconds to the start, and anndata has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.files import reading
from stsr.platforms.source import check_raw

if TYPE_CHECKING:
    from anndata import AnnData

GENE = "Gene Expression"


def read_matrix(path: Path) -> AnnData:
    """Read the genes of a feature-barcode matrix.

    Parameters
    ----------
    path
        ``cell_feature_matrix.h5``, ``filtered_feature_bc_matrix.h5`` and the like (Cell Ranger 3 layout).

    Returns
    -------
    AnnData
        (barcodes, genes), raw counts as int32 CSR, without features other than genes. Duplicate gene symbols get a
        suffix, as in scanpy; ``var["gene_ids"]`` holds the identifiers.

    Raises
    ------
    StsrError
        If the file is damaged, or holds no genes or no raw counts.
    """
    import anndata
    import h5py

    if not path.exists():
        raise StsrError(f"{path.name} is missing in {path.parent}; copy it from the instrument's output")
    with reading(path), h5py.File(path) as h5:
        group = h5["matrix"]
        shape = tuple(int(n) for n in group["shape"][:])
        parts = group["data"][:], group["indices"][:], group["indptr"][:]
        matrix = sp.csc_matrix(parts, shape=shape).T.tocsr()  # (barcodes, features)
        names, ids, kinds = (_text(group["features"][key]) for key in ("name", "id", "feature_type"))
        barcodes = _text(group["barcodes"])
    genes = kinds == GENE
    if not genes.any():
        raise StsrError(f"{path} holds no gene expression; give the matrix with all its features")
    matrix = matrix[:, genes]
    check_raw(matrix, str(path))
    found = anndata.AnnData(matrix.astype(np.int32))
    found.obs_names, found.var_names = barcodes, names[genes]
    found.var["gene_ids"] = ids[genes]
    found.var_names_make_unique()
    return found


def _text(dataset: Any) -> np.ndarray:
    return np.array(
        [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]], dtype=object
    )
