"""Adaptation to a slide: train a model on the slide's own spots, and keep it if it predicts other spots better.

Some spots are reserved and never used. Of the others, a random part is visible to the network in each tile; the loss is
the Poisson likelihood of the raw counts of all of them, given the predicted map summed over each spot, and spots that
the network did not see weigh more. Spots teach nothing below their own size but what the image tells.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from stsr.errors import UsageError
from stsr.methods.batch import Batch, lr_mean
from stsr.methods.method import channels_last
from stsr.methods.regression import RegressionConfig, UNetRegression
from stsr.progress import Progress
from stsr.signals import Interruption
from stsr.verbs.superres.field import Field, White
from stsr.verbs.superres.job import SuperresJob
from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.spots import with_denoised
from stsr.verbs.superres.tiles import Tile, plan

Make = Callable[[Loaded, np.ndarray | None], SuperresJob]

OFF, AUTO = "off", "auto"

RESERVED = 0.15
"""Share of the spots that is reserved to decide when to stop and what to keep."""

VISIBLE = 0.7
"""Share of the other spots that the network sees in a tile."""

HIDDEN_WEIGHT = 3.0
"""Weight in the loss of spots that the network does not see."""

_REALISATIONS = 8  # random choices of visible spots, each rasterised once
_MOST_CONSIDERED = 2000  # spots from which those to reserve are drawn, for bounded time
_TILE_LR = 6  # side of a training tile
_GENES_PER_STEP = 100
_LEAST_COUNTS = 1e-6  # expected per spot; keeps the logarithm finite


@dataclass(frozen=True)
class Schedule:
    """How a model is adapted.

    Parameters
    ----------
    steps
        Steps of the optimiser.
    tiles
        Tiles per step.
    learning_rate
        Of AdamW at the start; falls to a tenth along a cosine.
    check_every
        Steps between predictions of the reserved spots.
    """

    steps: int
    tiles: int
    learning_rate: float
    check_every: int


TUNE = Schedule(steps=75, tiles=2, learning_rate=2e-4, check_every=25)
FRESH = Schedule(steps=300, tiles=8, learning_rate=1e-3, check_every=50)

LEAST_SPOTS = 60
"""Fewer spots cannot show whether an adapted model is better."""

LEAST_SPOTS_FRESH = 600
"""Fewer spots cannot teach a model from nothing."""

SCORED_GENES = 200
"""Genes with the most counts, by which models are compared."""

FRESH_GENES = 300
"""Most genes of a model that is trained from nothing."""


@dataclass(frozen=True)
class Adapted:
    """The outcome of an adaptation.

    Parameters
    ----------
    loaded
        The method to use.
    record
        For the provenance, JSON-able.
    note
        For the user.
    """

    loaded: Loaded
    record: dict[str, Any]
    note: str


@dataclass(frozen=True)
class Candidate:
    """A model, and its score on the reserved spots."""

    name: str
    loaded: Loaded
    loss: float
    steps: int


def wanted_adaptation(value: str | int) -> str | int:
    """``off``, ``auto``, or a number of steps.

    Raises
    ------
    UsageError
        If it is neither.
    """
    if value in (OFF, AUTO):
        return value
    if not str(value).isdigit() or int(value) < 1:
        raise UsageError(f"--adapt is off, auto or a number of steps, not {value!r}")
    return int(value)


def adaptable(job: SuperresJob) -> bool:
    """Whether ``auto`` adapts: a model that can be, and enough spots that carry noise of their own."""
    enough = job.measurement is not None and job.measurement.spots >= LEAST_SPOTS
    return isinstance(job.loaded.method, UNetRegression) and enough and not job.section.spots_are_sums


def adapt(
    loaded: Loaded,
    make: Make,
    *,
    steps: int | None,
    minutes: float,
    seed: int,
    progress: Progress,
    interruption: Interruption,
) -> Adapted:
    """Adapt a model to a section, and train one from nothing where there are enough spots; keep the best.

    Parameters
    ----------
    loaded
        The given method.
    make
        ``make(loaded, kept)`` gives the job of a method that uses only some spots, by index, or all if None.
    steps
        Steps of adapting the given model; None for the default number, and a model from nothing beside it.
    minutes
        No new step begins after this time.
    seed
        Of reserved spots, tiles and new weights.

    Raises
    ------
    UsageError
        If the method cannot be adapted, or there are too few spots.
    Interrupted
        After a signal.
    """
    method = loaded.method
    if not isinstance(method, UNetRegression):
        raise UsageError(
            f"{loaded.name} cannot be adapted to a slide; leave out --adapt, or use unet or corrdiff"
        )
    deadline = time.monotonic() + 60 * minutes
    given = _quick(loaded)
    slide = Slide.of(make(given, None), seed)
    job = with_denoised(make(given, slide.kept), progress)
    before = Candidate("unadapted", loaded, slide.loss(job), 0)
    found = [before]
    tuned = replace(given, method=copy.deepcopy(method))
    tuned.method.config = given.method.config
    schedule = TUNE if steps is None else replace(TUNE, steps=steps)
    runs = [("adapted", replace(job, loaded=tuned), schedule)]
    if steps is None and len(slide.kept) >= LEAST_SPOTS_FRESH:
        fresh = make(_fresh(given, job, seed), slide.kept)
        runs.append(("trained on this slide alone", replace(fresh, counts=job.counts), FRESH))
    for name, start, how in runs:
        found.append(Training(start, slide, how, seed).run(name, deadline, progress, interruption))
    best = min(found, key=lambda candidate: candidate.loss)
    record = {
        "kept": best.name,
        "reserved_spots": len(slide.reserved),
        "loss_of_reserved_spots": {each.name: round(each.loss, 5) for each in found},
        "steps": {each.name: each.steps for each in found},
    }
    change = before.loss - best.loss
    note = (
        f"{len(slide.reserved)} reserved spots are predicted best by the model {best.name} "
        f"(Poisson loss per count {best.loss:.4f}, {change:.4f} less than unadapted)"
        if best is not before
        else f"the model was not adapted: {len(slide.reserved)} reserved spots are predicted best without"
    )
    kept = loaded if best is before else _with_views(best.loaded, loaded)
    return Adapted(kept, record, note)


@dataclass(frozen=True)
class Slide:
    """The spots of a section, divided into those to learn from and reserved ones.

    Parameters
    ----------
    kept, reserved
        Indices of the section's spots.
    tiles
        Tiles in which reserved spots are predicted.
    scored
        Which of the job's genes are scored.
    """

    kept: np.ndarray
    reserved: np.ndarray
    tiles: list[Tile]
    scored: np.ndarray

    @classmethod
    def of(cls, everything: SuperresJob, seed: int) -> Slide:
        """Reserve spots that lie wholly inside tiles, from a job that uses all spots.

        Raises
        ------
        UsageError
            If there are too few.
        """
        measurement, seeing = everything.measurement, everything.spots
        if measurement is None or measurement.spots < LEAST_SPOTS:
            raise UsageError(
                f"adaptation needs at least {LEAST_SPOTS} spots; leave out --adapt, or set it to off"
            )
        rng = np.random.default_rng([seed, 1])
        needs = everything.requirements
        bands = plan(everything.grid, needs.tile_lr, 0, needs.lr_um)
        tiles = [tile for band in bands for tile in band]
        considered: list[int] = []
        used = []
        for number in rng.permutation(len(tiles)):
            inside = np.setdiff1d(spots_inside(everything, tiles[number]), considered)
            if len(inside):
                considered.extend(inside.tolist())
                used.append(tiles[number])
            if len(considered) >= _MOST_CONSIDERED:
                break
        count = max(1, round(RESERVED * len(considered)))
        reserved = np.sort(rng.choice(np.array(considered), count, replace=False))
        kept = np.setdiff1d(np.arange(len(seeing)), reserved)
        assert everything.counts is not None
        totals = np.asarray(everything.counts.spots.select(everything.genes).sum(0)).ravel()
        scored = np.sort(np.argsort(-totals, kind="stable")[:SCORED_GENES])
        return cls(seeing[kept], seeing[reserved], used, scored)

    def loss(self, job: SuperresJob) -> float:
        """Poisson loss per count of the reserved spots, predicted from the spots that the job uses."""
        job = replace(
            job, genes=[job.genes[index] for index in self.scored], mixtures=job.mixtures[self.scored]
        )
        spots = job.section.spots
        assert spots is not None and job.counts is not None
        over = spots.take(self.reserved).measurement(job.grid)
        counts = spots.select(job.genes)[self.reserved].toarray().astype(np.float64)
        predicted = np.zeros(counts.shape)
        assigned = np.zeros(len(self.reserved), bool)
        method: Any = job.loaded.method
        panel, field = _field(job, list(method.panel)), _field(job, job.genes)
        was = method.training
        method.eval()
        with torch.inference_mode():
            for tile in self.tiles:
                matrix, rows = _inside(over.matrix, job.grid.shape, tile)
                rows = rows[~assigned[rows]]
                if not len(rows):
                    continue
                assigned[rows] = True
                window = tile.of(job.grid)
                seen = method.completed(panel.batch(window).to(job.loaded.device))
                factors = method.condition(seen)
                batch = method.completed(field.batch(window, seen.image, seen.features).to(job.loaded.device))
                maps = _expected(method, batch, factors)  # (g, bins)
                predicted[rows] = matrix[rows] @ maps.T.cpu().numpy().astype(np.float64)
        method.train(was)
        rate = np.maximum(predicted[assigned], _LEAST_COUNTS)
        seen_counts = counts[assigned]
        return float((rate - seen_counts * np.log(rate)).sum() / max(seen_counts.sum(), 1))


class Training:
    """Trains a method on the spots of one slide.

    Parameters
    ----------
    job
        Uses the spots to learn from; its method is trained in place.
    slide
        The reserved spots.
    schedule
        Steps and learning rate.
    seed
        Of tiles, visible spots and genes.
    """

    def __init__(self, job: SuperresJob, slide: Slide, schedule: Schedule, seed: int):
        assert job.counts is not None and job.measurement is not None
        self.job, self.slide, self.schedule = job, slide, schedule
        self.rng = np.random.default_rng([seed, 2])
        self.method: Any = job.loaded.method
        panel = list(self.method.panel)
        self.counts = job.counts.spots.select(panel)[job.spots].toarray().astype(np.float32)  # (spots, p)
        self.learned = np.flatnonzero(self.counts.sum(0) > 0)
        number = job.measurement.spots
        self.visible = [self.rng.random(number) < VISIBLE for _ in range(_REALISATIONS)]
        self.fields = [_field(job, panel, seen) for seen in self.visible]
        whole = job.measurement.bins_seen
        self.usable = np.flatnonzero(whole > 0.99 * np.median(whole))

    def run(self, name: str, deadline: float, progress: Progress, interruption: Interruption) -> Candidate:
        """Train until the last step or the deadline; gives the weights that predicted reserved spots best."""
        torch.manual_seed(int(self.rng.integers(2**31)))
        schedule, method = self.schedule, self.method
        optimiser = torch.optim.AdamW(method.parameters(), lr=schedule.learning_rate, weight_decay=0.01)
        best, best_loss, best_step = copy.deepcopy(method), math.inf, 0
        for step in range(schedule.steps):
            for group in optimiser.param_groups:
                group["lr"] = _rate(schedule, step)
            method.train()
            optimiser.zero_grad(set_to_none=True)
            for _ in range(schedule.tiles):
                (self._tile_loss() / schedule.tiles).backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimiser.step()
            late = time.monotonic() > deadline
            if (step + 1) % schedule.check_every == 0 or step + 1 == schedule.steps or late:
                loss = self.slide.loss(self.job)
                if loss < best_loss:
                    best, best_loss, best_step = copy.deepcopy(method), loss, step + 1
            progress(step + 1, schedule.steps, f"adapting: {name}")
            interruption.stop()
            if late:
                break
        best.eval()
        return Candidate(name, replace(self.job.loaded, method=best), best_loss, best_step)

    def _tile_loss(self) -> torch.Tensor:
        """Poisson loss per spot and gene of one random tile, seen in a random orientation."""
        job, rng = self.job, self.rng
        assert job.measurement is not None
        realisation = int(rng.integers(_REALISATIONS))
        tile = self._tile()
        matrix, rows = _inside(job.measurement.matrix, job.grid.shape, tile)
        device = job.loaded.device
        batch = self.method.completed(self.fields[realisation].batch(tile.of(job.grid)).to(device))
        factors = self.method.oriented(batch, int(rng.integers(8)))
        genes = np.sort(rng.choice(self.learned, min(_GENES_PER_STEP, len(self.learned)), replace=False))
        part = batch.of_genes(torch.as_tensor(genes, device=device))
        log_rate = self.method.log_rate(part, factors)[0].flatten(1)  # (g, bins)
        over = torch.from_numpy(matrix[rows].toarray()).to(log_rate)  # (spots, bins)
        rate = (over @ log_rate.exp().T).clamp_min(_LEAST_COUNTS)  # (spots, g)
        counts = torch.from_numpy(self.counts[rows][:, genes]).to(rate)
        weight = np.where(self.visible[realisation][rows], 1.0, HIDDEN_WEIGHT)
        weights = torch.from_numpy(weight).to(rate)[:, None]
        loss = (weights * (rate - counts * rate.log())).sum() / weights.sum()
        return loss / len(genes)

    def _tile(self) -> Tile:
        """A random tile that holds a random spot."""
        job, needs = self.job, self.job.requirements
        assert job.measurement is not None
        per_lr = needs.per_lr
        side = [min(_TILE_LR, size // per_lr) for size in job.grid.shape]
        while True:
            spot = int(self.rng.choice(self.usable))
            x, y = job.measurement.centres_um[spot]
            place = [
                int((at - start) // (job.grid.bin_um * per_lr))
                for at, start in ((y, job.grid.y0_um), (x, job.grid.x0_um))
            ]
            first = [
                int(np.clip(at - self.rng.integers(count), 0, size // per_lr - count))
                for at, count, size in zip(place, side, job.grid.shape, strict=True)
            ]
            tile = Tile(first[0] * per_lr, first[1] * per_lr, side[0] * per_lr, side[1] * per_lr)
            if len(_inside(job.measurement.matrix, job.grid.shape, tile)[1]):
                return tile


def spots_inside(job: SuperresJob, tile: Tile) -> np.ndarray:
    """Spots of a job's measurement that lie wholly inside a tile, by index."""
    assert job.measurement is not None
    return _inside(job.measurement.matrix, job.grid.shape, tile)[1]


