"""Counts of spots as maps are made from them: as measured or denoised, on a raster or kriged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from stsr.errors import UsageError
from stsr.spots.denoising import Denoised, denoise
from stsr.spots.kriging import Kriged, Kriging, choose, krige
from stsr.store.parts import Spots

if TYPE_CHECKING:
    from stsr.progress import Progress
    from stsr.verbs.superres.job import SuperresJob

AUTO = "auto"
RAW, DENOISED = "raw", "denoised"
NONE, EXACT = "none", "exact"
RASTER, KRIGED = "raster", "kriged"
SPOTS = (AUTO, RAW, DENOISED)
BASES = (AUTO, RASTER, KRIGED)
SMOOTH = "smooth"
CONSISTENCIES = (AUTO, NONE, SMOOTH, DENOISED, EXACT)

_MOST_CHOICE_GENES = 300  # by which the covariance of kriging is chosen
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
        ``"none"``, ``"smooth"``, ``"denoised"`` or ``"exact"``: how maps are made to add up to spots.
    base
        ``"raster"`` or ``"kriged"``: what a method starts from, between spots.
    denoised
        Expected counts of the same spots; None until they are computed, or if they are not needed.
    kriging
        Places and covariance; likewise.
    """

    spots: Spots
    read: str
    consistency: str
    base: str = RASTER
    denoised: Denoised | None = None
    kriging: Kriging | None = None

    @property
    def settings(self) -> dict[str, str]:
        """For the provenance."""
        return {"spots": self.read, "consistency": self.consistency, "base": self.base}

    @property
    def needs_denoising(self) -> bool:
        """Whether expected counts are used anywhere."""
        return self.read == DENOISED or self.consistency in (DENOISED, SMOOTH)

    def inputs(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray | sp.csr_matrix:
        """Counts (rows, genes) that methods read; 0 for genes that were not measured."""
        return self._expected(genes, rows) if self.read == DENOISED else self.spots.select(genes)[rows]

    def targets(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Counts (rows, genes) that maps are made to add up to; 0 for genes that were not measured."""
        if self.consistency in (DENOISED, SMOOTH):
            return self._expected(genes, rows)
        return self.spots.select(genes)[rows].toarray()

    def measures(self, genes: Sequence[str]) -> np.ndarray:
        """Whether each gene was measured: (g,) bool."""
        return np.isin(np.array(genes, str), np.array(self.spots.genes, str))

    def kriged(self, genes: Sequence[str], rows: np.ndarray) -> Kriged | None:
        """Kriged densities of some genes, from the spots in these rows; None if the base is the raster."""
        if self.base != KRIGED:
            return None
        assert self.kriging is not None  # computed before the first tile
        kriging = replace(self.kriging, centres_um=self.spots.centres_um[rows])
        return krige(kriging, _dense(self.inputs(genes, rows)), self.spots.area_um2)

    def fitted(self, genes: Sequence[str]) -> SpotCounts:
        """With expected counts of some genes and the covariance of kriging, where they are needed."""
        made = self
        if self.needs_denoising:
            wanted = set(genes)
            columns = [column for column, gene in enumerate(self.spots.genes) if gene in wanted]
            made = replace(made, denoised=denoise(self.spots.counts, genes=np.array(columns, int)))
        if self.base == KRIGED:
            some, everywhere = self._to_choose_from(genes), np.arange(len(self.spots.centres_um))
            raw, expected = self.spots.select(some), _dense(made.inputs(some, everywhere))
            found = choose(raw, expected, self.spots.centres_um, self.spots.area_um2)
            made = replace(made, kriging=found)
        return made

    def sharing(self, fitted: SpotCounts) -> SpotCounts:
        """With what was fitted to the same spots for other settings."""
        return replace(self, denoised=fitted.denoised, kriging=fitted.kriging)

    def _to_choose_from(self, genes: Sequence[str]) -> list[str]:
        """Measured genes among these, those with the most counts."""
        measured = [gene for gene in dict.fromkeys(genes) if gene in set(self.spots.genes)]
        totals = np.asarray(self.spots.select(measured).sum(0)).ravel()
        return [measured[index] for index in np.sort(np.argsort(-totals, kind="stable")[:_MOST_CHOICE_GENES])]

    def _expected(self, genes: Sequence[str], rows: np.ndarray) -> np.ndarray:
        assert self.denoised is not None  # computed before the first tile
        place = {self.spots.genes[column]: number for number, column in enumerate(self.denoised.genes)}
        known = [number for number, gene in enumerate(genes) if gene in place]
        values = np.zeros((len(rows), len(genes)), np.float32)
        values[:, known] = self.denoised.expected(np.array([place[genes[k]] for k in known], int))[rows]
        return values


def spot_counts(
    spots: Spots, read: str, consistency: str, base: str = AUTO, *, are_sums: bool, kriges: bool = False
) -> tuple[SpotCounts, list[str]]:
    """Resolve ``auto`` to what suits the spots.

    Parameters
    ----------
    spots
        The spots to make maps from.
    read, consistency, base
        As ``spots``, ``consistency`` and ``base`` of `stsr.superres`.
    are_sums
        Whether the spots are exact sums of the counts to predict, without noise of their own.
    kriges
        Whether the method needs kriged spots.

    Returns
    -------
    counts, notes
        Not denoised yet; remarks for the user.

    Raises
    ------
    UsageError
        For an unknown value.
    """
    options = (
        (read, SPOTS, "--spots"),
        (consistency, CONSISTENCIES, "--consistency"),
        (base, BASES, "--base"),
    )
    for value, known, option in options:
        if value not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, not {value!r}")
    notes = []
    counted = int((np.asarray(spots.counts.sum(0)).ravel() > 0).sum())
    comparable = counted >= _FEWEST_GENES
    if read == AUTO:
        # Logarithms of single counts are mostly noise: kriging raw spots is worse than no kriging.
        noisy = not are_sums or kriges or base == KRIGED
        read = DENOISED if noisy and comparable else RAW
        if not are_sums and not comparable:
            notes.append("spots are not denoised: that compares genes, and only one has counts")
    if consistency == AUTO:
        consistency = EXACT if are_sums else NONE
    if kriges and base == RASTER:
        raise UsageError("kriging has no raster as its base; leave out --base, or use --method bilinear")
    return SpotCounts(spots, read, consistency, KRIGED if kriges or base == KRIGED else RASTER), notes


def with_denoised(job: SuperresJob, progress: Progress) -> SuperresJob:
    """Denoise the spots of a job and choose the covariance of kriging, where they are used.

    Raises
    ------
    StsrError
        If counts are not raw, or too few genes have any.
    """
    counts = job.counts
    if counts is None or not (counts.needs_denoising or counts.base == KRIGED):
        return job
    progress(0, 1, "denoising spots")
    fitted = counts.fitted([*job.read_panel, *job.genes])
    progress(1, 1, "denoising spots")
    found: dict[str, dict[str, float]] = {}
    if fitted.denoised is not None:
        found["denoising"] = {"components": fitted.denoised.components}
    if fitted.kriging is not None:
        found["kriging"] = {"length_um": fitted.kriging.length_um, "nugget": fitted.kriging.nugget}
    return replace(job, counts=fitted, provenance={**job.provenance, **found})


def _dense(counts: np.ndarray | sp.csr_matrix) -> np.ndarray:
    return counts.toarray() if isinstance(counts, sp.csr_matrix) else counts
