"""Cell type signatures from a labelled reference or from marker lists."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stsr.errors import UsageError

if TYPE_CHECKING:
    from anndata import AnnData

_LEAST_CELLS = 10  # of a type in a reference; fewer give a noisy signature
_LOG_BELOW = 30.0  # normalised values below this are taken as logs; log of counts per 10,000 is 9.2 at most
_SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_short_name", "symbol")
_MARKER_HEADS = {"type", "celltype", "cell_type"}
_UNTYPED = {"", "nan", "none", "na", "unknown", "unassigned"}


@dataclass(frozen=True)
class Signatures:
    """Expression profile of each cell type.

    Parameters
    ----------
    types
        Names, k.
    genes
        Names, g.
    counts
        (g, k) counts of each gene summed over a type's cells; each column may be scaled by any factor.
    notes
        Remarks for the user about the file.
    """

    types: list[str]
    genes: list[str]
    counts: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def profiles(self) -> np.ndarray:
        """(g, k) fraction of each gene in a type's transcripts; columns add up to 1."""
        return self.counts / self.counts.sum(0)

    def take(self, rows: np.ndarray) -> Signatures:
        """The signatures on some of their genes, by index or mask."""
        genes = np.array(self.genes, dtype=object)[rows].tolist()
        return replace(self, genes=genes, counts=self.counts[rows])

    def distinct(self, most: int) -> list[list[str]]:
        """The genes that distinguish each type best from the mean of all types, at most ``most`` per type."""
        told = self._told()
        order = np.argsort(-told, axis=0, kind="stable")[:most]
        return [
            [self.genes[row] for row in order[:, column] if told[row, column] > 0]
            for column in range(len(self.types))
        ]

    def informative(self, most: int) -> Signatures:
        """The signatures on the genes with the most mutual information with the type, at most ``most``."""
        if len(self.genes) <= most:
            return self
        told = self._told().sum(1)
        return self.take(np.sort(np.argsort(-told, kind="stable")[:most]))

    def _told(self) -> np.ndarray:
        """(g, k) contribution of each gene and type to the mutual information: ``s log(s / mean s)``."""
        share = self.profiles
        mean = share.mean(1, keepdims=True)
        ratio = np.divide(share, mean, out=np.ones_like(share), where=share > 0)
        return share * np.log(ratio)


def read_reference(path: str | Path, label_key: str | None, measured: list[str]) -> Signatures:
    """Read signatures from a labelled reference.

    Parameters
    ----------
    path
        ``.h5ad`` of labelled cells with raw counts, or a table (csv, tsv, also gzipped) of genes x types.
    label_key
        Column of ``obs`` with the types; only for h5ad. May be left out if exactly one column has a usual name.
    measured
        Genes of the section. They decide which gene names of a reference to use, and which way round a table is.

    Raises
    ------
    UsageError
        If the file cannot be read, has negative values, only one type, or no such column.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give --reference an .h5ad or a table of genes x types")
    if path.suffix.lower() == ".h5ad":
        found = _from_cells(path, label_key, measured)
    else:
        if label_key is not None:
            raise UsageError(f"--label-key is for .h5ad files; the columns of {path.name} are its types")
        found = _from_table(path, measured)
    if len(found.types) < 2:
        raise UsageError(
            f"{path.name} has signatures of {len(found.types)} cell type; two or more are needed"
        )
    return found


def _from_table(path: Path, measured: list[str]) -> Signatures:
    try:
        table = pd.read_csv(path, index_col=0, sep="\t" if ".tsv" in path.suffixes else ",")
        table.index, table.columns = table.index.astype(str), table.columns.astype(str)
        values = table.to_numpy(np.float64)
    except (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"{path.name} is not a table of numbers ({reason}); give genes x cell types as csv or tsv"
        ) from error
    if table.columns.isin(measured).sum() > table.index.isin(measured).sum():
        table, values = table.T, values.T
    _check_values(values, path)
    empty = values.sum(0) == 0
    if empty.any():
        raise UsageError(f"type {table.columns[empty][0]!r} in {path.name} has no counts; leave it out")
    genes, rows = _unique(table.index)
    return Signatures([str(name) for name in table.columns], genes, values[rows])


def _from_cells(path: Path, label_key: str | None, measured: list[str]) -> Signatures:
    import anndata

    try:
        cells = anndata.read_h5ad(path)
    except Exception as error:  # h5py, anndata and pandas each raise their own
        raise UsageError(f"{path.name} cannot be read as h5ad; save it again with anndata") from error
    labels = _labels(cells.obs, label_key, path)
    matrix, names, notes = _expression(cells, path)
    genes, columns = _unique(_gene_names(names, measured))
    numbers = labels.value_counts()
    types = sorted(numbers.index[numbers >= _LEAST_CELLS])
    few = sorted(set(numbers.index) - set(types))
    if few:
        notes.append(f"types with fewer than {_LEAST_CELLS} cells are left out: {', '.join(few)}")
    member = labels.to_numpy()[:, None] == np.array(types, dtype=object)  # (cells, k)
    counts = np.asarray(matrix.T @ member.astype(np.float64))[columns]  # (g, k)
    if (counts.sum(0) == 0).any():
        raise UsageError(f"a type in {path.name} has no counts; leave it out")
    return Signatures(types, genes, counts, notes)


def _labels(obs: pd.DataFrame, label_key: str | None, path: Path) -> pd.Series:
    """The type of each cell; NaN for unlabelled cells."""
    usual = [key for key in ("cell_type", "celltype", "cell_types", "celltype_major") if key in obs]
    key = label_key or (usual[0] if len(usual) == 1 else None)
    if key not in obs:
        asked = f"no column {key!r}" if key else "several columns of labels, or none with a usual name"
        raise UsageError(
            f"{path.name} has {asked}; give --label-key one of: {', '.join(obs.columns) or 'none'}"
        )
    labels = obs[key].astype(object).astype(str)
    return labels.mask(labels.str.lower().isin(_UNTYPED))


def _expression(cells: AnnData, path: Path) -> tuple[sp.csr_matrix, pd.DataFrame, list[str]]:
    """(matrix (cells, genes), its var, notes): raw counts if the file has them."""
    candidates = [(cells.layers.get("counts"), cells.var), (cells.X, cells.var)]
    if cells.raw is not None:
        candidates.append((cells.raw.X, cells.raw.var))
    candidates = [
        (sp.csr_matrix(matrix, dtype=np.float64), var) for matrix, var in candidates if matrix is not None
    ]
    if not candidates:
        raise UsageError(f"{path.name} has no expression matrix; save it again with counts in X")
    for matrix, var in candidates:
        _check_values(matrix.data, path)
        if np.array_equal(matrix.data, np.rint(matrix.data)):
            return matrix, var, []
    matrix, var = candidates[0]
    is_log = matrix.data.max(initial=0) < _LOG_BELOW
    if is_log:
        matrix.data = np.expm1(matrix.data)
    taken = "as log(1 + x) of normalised counts" if is_log else "as normalised counts"
    return matrix, var, [f"{path.name} has no raw counts and is read {taken}; raw counts give better results"]


def _gene_names(var: pd.DataFrame, measured: list[str]) -> pd.Index:
    """The gene names that match most of the section's genes: symbols or Ensembl ids."""
    choices = [var.index, *(pd.Index(var[key].astype(str)) for key in _SYMBOLS if key in var)]
    return max(choices, key=lambda names: names.isin(measured).sum())


