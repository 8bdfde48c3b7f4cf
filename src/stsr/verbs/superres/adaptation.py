"""Adaptation to a slide: train a model on the slide's own spots, and keep it if it predicts other spots better."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stsr.errors import UsageError
from stsr.methods.batch import lr_mean
from stsr.methods.method import channels_last
from stsr.methods.regression import RegressionConfig, UNetRegression
from stsr.progress import Progress
from stsr.signals import Interruption
from stsr.verbs.superres.job import SuperresJob
from stsr.verbs.superres.loading import Loaded, of_views
from stsr.verbs.superres.own_spots import LEAST_SPOTS, Candidate, Schedule, Slide, Training
from stsr.verbs.superres.spots import with_denoised

Make = Callable[[Loaded, np.ndarray | None], SuperresJob]

OFF, AUTO = "off", "auto"

TUNE = Schedule(steps=75, tiles=2, learning_rate=2e-4, check_every=25)
FRESH = Schedule(steps=300, tiles=8, learning_rate=1e-3, check_every=50)

LEAST_SPOTS_FRESH = 600
"""Fewer spots cannot teach a model from nothing."""

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
    given = of_views(loaded, 1)
    slide = Slide.of(make(given, None), seed)
    job = with_denoised(make(given, slide.kept), progress)
    before = Candidate("unadapted", loaded, slide.loss(job), 0)
    found = [before]
    tuned = replace(given, method=copy.deepcopy(given.method))
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
    kept = loaded if best is before else of_views(best.loaded, method.config.views)
    return Adapted(kept, record, note)


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