def _inside(matrix: sp.csr_matrix, shape: tuple[int, int], tile: Tile) -> tuple[sp.csr_matrix, np.ndarray]:
    """The measurement (spots, bins of the tile), and the spots that lie wholly inside the tile."""
    bins = np.arange(shape[0] * shape[1]).reshape(shape)
    within = bins[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width].ravel()
    part = matrix[:, within]
    seen = np.asarray(part.sum(1)).ravel()
    whole = np.asarray(matrix.sum(1)).ravel()
    return part, np.flatnonzero((seen > 0.5) & (seen >= 0.999 * whole))


def _field(job: SuperresJob, genes: list[str], seen: np.ndarray | None = None) -> Field:
    """The raster of some genes, of all spots of the job or of some."""
    needs = job.requirements
    assert job.measurement is not None and job.counts is not None
    rows = np.arange(job.measurement.spots) if seen is None else np.flatnonzero(seen)
    lr, mask = job.measurement.of_spots(rows).raster(job.counts.inputs(genes, job.spots[rows]), needs.lr_um)
    panel = genes == list(job.loaded.method.panel)
    mixed = np.eye(len(genes), dtype=np.float32) if panel else job.mixtures
    image = job.section.image or White()
    known, base = job.counts.measures(genes), job.counts.kriged(genes, job.spots[rows])
    return Field(
        job.grid, image, lr, mask, mixed, genes, needs.image_um, needs.lr_um, known, job.features, base
    )