def _unique(names: pd.Index) -> tuple[list[str], np.ndarray]:
    """Names and their rows, each name once."""
    rows = np.flatnonzero(~names.duplicated())
    return [str(names[row]) for row in rows], rows


def _check_values(values: np.ndarray, path: Path) -> None:
    if not np.isfinite(values).all():
        raise UsageError(f"{path.name} has cells without a number; fill or remove them")
    if (values < 0).any():
        raise UsageError(f"{path.name} has negative numbers (scaled data?); give counts")


# --------------------------------------------------------------------------------------------------- markers


def read_markers(path: str | Path) -> dict[str, list[str]]:
    """Marker genes of each type.

    Parameters
    ----------
    path
        csv with columns ``type`` and ``gene``, gmt (name, description, genes; tabs), or json ``{type: [genes]}``.

    Raises
    ------
    UsageError
        If the file cannot be read as such, or has fewer than two types.
    """
    path = Path(path)
    reader = {".json": _markers_json, ".gmt": _markers_gmt, ".csv": _markers_csv}.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise UsageError(f"{path} is not a marker file; give a .csv, .gmt or .json that exists")
    try:
        markers = reader(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, pd.errors.ParserError) as error:
        raise UsageError(
            f"{path.name} is not a list of markers; give csv with columns type,gene, gmt, or json {{type: [genes]}}"
        ) from error
    if len(markers) < 2:
        raise UsageError(f"{path.name} has markers of {len(markers)} cell type; two or more are needed")
    return markers


def _markers_json(path: Path) -> dict[str, list[str]]:
    loaded = json.loads(path.read_text())
    if not all(isinstance(genes, list) for genes in loaded.values()):
        raise ValueError("the genes of a type are not a list")
    return {name: [str(gene) for gene in genes] for name, genes in loaded.items()}


def _markers_gmt(path: Path) -> dict[str, list[str]]:
    lines = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    if any(len(line) < 3 for line in lines):
        raise ValueError("a gmt line needs a name, a description and genes")
    return {line[0].strip(): [gene.strip() for gene in line[2:] if gene.strip()] for line in lines}


def _markers_csv(path: Path) -> dict[str, list[str]]:
    table = pd.read_csv(path, dtype=str)
    heads = {name.strip().lower(): name for name in table.columns}
    kind = next((heads[name] for name in heads if name in _MARKER_HEADS), None)
    if kind is None:
        raise KeyError("type")
    table = table.dropna(subset=[kind, heads["gene"]])
    genes = table[heads["gene"]].str.strip()
    return {str(name): list(part) for name, part in genes.groupby(table[kind].str.strip(), sort=False)}


def from_markers(markers: dict[str, list[str]], measured: list[str]) -> Signatures:
    """Signatures that are flat over the markers of a type and 0 elsewhere, on the genes of the section.

    If the lists share no gene, the Poisson regression gives each type the counts of its markers. Counts of a marker of
    several types are divided between them according to their other markers.

    Raises
    ------
    UsageError
        If fewer than two types have a marker among the genes.
    """
    there = set(measured)
    found = {name: [gene for gene in genes if gene in there] for name, genes in markers.items()}
    notes = [f"{name} has no marker in the map and is left out" for name, genes in found.items() if not genes]
    found = {name: genes for name, genes in found.items() if genes}
    if len(found) < 2:
        listed = len({gene for genes in markers.values() for gene in genes})
        held = len({gene for genes in found.values() for gene in genes})
        raise UsageError(
            f"{held} of the {listed} marker genes are in the map, of {len(found)} of {len(markers)} types; at least "
            "two types are needed: infer more genes with stsr superres --genes"
        )
    genes = list(dict.fromkeys(gene for listed in found.values() for gene in listed))
    flat = np.array([[float(gene in listed) for listed in found.values()] for gene in genes])
    return Signatures(list(found), genes, flat, notes)
