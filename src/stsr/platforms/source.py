"""What a platform's reader returns: one section, lazy, in um and raw counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stsr.errors import StsrError, did_you_mean
from stsr.store.parts import Cells

if TYPE_CHECKING:
    from anndata import AnnData

    from stsr.histology.image import Image


class Chunk(NamedTuple):
    """Transcripts of the panel that passed the filters.

    ``x_um`` and ``y_um`` (n,) floats, ``gene`` (n,) integer index into the panel; ``low_quality`` and ``other`` are
    the numbers of rows dropped for low quality, and as controls or unwanted genes.
    """

    x_um: np.ndarray
    y_um: np.ndarray
    gene: np.ndarray
    low_quality: int = 0
    other: int = 0


@dataclass(frozen=True)
class Transcripts:
    """A stream of transcripts that can be read several times.

    Parameters
    ----------
    chunks
        Called for each pass; yields ``Chunk``.
    bounds_um
        (x0, y0, x1, y1) that hold all transcripts, um; not necessarily tight.
    rows
        Rows in the file, for a progress bar; None if unknown.
    corner_um, bin_um
        For counts that are binned already: the corner of the bins (x, y) and their size, um.
    apart_um
        For transcripts that have only the position of their cell: distance between cells, um.
    """

    chunks: Callable[[], Iterator[Chunk]]
    bounds_um: tuple[float, float, float, float]
    rows: int | None = None
    corner_um: tuple[float, float] | None = None
    bin_um: float | None = None
    apart_um: float = 0.0


class BinChunk(NamedTuple):
    """Counts of genes in bins, as four integer arrays (n,).

    ``row`` and ``column`` of the bin in the array, ``gene`` an index into the panel, -1 for other features, and the
    ``number`` of counts.
    """

    row: np.ndarray
    column: np.ndarray
    gene: np.ndarray
    number: np.ndarray


@dataclass(frozen=True)
class Bins:
    """A stream of counts in an array of square bins, such as those of Visium HD; it can be read several times.

    Bin (row, column) covers ``[column * bin_um, (column + 1) * bin_um)`` in x and the same with its row in y.

    Parameters
    ----------
    chunks
        Called for each pass; yields ``BinChunk``. The same chunks come in the same order in each pass.
    bin_um
        Side of a bin, um.
    in_tissue
        (rows, columns) bool, over the array: bins in tissue. Counts lie in these only.
    entries
        Number of counts in the stream, for a progress bar.
    """

    chunks: Callable[[], Iterator[BinChunk]]
    bin_um: float
    in_tissue: np.ndarray
    entries: int


@dataclass(frozen=True)
class Spots:
    """Measured spots."""

    centres_um: np.ndarray
    """(n, 2) as x, y, um."""
    shape: str
    """``"disc"`` or ``"square"``."""
    size_um: float
    """Diameter or side, um."""
    counts: AnnData
    """AnnData (n, genes) of raw counts; ``obs_names`` are the spots' names."""
    origin: str = "measured"
    """``"measured"`` or ``"simulated"``."""


@dataclass(frozen=True)
class Options:
    """Options of ``prepare`` that readers need."""

    he: Path | None = None
    alignment: Path | None = None
    um_per_px: float | None = None
    min_qv: float = 20.0
    genes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One section as read by a platform; a measurement is None if not available."""

    name: str
    platform: str
    """Name of the technology."""
    genes: list[str]
    """Panel, in order; empty for a section with an image only."""
    image: Image | None = None
    """The H&E."""
    transcripts: Transcripts | None = None
    bins: Bins | None = None
    spots: Spots | None = None
    cells: Cells | None = None
    warnings: list[str] = field(default_factory=list)
    """For the user."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For provenance: versions, units, files."""


CONTROLS = (
    "NegControl", "antisense", "BLANK", "Unassigned", "UNASSIGNED", "Deprecated", "Intergenic", "GenomicControl",
)  # fmt: skip
"""Prefixes of features that are not genes, in all versions of Xenium."""


def control(name: str) -> bool:
    """Whether a feature's name is that of a control instead of a gene."""
    return not name or name.startswith(CONTROLS)


def choose_genes(available: list[str], wanted: tuple[str, ...] | None, where: str) -> list[str]:
    """The panel: all genes, or the wanted ones in the order of the data.

    Raises
    ------
    StsrError
        If there is no gene, or a wanted gene is not available (similar names are given).
    """
    if not available:
        raise StsrError(f"no gene in {where}: all features are controls; give data with gene expression")
    if not wanted:
        return list(available)
    have = set(available)
    for gene in wanted:
        if gene not in have:
            remedy = "check the spelling of --genes"
            raise StsrError(f"gene {gene!r} is not in {where}; {did_you_mean(gene, available, remedy, 3)}")
    return [gene for gene in available if gene in set(wanted)]


def check_raw(matrix: Any, where: str) -> None:
    """Refuse a count matrix (dense or sparse) that is not raw.

    Raises
    ------
    StsrError
        If it is empty, or values are negative or not integers.
    """
    values = matrix.data if hasattr(matrix, "indptr") else np.asarray(matrix)
    values = np.asarray(values)
    if values.size == 0 or not values.any():
        raise StsrError(f"{where} holds no counts; check that it is the raw matrix of this section")
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise StsrError(
            f"{where} is not raw counts (it has fractions); give the raw counts, before normalisation"
        )
    if values.min() < 0:
        raise StsrError(
            f"{where} is not raw counts (it has negative values); give the raw counts, before scaling"
        )