def _expected(method: Any, batch: Batch, factors: torch.Tensor) -> torch.Tensor:
    """Expected counts (g, bins), some genes at a time."""
    parts = [
        method.log_rate(batch.of_genes(chosen), factors)[0].exp().flatten(1)
        for chosen in torch.arange(len(batch.names)).split(64)
    ]
    return torch.cat(parts)


def _fresh(given: Loaded, job: SuperresJob, seed: int) -> Loaded:
    """A U-Net with new weights for the job's genes, reading what the image resolves."""
    assert job.counts is not None and job.measurement is not None
    spots = job.counts.spots
    totals = np.asarray(spots.select(job.genes).sum(0)).ravel()
    order = np.argsort(-totals, kind="stable")[:FRESH_GENES]
    panel = tuple(job.genes[index] for index in np.sort(order) if totals[index] > 0)
    image = job.section.image
    assert image is not None
    image_um = next((um for um in (2.0, 4.0) if image.um_per_px <= 1.25 * um), 10.0)
    torch.manual_seed(seed)
    lr, mask = job.measurement.raster(spots.select(panel)[job.spots], given.method.requirements.lr_um)
    config = RegressionConfig(image_um=image_um, views=1)
    method = channels_last(UNetRegression(config, panel, lr_mean(lr, mask)).to(given.device)).eval()
    return replace(given, method=method, name="unet", model="this slide", digest=None, features={})


def _rate(schedule: Schedule, step: int) -> float:
    part = step / max(schedule.steps, 1)
    warm = min(1.0, (step + 1) / 20)
    return schedule.learning_rate * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2)


def _quick(loaded: Loaded) -> Loaded:
    """With one orientation of each tile instead of eight, which is fast enough to predict often."""
    method: Any = copy.copy(loaded.method)
    method.config = replace(method.config, views=1)
    return replace(loaded, method=method)


def _with_views(best: Loaded, given: Loaded) -> Loaded:
    """With the orientations of the given model."""
    method: Any = best.method
    views: Any = given.method.config
    method.config = replace(method.config, views=views.views)
    return best
