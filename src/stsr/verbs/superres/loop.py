"""Tiles through a method onto the store, in bounded memory; what is finished survives an interruption."""

from __future__ import annotations

import time

import numpy as np
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.methods.batch import Batch
from stsr.progress import Progress
from stsr.signals import Interrupted, Interruption
from stsr.store.writer import CHUNKS, MapWriter
from stsr.verbs.superres.field import Field
from stsr.verbs.superres.job import Task, plural
from stsr.verbs.superres.tiles import Canvas, Tile, plan

MEMORY_BYTES = 2**30
"""What the canvases of one block of genes may take; sets how many genes go through the tiles together."""
_GENES_AT_ONCE = 64  # per call of a method: bounds its activations
_TAPER_LR = 1.0  # width of the blending ramp, low-resolution pixels


class Run:
    """Tiles through the method onto the store."""

    def __init__(self, task: Task, overwrite: bool, progress: Progress, report, interruption: Interruption):
        self.task = task
        self.overwrite = overwrite
        self.progress = progress
        self.report = report
        self.interruption = interruption
        needs = task.loaded.method.requirements
        self.needs = needs
        self.bands = plan(task.grid, needs.tile_lr, needs.overlap_lr, needs.lr_um)
        self.panel = self._field(list(needs.panel), np.eye(len(needs.panel), dtype=np.float32))
        self.elements = [task.element] + ([task.spread] if task.spread else [])
        self.draws = task.spread is not None or not task.loaded.method.knows_mean
        self.corrects = task.consistency and task.measurement is not None

    def write(self) -> float | None:
        """Fill and publish the maps; returns the consistency error."""
        task = self.task
        provenance = dict.fromkeys(self.elements, task.provenance)
        with MapWriter(
            task.section.path, self.elements, task.genes, task.output_grid, provenance, self.overwrite
        ) as writer:
            writer.keep = True  # until something other than an interruption goes wrong
            try:
                blocks = self._gene_blocks()
                for number, genes in enumerate(blocks):
                    self._predict(writer, genes, number, len(blocks))
                error = self._correct(writer) if self.corrects else None
            except (Interrupted, KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                writer.keep = False
                raise
            for element in self.elements:
                writer.provenance[element]["consistency_error"] = error
            # Nothing interrupts what is left to do, and a full disk is to be left as it was.
            writer.keep = False
        return error

    def _gene_blocks(self) -> list[slice]:
        """Genes that go through the tiles together, as many as the memory for canvases holds."""
        task = self.task
        rows = min(self.bands[0][0].height, task.grid.height)
        per_gene = rows * task.grid.width * 4 * len(self.elements) * 2  # the canvas and what it hands over
        count = int(np.clip(MEMORY_BYTES // per_gene, CHUNKS[0], None)) // CHUNKS[0] * CHUNKS[0]
        return [
            slice(start, min(start + count, len(task.genes))) for start in range(0, len(task.genes), count)
        ]

    def _field(self, genes: list[str], mixed: np.ndarray) -> Field:
        """The spots of some genes as a raster over the region, ready to be cut."""
        task = self.task
        lr = mask = None
        if task.measurement is not None:
            lr, mask = task.measurement.raster(task.section.spots.select(genes)[task.spots])
        image = task.section.image if task.section.image is not None else _White()
        return Field(task.grid, image, lr, mask, mixed, genes, self.needs.image_um, self.needs.lr_um)

    def _predict(self, writer: MapWriter, genes: slice, number: int, of: int) -> None:
        """All tiles of one block of genes, band by band."""
        task = self.task
        count = genes.stop - genes.start
        done = [writer.is_done(f"{number}.{band}") for band in range(len(self.bands))]
        first = _first_needed(self.bands, done)
        if first is None:
            return
        field = self._field(task.genes[genes], task.mixtures[genes])
        canvases = self._canvases(count, first)
        total = sum(map(len, self.bands)) * of
        before = sum(map(len, self.bands)) * number + sum(map(len, self.bands[:first]))
        for band in range(first, len(self.bands)):
            for column, tile in enumerate(self.bands[band]):
                began = time.monotonic()
                for part, maps in self._tile(field, tile):
                    for canvas, values in zip(canvases, maps, strict=True):
                        canvas.add(canvas.bands[band][column], values, part)
                before += 1
                if number == 0 and tile is self.bands[first][0]:
                    self._estimate((time.monotonic() - began) * (total - before + 1), canvases)
                self.progress(before, total, "super-resolving")
            for element, canvas in zip(self.elements, canvases, strict=True):
                for row, block in canvas.finished(band):
                    if not done[band]:
                        factor = round(task.output_grid.bin_um / canvas.grid.bin_um)
                        block, row = add_up(block, factor), row // factor
                        rows, columns = slice(row, row + block.shape[1]), slice(0, block.shape[2])
                        writer.write(element, genes, rows, columns, block)
            if not done[band]:
                writer.mark_done(f"{number}.{band}")
            self.interruption.stop()

    def _canvases(self, genes: int, first_band: int) -> list[Canvas]:
        """One per element: means blend as fine bins, so that coarse maps are their exact sums; spreads cannot."""
        task = self.task
        ramp = int(_TAPER_LR * self.needs.per_lr)
        canvases = [Canvas(genes, task.grid, self.bands, ramp, first_band)]
        if task.spread:
            bands = [[_coarser(tile, task.factor) for tile in band] for band in self.bands]
            canvases.append(Canvas(genes, task.output_grid, bands, ramp // task.factor, first_band))
        return canvases

    def _tile(self, field: Field, tile: Tile):
        """(genes, [mean (g, H, W), spread]) for each part of the field's genes."""
        task, method, device = self.task, self.task.loaded.method, self.task.loaded.device
        window = tile.of(task.grid)
        corner = (tile.row + task.origin[0], tile.column + task.origin[1])
        noises = [TileNoise(noise, (corner,)) for noise in _noises(task.seed, task.samples)]
        with torch.inference_mode():
            panel = self.panel.batch(window).to(device)
            with _precision(device):
                features = method.condition(panel)
                drawn = [method.draw(panel, features, noise) for noise in noises] if self.draws else []
            batch = field.batch(window, panel.image).to(device)
            for start in range(0, len(batch.names), _GENES_AT_ONCE):
                part = slice(start, min(start + _GENES_AT_ONCE, len(batch.names)))
                genes = batch.of_genes(torch.arange(part.start, part.stop))
                mean, draws = self._predictions(genes, noises, features, drawn)
                maps = [mean]
                if task.spread:
                    maps.append(_spread(draws, mean, task.factor))
                arrays = [values.cpu().numpy() for values in maps]
                if not all(np.isfinite(values).all() for values in arrays):
                    raise StsrError(
                        f"the model {task.loaded.model} gives values that are no numbers; train it anew"
                    )
                yield part, arrays

    def _predictions(self, genes: Batch, noises, features, drawn) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The expected counts (g, H, W), and the samples that they or their spread are made of."""
        method = self.task.loaded.method
        if method.knows_mean:  # in full precision: it is what people read
            mean = method.mean(genes, features)
            return mean[0], [method.vary(genes, mean, one)[0] for one in drawn]
        pairs = zip(noises, drawn or [None] * len(noises), strict=True)
        with _precision(self.task.loaded.device):
            draws = [method.predict(genes, noise, features, one)[0].float() for noise, one in pairs]
        return sum(draws) / len(draws), draws

    def _correct(self, writer: MapWriter) -> float:
        """Make whole maps add up to the spots, a few genes at a time; the spread goes with them."""
        task = self.task
        grid = task.output_grid
        spots = task.section.spots
        measurement, kept = spots.measurement(task.section.grid(grid.bin_um)).window(grid)
        everything = (slice(0, grid.height), slice(0, grid.width))
        step = CHUNKS[0]
        for start in range(0, len(task.genes), step):
            block = f"correct.{start}"
            if writer.is_done(block):
                continue
            genes = slice(start, min(start + step, len(task.genes)))
            maps = writer.read(task.element, genes, *everything)
            before = maps.copy() if task.spread else None
            counts = spots.select(task.genes[genes])[kept].toarray()
            error = measurement.correct(maps, counts)
            if task.spread and not writer.is_done(f"spread.{start}"):
                spread = writer.read(task.spread, genes, *everything)
                spread *= np.divide(maps, before, out=np.ones_like(maps), where=before > 0)
                writer.write(task.spread, genes, *everything, spread)
                writer.mark_done(f"spread.{start}")
            writer.write(task.element, genes, *everything, maps)
            writer.mark_done(block, error)
            self.progress(genes.stop, len(task.genes), "adding up")
            self.interruption.stop()
        return max(
            (note for block, note in writer.notes.items() if block.startswith("correct.")), default=0.0
        )

    def _estimate(self, seconds: float, canvases: list[Canvas]) -> None:
        task = self.task
        held = (
            sum(canvas.nbytes for canvas in canvases) * 2
            + np.prod(task.output_grid.shape) * 4 * CHUNKS[0] * 4
        )
        disk = len(task.genes) * task.output_grid.height * task.output_grid.width * 4 * len(self.elements)
        self.report(
            f"{plural(len(task.genes), 'gene')} x {task.output_grid.height} x {task.output_grid.width} bins: about "
            f"{_duration(seconds)}, {held / 2**30 + 0.8:.1f} GB of memory, at most {disk / 2**30:.2f} GB on disk"
        )


class _White:
    """Stands in for the image where a method needs none."""

    def read(self, grid: Grid) -> np.ndarray:
        return np.full((3, *grid.shape), 255, np.uint8)


def _spread(draws: list[torch.Tensor], mean: torch.Tensor, factor: int) -> torch.Tensor:
    """Standard deviation of samples (g, H, W) of output bins; around the mean, which keeps float32 exact enough."""
    apart = [add_up(draw - mean, factor) for draw in draws]
    first = sum(apart) / len(apart)
    squares = sum(one * one for one in apart) - len(apart) * first * first
    return (squares / (len(apart) - 1)).clamp_min(0).sqrt()


def _noises(seed: int, samples: int) -> list[Noise]:
    """Samples in antithetic pairs: a pair's errors cancel to first order, so few samples average well."""
    return [Noise(seed, number // 2, 1.0 if number % 2 == 0 else -1.0) for number in range(samples)]


def _coarser(tile: Tile, factor: int) -> Tile:
    """The same tile in bins that are ``factor`` times as large."""
    return Tile(*(side // factor for side in (tile.row, tile.column, tile.height, tile.width)))


def _first_needed(bands: list[list[Tile]], done: list[bool]) -> int | None:
    """The first band to compute: one that is not done, or that reaches into rows of one that is not."""
    missing = [number for number, is_done in enumerate(done) if not is_done]
    if not missing:
        return None
    top = bands[missing[0]][0].row
    return next(number for number, band in enumerate(bands) if band[0].row + band[0].height > top)


def _precision(device: torch.device):
    """Half precision for networks on CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
