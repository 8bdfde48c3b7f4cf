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
        genes, names = read_genes(group, path)
        ids, barcodes = _text(group["features"]["id"]), _text(group["barcodes"])
    matrix = matrix[:, genes]
    check_raw(matrix, str(path))
    found = anndata.AnnData(matrix.astype(np.int32))
    found.obs_names, found.var_names = barcodes, names
    found.var["gene_ids"] = ids[genes]
    return found


def read_genes(group: Any, path: Path) -> tuple[np.ndarray, list[str]]:
    """Indices of the features that are genes, and their symbols; duplicate symbols get a suffix, as in scanpy.

    Parameters
    ----------
    group
        Open HDF5 group that holds the group ``features``.
    path
        The file, for the message.

    Raises
    ------
    StsrError
        If no feature is a gene.
    """
    import pandas as pd
    from anndata.utils import make_index_unique

    genes = np.flatnonzero(_text(group["features"]["feature_type"]) == GENE)
    if not len(genes):
        raise StsrError(f"{path} holds no gene expression; give the matrix with all its features")
    return genes, list(make_index_unique(pd.Index(_text(group["features"]["name"])[genes])))


def _text(dataset: Any) -> np.ndarray:
    return np.array(
        [value.decode() if isinstance(value, bytes) else str(value) for value in dataset[:]], dtype=object
    )
