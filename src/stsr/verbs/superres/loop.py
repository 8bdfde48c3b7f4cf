"""The loop of superres: tiles through a method into the store, in bounded memory.

Genes go through the tiles in blocks. A block's tiles are blended band by band, and finished rows go to a scratch file
beside the store. After the last band, maps are corrected, set to zero outside the support and written, 16 genes at a
time. An interrupted run resumes at the same band.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from stsr.diffusion.noise import Noise
from stsr.geometry.grid import add_up
from stsr.progress import Progress, Report
from stsr.signals import Interrupted, Interruption
from stsr.spread.drawing import drawn_rates
from stsr.store.writer import CHUNKS, MapWriter
from stsr.verbs.superres.field import Field
from stsr.verbs.superres.job import SuperresJob, new_support, plural, provenance_of
from stsr.verbs.superres.predict import Predictor
from stsr.verbs.superres.scratch import Scratch
from stsr.verbs.superres.tiles import Canvas, Tile, needed, plan

MEMORY_BYTES = 2**30
"""Memory for the canvases of one block of genes; sets how many genes are predicted together."""
_TAPER_LR = 1.0  # width of the blending ramp, low-resolution pixels


def write_maps(
    job: SuperresJob, *, overwrite: bool, progress: Progress, report: Report, interruption: Interruption
) -> float | None:
    """Fill and publish the maps of a job.

    Returns
    -------
    float or None
        The consistency error; None if maps were not corrected, or no spot lies entirely inside them.
    """
    beside, origin = new_support(job)
    provenance = {**{element: provenance_of(job, element) for element in job.elements}, **origin}
    with MapWriter(
        job.store,
        job.elements,
        job.genes,
        job.output_grid,
        provenance,
        overwrite,
        frame=job.section.frame,
        beside=beside,
    ) as writer:
        writer.keep = True  # unless an error other than an interruption occurs
        try:
            error = MapLoop(job, writer, progress, report, interruption).run()
        except (Interrupted, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            writer.keep = False
            raise
        for element in job.elements:
            writer.provenance[element]["consistency_error"] = error
        # Publishing is not interrupted; if it fails, for example on a full disk, everything is removed.
        writer.keep = False
    return error


class MapLoop:
    """Predicts the tiles of a job, one block of genes after another, and writes the maps."""

    def __init__(
        self,
        job: SuperresJob,
        writer: MapWriter,
        progress: Progress,
        report: Report,
        interruption: Interruption,
    ):
        self.job = job
        self.writer = writer
        self.progress = progress
        self.report = report
        self.interruption = interruption
        self.predictor = Predictor(job)
        needs = job.requirements
        self.region = Tile.of_window(job.grid, job.region)
        self.area = Tile.of_window(job.grid, job.area)  # what the correction of the region needs
        bands = plan(job.grid, needs.tile_lr, needs.overlap_lr, needs.lr_um)
        self.blocks = _gene_blocks(job, bands[0][0].height)
        self.bands = needed(bands, self.area)
        self.tiles = sum(map(len, self.bands))
        self.steps = self.tiles * len(self.blocks) + -(-len(job.genes) // CHUNKS[0])

    def run(self) -> float | None:
        """Fill the maps; returns the consistency error."""
        for number, genes in enumerate(self.blocks):
            if not all(self.writer.is_done(f"maps.{start}") for start in _groups(genes)):
                raw = [
                    Scratch(self.writer.scratch(f"{number}.{element}.raw"), self._raw_shape(genes))
                    for element in self.job.predicted
                ]
                self._predict(number, genes, raw)
                self._finish(number, genes, raw)
                for scratch in raw:
                    scratch.remove()
        errors = [
            note
            for block, note in self.writer.notes.items()
            if block.startswith("maps.") and isinstance(note, float)
        ]
        return max(errors, default=None)

    def _raw_shape(self, genes: slice) -> tuple[int, int, int]:
        area = self.area.coarser(self.job.factor)
        return genes.stop - genes.start, area.height, area.width

    def _predict(self, number: int, genes: slice, raw: Sequence[Scratch]) -> None:
        """Blend all tiles of one block of genes into the scratch files, band by band."""
        fresh = any(scratch.fresh for scratch in raw)
        done = [not fresh and self.writer.is_done(f"{number}.{band}") for band in range(len(self.bands))]
        first = _first_needed(self.bands, done)
        if first is None:
            return
        field = self.predictor.field(genes)
        canvases = self._canvases(genes.stop - genes.start, first)
        step = self.tiles * number + sum(map(len, self.bands[:first]))
        for band in range(first, len(self.bands)):
            for column, tile in enumerate(self.bands[band]):
                began = time.monotonic()
                self._add(field, tile, band, column, canvases)
                if number == 0 and band == first and column == 0:
                    left = self.tiles * len(self.blocks) - step
                    self._estimate((time.monotonic() - began) * left, canvases)
                step += 1
                self.progress(step, self.steps, "super-resolving")
            for canvas, scratch in zip(canvases, raw, strict=True):
                for row, block in canvas.finished(band):
                    if not done[band]:
                        self._keep(scratch, canvas, row, block)
            if not done[band]:
                self.writer.mark_done(f"{number}.{band}")
            self.interruption.stop()

    def _add(self, field: Field, tile: Tile, band: int, column: int, canvases: list[Canvas]) -> None:
        for part, maps in self.predictor.tile(field, tile):
            for canvas, values in zip(canvases, maps, strict=True):
                canvas.add(canvas.bands[band][column], values, part)

    def _canvases(self, genes: int, first_band: int) -> list[Canvas]:
        """One per map. Means blend in fine bins, so that coarse maps are exact sums; spreads cannot be summed."""
        job = self.job
        ramp = int(_TAPER_LR * job.requirements.per_lr)
        canvases = [Canvas(genes, self.bands, ramp, first_band)]
        bands = [[tile.coarser(job.factor) for tile in band] for band in self.bands]
        canvases += [Canvas(genes, bands, ramp // job.factor, first_band) for _ in job.predicted[1:]]
        return canvases

    def _keep(self, scratch: Scratch, canvas: Canvas, row: int, block: np.ndarray) -> None:
        """Write finished rows (g, rows, columns), from the grid row ``row`` on, to a scratch file in output bins."""
        fine = canvas.bands is self.bands
        factor = self.job.factor if fine else 1
        block = add_up(block, factor)
        row, left = row // factor, canvas.left // factor
        area = self.area.coarser(self.job.factor)
        top, bottom = max(row, area.row), min(row + block.shape[1], area.row + area.height)
        if top < bottom:
            columns = slice(area.column - left, area.column - left + area.width)
            scratch.write(top - area.row, block[:, top - row : bottom - row, columns])

    def _finish(self, number: int, genes: slice, raw: Sequence[Scratch]) -> None:
        """Correct complete maps, a few genes at a time, crop them to the region, mask them, and write them."""
        job, factor = self.job, self.job.factor
        rows, columns = self.region.coarser(factor).within(self.area.coarser(factor))
        support = job.support[self.region.coarser(factor).within(Tile(0, 0, *job.support.shape))]
        levels = None if job.dispersion is None else self.predictor.levels(genes)
        for start in _groups(genes):
            if self.writer.is_done(f"maps.{start}"):
                continue
            part = slice(start, min(start + CHUNKS[0], genes.stop))
            maps = [scratch.read(slice(start - genes.start, part.stop - genes.start)) for scratch in raw]
            error = self._correct(part, maps)
            shown = [np.where(support, values[:, rows, columns], np.float32(0)) for values in maps]
            if levels is not None:
                shown += self._around(part, shown[0], levels[start - genes.start : part.stop - genes.start])
            for element, values in zip(job.elements, shown, strict=True):
                self.writer.write(element, part, slice(0, values.shape[1]), slice(0, values.shape[2]), values)
            self.writer.mark_done(f"maps.{start}", error)
            done = self.tiles * (number + 1) + -(-part.stop // CHUNKS[0])
            self.progress(done, self.steps, "super-resolving")
            self.interruption.stop()

    def _correct(self, genes: slice, maps: list[np.ndarray]) -> float | None:
        """Make the first of the maps add up to the spots, in place; scale the spread by the same factors."""
        correction, counts = self.job.correction, self.job.counts
        if correction is None or counts is None:
            return None
        before = maps[0].copy() if len(maps) > 1 else maps[0]
        error = correction.apply(maps[0], counts.targets(self.job.genes[genes], self.job.corrected))
        for other in maps[1:]:
            other *= np.divide(maps[0], before, out=np.ones_like(before), where=before > 0)
        return error

    def _around(self, genes: slice, mean: np.ndarray, levels: np.ndarray) -> list[np.ndarray]:
        """The spread of finished maps (g, height, width), then the samples to keep."""
        job, chosen = self.job, self.job.genes[genes]
        assert job.dispersion is not None
        bin_um = job.output_grid.bin_um
        spread = job.dispersion.sd(mean, levels, chosen, bin_um)
        corner = self.region.coarser(job.factor)
        return [spread] + [
            drawn_rates(
                mean,
                spread,
                chosen,
                job.dispersion,
                bin_um=bin_um,
                corner=(corner.row, corner.column),
                noise=Noise(job.seed, number),
            )
            for number in range(len(job.kept))
        ]

    def _estimate(self, seconds: float, canvases: list[Canvas]) -> None:
        job, area = self.job, self.area.coarser(self.job.factor)
        bins = job.output_grid.height * job.output_grid.width
        held = sum(canvas.nbytes for canvas in canvases) * 2 + area.height * area.width * 4 * CHUNKS[0] * 4
        scratch = (self.blocks[0].stop - self.blocks[0].start) * area.height * area.width
        disk = 4 * (len(job.genes) * bins * len(job.elements) + scratch * len(job.predicted))
        self.report(
            f"{plural(len(job.genes), 'gene')} x {job.output_grid.height} x {job.output_grid.width} bins: about "
            f"{_duration(seconds)}, {held / 2**30 + 0.8:.1f} GB of memory, at most {disk / 2**30:.2f} GB on disk"
        )


def _gene_blocks(job: SuperresJob, tile_height: int) -> list[slice]:
    """Number of genes that are predicted together: as many as fit in the memory for canvases.

    They follow from the whole section, also for a region: how genes are grouped can change the last bit of a value.
    """
    rows = min(tile_height, job.grid.height)
    per_gene = rows * job.grid.width * 4 * len(job.predicted) * 2  # the canvas and the rows it returns
    count = int(np.clip(MEMORY_BYTES // per_gene, CHUNKS[0], None)) // CHUNKS[0] * CHUNKS[0]
    return [slice(start, min(start + count, len(job.genes))) for start in range(0, len(job.genes), count)]


def _groups(genes: slice) -> range:
    """First genes of the groups of a block that are corrected and written together."""
    return range(genes.start, genes.stop, CHUNKS[0])


def _first_needed(bands: list[list[Tile]], done: list[bool]) -> int | None:
    """The first band to compute: one that is not done, or that reaches into rows of one that is not."""
    missing = [number for number, is_done in enumerate(done) if not is_done]
    if not missing:
        return None
    top = bands[missing[0]][0].row
    return next(number for number, band in enumerate(bands) if band[0].row + band[0].height > top)


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
