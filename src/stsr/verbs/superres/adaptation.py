"""Adaptation to a slide: train a model on the slide's own spots, and keep it if it predicts other spots better."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from stsr.errors import UsageError
from stsr.methods.batch import lr_mean
from stsr.methods.interpolation import Kriged
from stsr.methods.method import channels_last
from stsr.methods.regression import RegressionConfig, UNetRegression
from stsr.progress import Progress
from stsr.signals import Interruption
from stsr.store.parts import Spots
from stsr.verbs.superres.job import SuperresJob
from stsr.verbs.superres.loading import Loaded, of_views
from stsr.verbs.superres.own_spots import LEAST_SPOTS, Candidate, Schedule, Slide, Training
from stsr.verbs.superres.spots import AUTO, KRIGED, RASTER, with_denoised

Make = Callable[[Loaded, str, np.ndarray | None, Sequence[str]], SuperresJob]

OFF = "off"
ALONE = "trained on this slide alone"

TUNE = Schedule(steps=300, tiles=2, learning_rate=2e-4, check_every=50)
FRESH = Schedule(steps=300, tiles=8, learning_rate=1e-3, check_every=50)

LEAST_SPOTS_FRESH = 600
"""Fewer spots cannot teach a model from nothing."""

SCORED_GENES, LEAST_KNOWN_GENES = 200, 50
"""Genes with the most counts, by which models are compared: those of the given model, if it has enough of them."""

SMALLEST_SPOT_UM = 30.0
"""Smaller spots are bins, to which ``auto`` does not adapt."""

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
    base
        What the method starts from between spots, as ``base`` of `stsr.superres`.
    """

    loaded: Loaded
    record: dict[str, Any]
    note: str
    base: str


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
    """Whether ``auto`` adapts: a model that can be, and enough spots that carry noise of their own.

    Bins of Visium HD hold too few counts each; adaptation to them was not tried.
    """
    if job.counts is None or job.measurement is None or job.section.spots_are_sums:
        return False
    large = job.counts.spots.size_um >= SMALLEST_SPOT_UM
    return isinstance(job.loaded.method, UNetRegression) and large and job.measurement.spots >= LEAST_SPOTS


