"""Training on the spots of one slide, and the loss on spots that are reserved.

Some spots are reserved and never used. Of the others, a random part is visible to the network in each tile; the loss is
the Poisson likelihood of the raw counts of all of them, given the predicted map summed over each spot, and spots that
the network did not see weigh more. Spots teach nothing below their own size but what the image tells.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from stsr.errors import UsageError
from stsr.methods.batch import Batch
from stsr.progress import Progress
from stsr.signals import Interruption
from stsr.verbs.superres.job import SuperresJob
from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.predict import field_of
from stsr.verbs.superres.tiles import Tile, plan

RESERVED = 0.15
"""Share of the spots that is reserved to decide when to stop and what to keep."""

VISIBLE = 0.7
"""Share of the other spots that the network sees in a tile."""

HIDDEN_WEIGHT = 3.0
"""Weight in the loss of spots that the network does not see."""

LEAST_SPOTS = 60
"""Fewer spots cannot show whether an adapted model is better."""

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


@dataclass(frozen=True)
class Candidate:
    """A model, and its score on the reserved spots."""

    name: str
    loaded: Loaded
    loss: float
    steps: int


@dataclass(frozen=True)
class Slide:
    """The spots of a section, divided into those to learn from and reserved ones.

    Parameters
    ----------
    kept, reserved
        Indices of the section's spots.
    tiles
        Tiles in which reserved spots are predicted.
    """

    kept: np.ndarray
    reserved: np.ndarray
    tiles: list[Tile]

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
        return cls(seeing[kept], seeing[reserved], used)

    def loss(self, job: SuperresJob) -> float:
        """Poisson loss per count of the job's genes in the reserved spots, predicted from the job's spots."""
        spots = job.section.spots
        assert spots is not None and job.counts is not None
        over = spots.take(self.reserved).measurement(job.grid)
        counts = spots.select(job.genes)[self.reserved].toarray().astype(np.float64)
        predicted = np.zeros(counts.shape)
        assigned = np.zeros(len(self.reserved), bool)
        method: Any = job.loaded.method
        panel = field_of(job, list(job.read_panel), _each(job.read_panel), kriged=False)
        field = field_of(job, job.genes, job.mixtures)
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
        self.fields = [field_of(job, panel, _each(panel), seen=seen) for seen in self.visible]
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


def _each(panel: Sequence[str]) -> np.ndarray:
    """Panel genes as mixtures: each is itself."""
    return np.eye(len(panel), dtype=np.float32)


def _expected(method: Any, batch: Batch, factors: torch.Tensor) -> torch.Tensor:
    """Expected counts (g, bins), some genes at a time."""
    parts = [batch.of_genes(chosen) for chosen in torch.arange(len(batch.names)).split(64)]
    if method.knows_mean:
        return torch.cat([method.mean(part, factors)[0].flatten(1) for part in parts])
    return torch.cat([method.predict(part, None, factors)[0].flatten(1) for part in parts])


def _rate(schedule: Schedule, step: int) -> float:
    part = step / max(schedule.steps, 1)
    warm = min(1.0, (step + 1) / 20)
    return schedule.learning_rate * warm * (0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2)
