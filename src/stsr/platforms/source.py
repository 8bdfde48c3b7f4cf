"""What a platform hands over: one section, read lazily, everything in um and raw counts."""

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

    from stsr.histology.files import Picture


class Chunk(NamedTuple):
    """Some transcripts of the panel that passed the filters.

    ``x_um`` and ``y_um`` (n,) floats, ``gene`` (n,) integer index into the panel; ``low_quality`` and ``other`` say
    how many rows were dropped for quality and for being controls or genes not asked for.
    """

    x_um: np.ndarray
    y_um: np.ndarray
    gene: np.ndarray
    low_quality: int = 0
    other: int = 0


@dataclass(frozen=True)
class Transcripts:
    """A stream of transcripts that can be read again and again.

    Parameters
    ----------
    chunks
        Called for each pass; yields ``Chunk``.
    bounds_um
        (x0, y0, x1, y1) around all of them, um; may be a little wider.
    rows
        Rows in the file, for a progress bar; None where not known.
    corner_um, bin_um
        Where they were counted in bins already: the corner of the bins (x, y) and their size, um.
    apart_um
        Where they lie at cells' centres: how far apart thinly strewn cells are, um.
    """

    chunks: Callable[[], Iterator[Chunk]]
    bounds_um: tuple[float, float, float, float]
    rows: int | None = None
    corner_um: tuple[float, float] | None = None
    bin_um: float | None = None
    apart_um: float = 0.0


@dataclass(frozen=True)
class Spots:
    """Measured spots.

    Parameters
    ----------
    centres_um
        (n, 2) as x, y, um.
    shape
        ``"disc"`` or ``"square"``.
    size_um
        Diameter or side, um.
    counts
        AnnData (n, genes) of raw counts; its ``obs_names`` name the spots.
    origin
        ``"measured"`` or ``"simulated"``.
    """

    centres_um: np.ndarray
    shape: str
    size_um: float
    counts: AnnData
    origin: str = "measured"


@dataclass(frozen=True)
class Options:
    """What a user may say about the input; see ``prepare``."""

    he: Path | None = None
    alignment: Path | None = None
    um_per_px: float | None = None
    min_qv: float = 20.0
    genes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One section as a platform reads it.

    Parameters
    ----------
    name, platform
        Of the section and of the technology.
    genes
        Panel, in order; empty for a section that is an image only.
    picture
        The H&E, or None.
    transcripts, spots, cells
        What was measured, if anything.
    warnings
        Sentences a user ought to read.
    facts
        For provenance: versions, units, files.
    """

    name: str
    platform: str
    genes: list[str]
    picture: Picture | None = None
    transcripts: Transcripts | None = None
    spots: Spots | None = None
    cells: Cells | None = None
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def extent_um(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of what was measured, else of the image, um."""
        if self.transcripts is not None:
            return self.transcripts.bounds_um
        if self.spots is None:
            return self.picture.bounds_um
        radius = self.spots.size_um / 2
        x0, y0 = self.spots.centres_um.min(0) - radius
        x1, y1 = self.spots.centres_um.max(0) + radius
        return float(x0), float(y0), float(x1), float(y1)


CONTROLS = (
    "NegControl", "antisense", "BLANK", "Unassigned", "UNASSIGNED", "Deprecated", "Intergenic", "GenomicControl",
)  # fmt: skip
"""How the names of features that are no genes begin, over all versions of Xenium."""


def control(name: str) -> bool:
    """Whether a feature is a control and no gene, by its name."""
    return not name or name.startswith(CONTROLS)


def choose_genes(available: list[str], wanted: tuple[str, ...] | None, where: str) -> list[str]:
    """The panel: all genes, or those asked for in the order of the data.

    Raises
    ------
    StsrError
        If there is no gene, or one that was asked for is not there (with near names).
    """
    if not available:
        raise StsrError(f"no gene in {where}: all features are controls; check that it holds gene expression")
    if not wanted:
        return list(available)
    have = set(available)
    for gene in wanted:
        if gene not in have:
            remedy = "check the spelling of --genes"
            raise StsrError(f"gene {gene!r} is not in {where}; {did_you_mean(gene, available, remedy, 3)}")
    return [gene for gene in available if gene in set(wanted)]


def check_raw(matrix, where: str) -> None:
    """Refuse counts that are not raw.

    Raises
    ------
    StsrError
        If values are negative or not whole numbers.
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
