"""Prediction of one tile after another: expected counts, and their spread over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.errors import StsrError
from stsr.geometry.grid import add_up
from stsr.methods.batch import Batch
from stsr.verbs.superres.field import Field, White
from stsr.verbs.superres.job import SuperresJob
from stsr.verbs.superres.tiles import Canvas, Tile, plan

_GENES_AT_ONCE = 64  # per call of a method: bounds its activations


class Predictor:
    """A job's method on the tiles of its section.

    All inputs of a tile (raster, mean counts, image, noise) are cut from the whole section, so a tile's prediction
    does not depend on the requested region.
    """

    def __init__(self, job: SuperresJob):
        self.job = job
        panel = list(job.read_panel)
        self._panel = field_of(job, panel, np.eye(len(panel), dtype=np.float32), kriged=False)
        self._draws = len(job.predicted) > 1 or not job.loaded.method.knows_mean

    def field(self, genes: slice) -> Field:
        """The spots of some of the job's genes as a raster over the section."""
        return field_of(self.job, self.job.genes[genes], self.job.mixtures[genes])

    def levels(self, genes: slice) -> np.ndarray:
        """Mean counts (g,) per output bin of some of the job's genes in the section, or in training without spots."""
        field, method, needs = self.field(genes), self.job.loaded.method, self.job.requirements
        batch = method.completed(field.batch(self.job.grid.window(0, 0, needs.per_lr, needs.per_lr)))
        with torch.inference_mode():
            per_lr = method.scale(batch.to(self.job.loaded.device))[0].cpu().numpy()
        return per_lr * (self.job.factor / needs.per_lr) ** 2

    def tile(self, field: Field, tile: Tile) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Predict a tile, some of the field's genes at a time.

        Yields
        ------
        genes, maps
            Which genes, and their expected counts (g, height, width) in the method's bins; then, if the method
            samples, the spread of the samples, and those that are kept, (g, height / factor, width / factor) in
            output bins.

        Raises
        ------
        StsrError
            If the model gives NaN or infinite values.
        """
        job, method, device = self.job, self.job.loaded.method, self.job.loaded.device
        window = tile.of(job.grid)
        noises = [TileNoise(noise, ((tile.row, tile.column),)) for noise in _noises(job.seed, job.samples)]
        with torch.inference_mode():
            panel = method.completed(self._panel.batch(window).to(device))
            with _precision(device):
                features = method.condition(panel)
                drawn = [method.draw(panel, features, noise) for noise in noises] if self._draws else []
            batch = method.completed(field.batch(window, panel.image, panel.features).to(device))
            for start in range(0, len(batch.names), _GENES_AT_ONCE):
                part = slice(start, min(start + _GENES_AT_ONCE, len(batch.names)))
                genes = batch.of_genes(torch.arange(part.start, part.stop))
                mean, draws = self._predictions(genes, noises, features, drawn)
                maps = [mean]
                if len(job.predicted) > 1:
                    maps += [_spread(draws, mean, job.factor)] if job.spread else []
                    maps += [add_up(draw, job.factor) for draw in draws] if job.keeps_samples else []
                arrays = [values.cpu().numpy() for values in maps]
                if not all(np.isfinite(values).all() for values in arrays):
                    raise StsrError(
                        f"the model {job.loaded.model} produced NaN or infinite values; train it again"
                    )
                yield part, arrays

    def _predictions(
        self, genes: Batch, noises: list[TileNoise], features: Any, drawn: list[Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The expected counts (g, H, W), and the samples from which they or their spread are computed."""
        method = self.job.loaded.method
        if method.knows_mean:  # in full precision, because it is the map itself
            mean = method.mean(genes, features)
            return mean[0], [method.vary(genes, mean, one)[0] for one in drawn]
        pairs = zip(noises, drawn or [None] * len(noises), strict=True)
        with _precision(self.job.loaded.device):
            draws = [method.predict(genes, noise, features, one)[0].float() for noise, one in pairs]
        return reduce(torch.add, draws) / len(draws), draws


def _spread(draws: list[torch.Tensor], mean: torch.Tensor, factor: int) -> torch.Tensor:
    """Standard deviation of samples (g, H, W) of output bins; around the mean, so that float32 is accurate enough."""
    apart = [add_up(draw - mean, factor) for draw in draws]
    first = reduce(torch.add, apart) / len(apart)
    squares = reduce(torch.add, [one * one for one in apart]) - len(apart) * first * first
    return (squares / (len(apart) - 1)).clamp_min(0).sqrt()


def _noises(seed: int, samples: int) -> list[Noise]:
    """Samples in antithetic pairs: a pair's errors cancel to first order, so few samples average well."""
    return [Noise(seed, number // 2, 1.0 if number % 2 == 0 else -1.0) for number in range(samples)]


def _precision(device: torch.device) -> AbstractContextManager:
    """Half precision for networks on CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def field_of(
    job: SuperresJob,
    genes: list[str],
    mixed: np.ndarray,
    *,
    seen: np.ndarray | None = None,
    kriged: bool = True,
) -> Field:
    """The spots of some genes as a raster over the section of a job.

    Parameters
    ----------
    mixed
        (g, p) the genes as mixtures of panel genes.
    seen
        Which of the job's spots to use, (spots,) bool; all by default.
    kriged
        Whether the field has a base, if the job kriges its spots.
    """
    needs = job.requirements
    lr = mask = known = base = None
    if job.measurement is not None and job.counts is not None:
        rows = np.arange(job.measurement.spots) if seen is None else np.flatnonzero(seen)
        measurement, spots = job.measurement.of_spots(rows), job.spots[rows]
        lr, mask = measurement.raster(job.counts.inputs(genes, spots), needs.lr_um)
        known = job.counts.measures(genes)
        base = job.counts.kriged(genes, spots) if kriged else None
    image = job.section.image if job.sees_image and job.section.image is not None else White()
    return Field(
        job.grid, image, lr, mask, mixed, genes, needs.image_um, needs.lr_um, known, job.features, base
    )


def predicted_maps(job: SuperresJob, genes: slice, stop: Callable[[], None]) -> np.ndarray:
    """Expected counts (g, height, width) of some of the job's genes over its whole grid, held in memory.

    For verbs that score maps without writing them: neither corrected nor set to zero outside the support.

    Parameters
    ----------
    stop
        Called after each tile; may raise to end early.
    """
    needs, predictor = job.requirements, Predictor(replace(job, samples=1))
    bands = plan(job.grid, needs.tile_lr, needs.overlap_lr, needs.lr_um)
    field, count = predictor.field(genes), len(job.genes[genes])
    canvas = Canvas(count, bands, needs.per_lr)
    maps = np.zeros((count, *job.grid.shape), np.float32)
    for number, band in enumerate(bands):
        for tile in band:
            for part, (values, *_) in predictor.tile(field, tile):
                canvas.add(tile, values, part)
            stop()
        for row, block in canvas.finished(number):
            maps[:, row : row + block.shape[1], canvas.left : canvas.left + block.shape[2]] = block
    return maps
