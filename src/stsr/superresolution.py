"""superres(): from a section's spots and image to maps of genes in its store."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import stsr
from stsr import checkpoint
from stsr.data import store as names
from stsr.data.batch import Field
from stsr.data.genes import mixtures, wanted_genes
from stsr.data.grid import LR_UM, Grid, add_up
from stsr.data.mapwriter import CHUNKS, MapWriter
from stsr.data.measurement import Measurement
from stsr.data.section import Section, open_section
from stsr.data.tiles import Canvas, Tile, plan
from stsr.data.workspace import Workspace, disk_errors
from stsr.device import resolve_device
from stsr.diffusion.noise import Noise, TileNoise
from stsr.errors import StsrError, UsageError
from stsr.interruption import Interrupted, Interruption, interruptible
from stsr.methods import method_class
from stsr.methods.method import Method

DEFAULT_SAMPLES = 4
MEMORY_BYTES = 2**30
"""What the canvases of one block of genes may take; sets how many genes go through the tiles together."""
_GENES_AT_ONCE = 64  # per call of a method: bounds its activations
_TAPER_LR = 1.0  # width of the blending ramp, low-resolution pixels

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Superres:
    """What `superres` wrote.

    Attributes
    ----------
    store
        The section's store.
    element, spread
        Names of the map and of the spread over samples (None for a single sample).
    genes
        Number of genes.
    consistency_error
        Largest relative error of a gene between the map added up over the spots and the measured counts; None
        without spots.
    seconds
        Time it took.
    notes
        What the user should know.
    """

    store: Path
    element: str
    spread: str | None
    genes: int
    consistency_error: float | None
    seconds: float
    notes: list[str]


def superres(
    store: str | Path,
    *,
    scale: float = 10,
    genes: Sequence[str] | None = None,
    including: Sequence[str] = (),
    model: str | Path | None = None,
    method: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    use_lr: bool = True,
    consistency: bool = True,
    region: tuple[float, float, float, float] | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Superres:
    """Super-resolve a section and write the maps into its store.

    Parameters
    ----------
    store
        Any section with an image: by `stsr.prepare`, or any SpatialData store.
    scale
        100 um / bin size: 10 gives bins of 10 um, 5 of 20 um. Coarser scales are sums of the model's own bins.
    genes
        Names, comma lists, ``@file`` or ``all``; by default the model's genes that were measured.
    including
        Genes that a caller will look for in the map, to draw them for one: refused before the work if not among them.
    model
        A checkpoint; the packaged default model if neither it nor ``method`` is given.
    method
        A method that needs no training (``bicubic``, ``bilinear``) instead of a model.
    samples
        Draws of a diffusion model. With more than one their spread is written beside the map.
    steps, sampler, guidance
        How a diffusion model is sampled.
    use_lr
        False predicts from the image alone.
    consistency
        Whether the map is made to add up to the measured counts.
    region
        (x0, y0, x1, y1), um: only the low-resolution pixels that meet it.
    name
        Name of the element; ``superres_x{scale}`` by default.
    output
        Another store: a copy of the section with the result. The section itself by default.
    seed
        The same seed gives the same maps, however the work is cut.
    device
        ``auto``, ``cpu``, ``cuda[:n]`` or ``mps``.
    overwrite
        Replace earlier results of that name.
    progress
        Called with (done, total, label).
    report
        Called with lines for the user: the estimate of time and memory, remarks.

    Raises
    ------
    UsageError
        For what this section or model cannot give: an unknown gene, a scale that does not nest, spots that are not
        there.
    StsrError
        For a section without what the model needs, a damaged model, a store that cannot be written to.
    """
    began = time.monotonic()
    section = open_section(store)
    _check_output(section, output)
    loaded = _load(model, method, section, use_lr, resolve_device(device))
    _configure_sampling(loaded.method, steps, sampler, guidance)
    task = _plan(section, loaded, scale, genes, samples, use_lr, consistency, region, name, seed)
    _check_included(including, task.genes)
    for note in task.notes:
        (report or _nothing)(note)
    with interruptible() as interruption, _destination(section, output) as target:
        task = replace(task, section=target)
        run = _Run(task, overwrite, progress or _nothing, report or _nothing, interruption)
        error = run.write()
    return Superres(
        target.path, task.element, task.spread, len(task.genes), error, time.monotonic() - began, task.notes
    )


# ------------------------------------------------------------------------------------------------ what to do


@dataclass(frozen=True)
class _Loaded:
    """A method and where it comes from."""

    method: Method
    name: str
    model: str
    digest: str | None
    device: torch.device


@dataclass(frozen=True)
class _Task:
    """Everything decided before the work begins."""

    section: Section
    loaded: _Loaded
    genes: list[str]
    mixtures: np.ndarray  # (g, p)
    grid: Grid  # the method's bins over the wanted region
    origin: tuple[int, int]  # first bin of the region in the whole section's grid: where noise is cut from
    measurement: Measurement | None
    spots: np.ndarray  # spots of the section that the measurement keeps
    consistency: bool
    samples: int
    factor: int  # method's bins per output bin
    element: str
    spread: str | None
    seed: int
    notes: list[str]
    provenance: dict

    @property
    def output_grid(self) -> Grid:
        return self.grid.at(self.grid.bin_um * self.factor)


def _check_output(section: Section, output) -> None:
    """Refuse a copy where something else is, before any work."""
    if output is None or Path(output).resolve() == section.path:
        return
    target = Path(output).resolve()
    if target.is_relative_to(section.path):
        raise UsageError(f"{output} lies inside {section.path.name}; choose another --output")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}; make it, or choose another --output")
    if not os.path.lexists(target):
        return
    if not names.is_store(target):
        raise UsageError(f"{output} exists and is no section store; choose another --output")
    if _measured(target) != _measured(section.path):
        raise UsageError(
            f"{output} exists and is another section than {section.path.name}; choose another --output"
        )


def _measured(store: Path) -> dict:
    """What tells a section: its elements that no superres made, with their provenance and attributes."""
    made = names.provenance(store)
    kept = [name for name in names.elements(store) if made.get(name, {}).get("command") != "superres"]
    return {name: (made.get(name), names.element_attributes(store, name)) for name in kept}


@contextmanager
def _destination(section: Section, output) -> Iterator[Section]:
    """The section to write into: itself, or a copy, which goes again if the run fails before it had a map."""
    if output is None or Path(output).resolve() == section.path:
        yield section
        return
    target = Path(output).resolve()
    fresh = not target.exists()  # else an earlier run's copy; its maps are guarded by --overwrite
    if fresh:
        with disk_errors(target), Workspace(target, "copy") as work:
            work.wipe()
            shutil.copytree(section.path, work.new)
            os.rename(work.new, target)
    try:
        yield open_section(target)
    except (Interrupted, KeyboardInterrupt, SystemExit):
        raise  # the same command goes on in the copy
    except BaseException:
        if fresh:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _check_included(including: Sequence[str], genes: list[str]) -> None:
    there = set(genes)
    for gene in including:
        if gene not in there:
            raise UsageError(f"{gene!r} is not among the {len(genes)} genes of this map; add it to --genes")


def _load(model, method: str | None, section: Section, use_lr: bool, device: torch.device) -> _Loaded:
    if model is not None and method is not None:
        raise UsageError("--model and --method exclude each other: a model knows its method")
    if method is None:
        path = checkpoint.default_weights() if model is None else Path(model)
        loaded = checkpoint.load(path, device)
        label = "default" if model is None else path.name
        fast = loaded.method.to(
            memory_format=torch.channels_last
        )  # twice as fast on CPUs, and on tensor cores
        return _Loaded(fast, loaded.name, label, loaded.digest, device)
    chosen = method_class(method)
    if chosen.learns:
        raise UsageError(
            f"{method} has to be trained: stsr train SECTION --method {method} -o m.safetensors, then --model"
        )
    if section.spots is None or not use_lr:
        raise UsageError(f"{method} needs measured spots and {section.path.name} gives none; use a model")
    return _Loaded(chosen(panel=tuple(section.spots.genes)).eval(), method, method, None, device)


def _configure_sampling(method: Method, steps, sampler, guidance) -> None:
    asked = {"steps": steps, "sampler": sampler, "guidance": guidance}
    asked = {key: value for key, value in asked.items() if value is not None}
    if not asked:
        return
    if not hasattr(method, "sampling"):
        raise UsageError(f"this model does not sample; leave out {', '.join('--' + key for key in asked)}")
    try:
        method.sampling = replace(method.sampling, **asked)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _plan(section, loaded, scale, genes, samples, use_lr, consistency, region, name, seed) -> _Task:
    method, notes = loaded.method, []
    needs = method.requirements
    factor = _factor(scale, needs)
    if method.learns and section.image is None:
        raise StsrError(
            f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE, or use --method bicubic"
        )
    if section.spots is None and use_lr:
        notes.append("no measured spots: predicting from the image alone")
        use_lr = False
    spots = section.spots if use_lr else None
    measured = spots.genes if spots else []
    chosen = wanted_genes(genes, measured, method.panel)
    mixed = _mixtures(chosen, method, spots)
    whole = section.grid(needs.bin_um)
    grid = _region(whole, region)
    measurement, kept = spots.measurement(whole).window(grid) if spots else (None, np.zeros(0, int))
    if spots and not len(kept):
        raise UsageError("no spot lies whole in the region; make it larger, or add --no-lr")
    outside = len(chosen) - int((mixed.sum(1) == 1).sum())
    if outside and method.learns:
        notes.append(
            f"{_count(outside, 'gene')} outside the model's panel: inferred like panel genes with similar spots"
        )
    count = _samples(samples, method)
    element = names.check_name(name or names.superres_name(scale))
    sampling = asdict(method.sampling) if method.samples else {}
    provenance = {
        "command": "superres",
        "origin": "predicted",
        "stsr": stsr.__version__,
        "method": loaded.name,
        "model": loaded.model,
        "checkpoint": loaded.digest,
        "scale": scale,
        "bin_um": LR_UM / scale,
        "units": "expected counts per bin",
        "spots_used": bool(spots),
        "consistency": bool(consistency and spots),
        "samples": count,
        "seed": seed,
        "genes_outside_panel": outside if method.learns else 0,
        "region_um": list(grid.bounds_um),
        **sampling,
    }
    return _Task(
        section, loaded, chosen, mixed, grid, whole.offset_of(grid), measurement, kept, consistency, count, factor,
        element, names.spread_name(element) if count > 1 else None, seed, notes, provenance,
    )  # fmt: skip


def _factor(scale: float, needs) -> int:
    """The method's bins per output bin, along a side."""
    finest = needs.per_lr
    # The bounds first: what is no number at all cannot be rounded.
    if not 1 <= scale <= finest or abs(scale - round(scale)) > 1e-9 or finest % round(scale):
        served = ", ".join(str(s) for s in range(finest, 0, -1) if finest % s == 0)
        raise UsageError(f"this model cannot serve --scale {scale:g}; choose one of {served}")
    return finest // round(scale)