def adapt(
    loaded: Loaded,
    make: Make,
    spots: Spots | None,
    *,
    base: str,
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
        ``make(loaded, base, kept, genes)`` gives the job of a method that starts from this base, for some genes, and
        uses only some spots, by index, or all if None.
    spots
        Measured spots of the section.
    base
        As ``base`` of `stsr.superres`; ``auto`` is kriged.
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
    if spots is None:
        raise UsageError("adaptation needs measured spots, and there are none; leave out --adapt")
    deadline = time.monotonic() + 60 * minutes
    given = of_views(loaded, 1)
    scored, fresh_panel = _genes(spots, method.panel)
    slide = Slide.of(make(given, base, None, scored), seed)
    base = KRIGED if base == AUTO else base
    # Denoised for both models at once.
    every = with_denoised(make(given, base, slide.kept, [*scored, *fresh_panel]), progress)
    job = _sharing(make(given, base, slide.kept, scored), every)
    kriged = make(_kriging(given, spots), AUTO, slide.kept, scored)
    kriged = with_denoised(kriged, progress) if base == RASTER else _sharing(kriged, every)
    without = slide.loss(kriged)
    before = Candidate("unadapted", loaded, slide.loss(job), 0)
    found = [before]
    tuned = replace(given, method=copy.deepcopy(given.method))
    schedule = TUNE if steps is None else replace(TUNE, steps=steps)
    runs = [("adapted", replace(job, loaded=tuned), schedule)]
    if steps is None and len(slide.kept) >= LEAST_SPOTS_FRESH:
        fresh = make(_fresh(given, job, fresh_panel, seed), base, slide.kept, scored)
        runs.append((ALONE, _sharing(fresh, every), FRESH))
    for name, start, how in runs:
        found.append(Training(start, slide, how, seed).run(name, deadline, progress, interruption))
    return _outcome(found, without, len(slide.reserved), base)


def _outcome(found: list[Candidate], without: float, reserved: int, base: str) -> Adapted:
    """The candidate with the lowest loss; the first one is the given model, ``without`` the loss of kriged spots."""
    before, best = found[0], min(found, key=lambda candidate: candidate.loss)
    given: Any = before.loaded.method
    record = {
        "kept": best.name,
        "reserved_spots": reserved,
        "loss_of_reserved_spots": {
            **{each.name: round(each.loss, 5) for each in found},
            "kriged spots": round(without, 5),
        },
        "steps": {each.name: each.steps for each in found},
    }
    compared = (
        f"; kriged spots predict them better still ({without:.4f}), so this map is no better than --method kriged"
        if without < best.loss
        else f"; kriged spots, without image: {without:.4f}"
    )
    if best is before:
        note = (
            f"the model was not adapted: {reserved} reserved spots are predicted best without "
            f"(Poisson loss per count {best.loss:.4f}){compared}"
        )
        return Adapted(before.loaded, record, note, base)
    note = (
        f"{reserved} reserved spots are predicted best by the model {best.name} "
        f"(Poisson loss per count {best.loss:.4f}; unadapted {before.loss:.4f}){compared}"
    )
    if given.samples and not best.loaded.method.samples:
        note += "; it does not sample, so no spread is written"
    elif best.name == ALONE and best.loaded.method.dispersion is not None:
        note += "; its spread is that of the given model"
    kept = of_views(best.loaded, given.config.views)
    return Adapted(kept, record, note, base)


def _kriging(given: Loaded, spots: Spots) -> Loaded:
    """Kriging, which needs neither model nor image: what a model has to be better than."""
    config = Kriged.Config(bin_um=given.method.requirements.bin_um)
    return replace(
        given, method=Kriged(config, tuple(spots.genes)).eval(), name="kriged", model="kriged", base=AUTO
    )


def _sharing(job: SuperresJob, fitted: SuperresJob) -> SuperresJob:
    """With what another job has fitted to the same spots."""
    assert job.counts is not None and fitted.counts is not None
    return replace(job, counts=job.counts.sharing(fitted.counts))


def _genes(spots: Spots, panel: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """The genes by which models are compared, and the panel of a model from nothing.

    They do not depend on the genes that are asked for, so a gene's map does not either.
    """
    totals = np.asarray(spots.counts.sum(0)).ravel()
    # Mitochondrial genes have so many counts that they would decide alone.
    nuclear = np.array([not gene.upper().startswith("MT-") for gene in spots.genes])
    totals = np.where(nuclear, totals, 0)
    known = np.isin(np.array(spots.genes, str), np.array(panel, str)) & (totals > 0)
    order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    own = order[known[order]]
    scored = (own if len(own) >= LEAST_KNOWN_GENES else order)[:SCORED_GENES]
    half = FRESH_GENES // 2  # genes with many counts teach most; those of the panel are asked for most
    fresh = list(dict.fromkeys([*order[:half].tolist(), *own[:half].tolist(), *order.tolist()]))[:FRESH_GENES]
    return [spots.genes[index] for index in np.sort(scored)], tuple(
        spots.genes[index] for index in sorted(fresh)
    )


def _fresh(given: Loaded, job: SuperresJob, panel: tuple[str, ...], seed: int) -> Loaded:
    """A U-Net with new weights, reading what the image resolves."""
    assert job.counts is not None and job.measurement is not None
    spots, needs = job.counts.spots, given.method.requirements
    image = job.section.image
    assert image is not None
    image_um = next((um for um in (2.0, 4.0) if image.um_per_px <= 1.25 * um), needs.bin_um)
    torch.manual_seed(seed)
    lr, mask = job.measurement.raster(spots.select(panel)[job.spots], needs.lr_um)
    config = RegressionConfig(bin_um=needs.bin_um, image_um=image_um, views=1)
    method = channels_last(UNetRegression(config, panel, lr_mean(lr, mask)).to(given.device)).eval()
    if given.method.dispersion is not None:  # a slide without measured bins shows no errors below its spots
        method.set_dispersion(given.method.dispersion)
    return replace(given, method=method, name="unet", model="this slide", digest=None, features={})
