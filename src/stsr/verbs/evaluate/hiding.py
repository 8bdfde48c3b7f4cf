"""Maps without some of the spots, summed over those spots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stsr.progress import silent
from stsr.signals import Interruption
from stsr.store.section import Section
from stsr.verbs.evaluate.ways import Way
from stsr.verbs.superres.adaptation import adapt
from stsr.verbs.superres.features import with_features
from stsr.verbs.superres.job import SuperresJob, make_job
from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.predict import predicted_maps
from stsr.verbs.superres.spots import AUTO, DENOISED, KRIGED, NONE, SpotCounts

MEMORY_BYTES = 2**29
"""For the maps of one block of genes; twice as much where maps are corrected."""


@dataclass(frozen=True)
class Hiding:
    """Predicts hidden spots in several ways.

    Parameters
    ----------
    section
        The section.
    genes
        Genes to predict.
    ways
        Ways of making maps.
    seed
        Of methods that sample.
    interruption
        Checked after each tile.
    """

    section: Section
    genes: list[str]
    ways: list[Way]
    seed: int
    interruption: Interruption

    def predict(self, hidden: np.ndarray) -> list[np.ndarray]:
        """Expected counts (hidden, g) of hidden spots, by index, for each way; NaN for spots off the grid."""
        spots = self.section.spots
        assert spots is not None  # checked by the caller
        kept = np.setdiff1d(np.arange(len(spots.centres_um)), hidden)
        fitted = self._fitted(kept)
        found: dict[int, np.ndarray] = {}
        for inputs in dict.fromkeys(way.inputs for way in self.ways):
            alike = [number for number, way in enumerate(self.ways) if way.inputs == inputs]
            ways = [self.ways[number] for number in alike]
            if ways[0].adapt_steps:
                ways = [self._adapted(way, kept) for way in ways]
            jobs = [self._job(way, kept, fitted) for way in ways]
            found |= dict(zip(alike, self._sums(jobs, hidden), strict=True))
        return [found[number] for number in range(len(self.ways))]

    def _job(self, way: Way, kept: np.ndarray, fitted: SpotCounts | None = None) -> SuperresJob:
        job = self._made(self.section, way, kept, self.genes)
        assert job.counts is not None  # the section has spots
        return job if fitted is None else replace(job, counts=job.counts.sharing(fitted))

    def _made(
        self,
        section: Section,
        way: Way,
        kept: np.ndarray | None,
        genes: Sequence[str] | None,
    ) -> SuperresJob:
        job = make_job(
            section,
            way.loaded,
            scale=100 / way.loaded.method.requirements.bin_um,
            genes=genes,
            samples=None,
            use_lr=True,
            spots=way.spots,
            consistency=way.consistency,
            base=way.base,
            region=None,
            name="evaluated",
            seed=self.seed,
            kept=kept,
        )
        job = replace(job, sees_image=way.sees_image, samples=1)
        return with_features(job, None, overwrite=False, progress=silent, report=silent)

    def _adapted(self, way: Way, kept: np.ndarray) -> Way:
        """A way with its model adapted to the visible spots, as `superres` adapts it to all of them."""
        visible = self.section.of_spots(kept)

        def make(
            loaded: Loaded, base: str, rows: np.ndarray | None, genes: Sequence[str] | None
        ) -> SuperresJob:
            return self._made(visible, replace(way, loaded=loaded, base=base), rows, genes)

        found = adapt(
            way.loaded,
            make,
            visible.spots,
            base=AUTO,
            steps=way.adapt_steps,
            minutes=math.inf,
            seed=self.seed,
            progress=silent,
            interruption=self.interruption,
        )
        return replace(way, loaded=found.loaded, base=found.base)

    def _fitted(self, kept: np.ndarray) -> SpotCounts:
        """Visible spots denoised and ready for kriging, once for all ways."""
        jobs = [self._job(way, kept) for way in self.ways]
        counts = jobs[0].counts
        assert counts is not None
        genes = {gene for job in jobs for gene in job.read_panel}
        return replace(counts, read=DENOISED, base=KRIGED).fitted([*self.genes, *sorted(genes)])

    def _sums(self, jobs: list[SuperresJob], hidden: np.ndarray) -> list[np.ndarray]:
        """Counts of hidden spots (hidden, g), from the maps of jobs that differ in consistency only."""
        spots = self.section.spots
        assert spots is not None
        job = jobs[0]
        over = spots.take(hidden).measurement(job.grid)
        off = over.bins_seen <= 0
        sums = [np.full((len(hidden), len(self.genes)), np.nan) for _ in jobs]
        step = max(1, MEMORY_BYTES // (4 * job.grid.height * job.grid.width))
        for start in range(0, len(self.genes), step):
            genes = slice(start, min(start + step, len(self.genes)))
            maps = predicted_maps(job, genes, self.interruption.stop)
            for each, values in zip(jobs, sums, strict=True):
                made = _finished(each, maps, genes)
                values[:, genes] = np.where(off[:, None], np.nan, over.add_up(made))
        return sums


def _finished(job: SuperresJob, maps: np.ndarray, genes: slice) -> np.ndarray:
    """As `superres` writes them: corrected, and zero outside the support."""
    if job.counts is not None and job.counts.consistency != NONE:
        assert job.correction is not None
        maps = maps.copy()
        job.correction.apply(maps, job.counts.targets(job.genes[genes], job.corrected))
    return np.where(job.support, maps, np.float32(0))