def _mixtures(genes: list[str], method: Method, spots) -> np.ndarray:
    if not method.learns:  # nothing is shared between genes: each one is its own
        return np.zeros((len(genes), len(method.panel)), np.float32)
    return mixtures(genes, method.panel, spots.genes if spots else [], spots.counts if spots else None)


def _region(whole: Grid, region) -> Grid:
    if region is None:
        return whole
    if not (region[0] < region[2] and region[1] < region[3]):
        raise UsageError("--region is X0 Y0 X1 Y1 in um, with X0 < X1 and Y0 < Y1")
    try:
        return whole.crop_um(*region)
    except ValueError as error:
        x0, y0, x1, y1 = whole.bounds_um
        raise UsageError(f"{error}, which spans {x0:g} {y0:g} {x1:g} {y1:g} um") from error


def _samples(samples: int | None, method: Method) -> int:
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}")
    if not method.samples:
        if samples not in (None, 1):
            raise UsageError("this method is not random: every sample would be the same; leave out --samples")
        return 1
    return DEFAULT_SAMPLES if samples is None else samples


# ------------------------------------------------------------------------------------------------ doing it


class _Run:
    """Tiles through the method onto the store."""

    def __init__(self, task: _Task, overwrite: bool, progress: Progress, report, interruption: Interruption):
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
        with torch.inference_mode(), _precision(device):
            panel = self.panel.batch(window).to(device)
            features = method.condition(panel)
            drawn = [method.draw(panel, features, noise) for noise in noises] if self.draws else []
            batch = field.batch(window, panel.image).to(device)
            for start in range(0, len(batch.names), _GENES_AT_ONCE):
                part = slice(start, min(start + _GENES_AT_ONCE, len(batch.names)))
                genes = batch.of_genes(torch.arange(part.start, part.stop))
                draws = [
                    method.predict(genes, noise, features, one)[0].float()
                    for noise, one in zip(noises, drawn, strict=False)
                ]  # (g, H, W) each
                mean = (
                    method.mean(genes, features)[0].float() if method.knows_mean else sum(draws) / len(draws)
                )
                maps = [mean]
                if task.spread:
                    maps.append(torch.stack([add_up(draw, task.factor) for draw in draws]).std(0))
                arrays = [values.cpu().numpy() for values in maps]
                if not all(np.isfinite(values).all() for values in arrays):
                    raise StsrError(
                        f"the model {task.loaded.model} gives values that are no numbers; train it anew"
                    )
                yield part, arrays

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
            f"{_count(len(task.genes), 'gene')} x {task.output_grid.height} x {task.output_grid.width} bins: about "
            f"{_duration(seconds)}, {held / 2**30 + 0.8:.1f} GB of memory, at most {disk / 2**30:.2f} GB on disk"
        )


class _White:
    """Stands in for the image where a method needs none."""

    def read(self, grid: Grid) -> np.ndarray:
        return np.full((3, *grid.shape), 255, np.uint8)


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
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _duration(seconds: float) -> str:
    return f"{max(seconds, 1):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _nothing(*_) -> None:
    return None
