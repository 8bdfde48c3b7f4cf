"""Counts of spots as maps are made from them: as measured, or denoised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from stsr.errors import UsageError
from stsr.spots.denoising import Denoised, denoise
from stsr.store.parts import Spots

if TYPE_CHECKING:
    from stsr.progress import Progress
    from stsr.verbs.superres.job import SuperresJob

AUTO = "auto"
RAW, DENOISED = "raw", "denoised"
NONE, EXACT = "none", "exact"
SPOTS = (AUTO, RAW, DENOISED)
CONSISTENCIES = (AUTO, NONE, DENOISED, EXACT)

_FEWEST_GENES = 2  # with counts: denoising compares genes


@dataclass(frozen=True)
class SpotCounts:
    """The counts that a run of superres makes its maps from.

    Parameters
    ----------
    spots
        Measured counts.
    read
        ``"raw"`` or ``"denoised"``: what methods read.
    consistency
        ``"none"``, ``"denoised"`` or ``"exact"``: what maps are made to add up to.
    denoised
        Expected counts of the same spots; None until they are computed, or if they are not needed.
    """

    spots: Spots
    read: str
    consistency: str
    denoised: Denoised | None = None

    @property
    def needs_denoising(self) -> bool:
        """Whether expected counts are used anywhere."""
        return DENOISED in (self.read, self.consistency)

    def inputs(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray | sp.csr_matrix:
        """Counts (rows, genes) that methods read; 0 for genes that were not measured."""
        return self._expected(genes, rows) if self.read == DENOISED else self.spots.select(genes)[rows]

    def targets(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Counts (rows, genes) that maps are made to add up to; 0 for genes that were not measured."""
        if self.consistency == DENOISED:
            return self._expected(genes, rows)
        return self.spots.select(genes)[rows].toarray()

    def measures(self, genes: Sequence[str]) -> np.ndarray:
        """Whether each gene was measured: (g,) bool."""
        return np.isin(np.array(genes, str), np.array(self.spots.genes, str))

    def fitted(self, genes: Sequence[str]) -> SpotCounts:
        """With expected counts of some genes, if they are needed."""
        if not self.needs_denoising:
            return self
        wanted = set(genes)
        columns = [column for column, gene in enumerate(self.spots.genes) if gene in wanted]
        return replace(self, denoised=denoise(self.spots.counts, genes=np.array(columns, int)))

    def _expected(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray:
        assert self.denoised is not None  # computed before the first tile
        place = {self.spots.genes[column]: number for number, column in enumerate(self.denoised.genes)}
        known = [number for number, gene in enumerate(genes) if gene in place]
        values = np.zeros((len(rows), len(genes)), np.float32)
        values[:, known] = self.denoised.expected(np.array([place[genes[k]] for k in known], int))[rows]
        return values


def spot_counts(spots: Spots, read: str, consistency: str, *, are_sums: bool) -> tuple[SpotCounts, list[str]]:
    """Resolve ``auto`` to what suits the spots.

    Parameters
    ----------
    spots
        The spots to make maps from.
    read, consistency
        As ``spots`` and ``consistency`` of `stsr.superres`.
    are_sums
        Whether the spots are exact sums of the counts to predict, without noise of their own.

    Returns
    -------
    counts, notes
        Not denoised yet; remarks for the user.

    Raises
    ------
    UsageError
        For an unknown value.
    """
    for value, known, option in ((read, SPOTS, "--spots"), (consistency, CONSISTENCIES, "--consistency")):
        if value not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, not {value!r}")
    notes = []
    counted = int((np.asarray(spots.counts.sum(0)).ravel() > 0).sum())
    comparable = counted >= _FEWEST_GENES
    if read == AUTO:
        read = RAW if are_sums or not comparable else DENOISED
        if not are_sums and not comparable:
            notes.append("spots are not denoised: that compares genes, and only one has counts")
    if consistency == AUTO:
        consistency = EXACT if are_sums else NONE
    return SpotCounts(spots, read, consistency), notes


def with_denoised(job: SuperresJob, progress: Progress) -> SuperresJob:
    """Denoise the spots of a job, if it uses denoised counts.

    Raises
    ------
    StsrError
        If counts are not raw, or too few genes have any.
    """
    counts = job.counts
    if counts is None or not counts.needs_denoising:
        return job
    progress(0, 1, "denoising spots")
    fitted = counts.fitted([*job.read_panel, *job.genes])
    progress(1, 1, "denoising spots")
    assert fitted.denoised is not None
    found = {"components": fitted.denoised.components}
    return replace(job, counts=fitted, provenance={**job.provenance, "denoising": found})
