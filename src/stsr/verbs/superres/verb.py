"""superres(): predict gene maps from a section's spots and image, and write them into its store."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stsr import checkpoint
from stsr.device import resolve_device
from stsr.errors import UsageError
from stsr.files import disk_errors
from stsr.progress import Progress, Report, silent
from stsr.signals import Interrupted, interruptible
from stsr.store import catalogue
from stsr.store.section import Section, open_section
from stsr.store.workspace import Workspace
from stsr.verbs.superres.adaptation import OFF, Adapted, adaptable, wanted_adaptation
from stsr.verbs.superres.adaptation import adapt as adapt_model
from stsr.verbs.superres.features import with_features
from stsr.verbs.superres.job import SuperresJob, check_included, make_job, notes_on_result
from stsr.verbs.superres.loading import Loaded, configure_sampling, load
from stsr.verbs.superres.loop import write_maps
from stsr.verbs.superres.spots import AUTO, with_denoised


@dataclass(frozen=True)
class Superres:
    """What `superres` wrote."""

    store: Path
    """The store with the map: the section's own or a copy."""
    element: str
    """Name of the map."""
    spread: str | None
    """Name of the spread; None if it is not known."""
    genes: int
    """Number of genes."""
    consistency_error: float | None
    """Largest relative error of a gene, ``sum |map over spot - count| / sum count``, over the spots that lie entirely
    inside the map and its support; None if maps were not corrected or there is no such spot."""
    spots: str | None
    """What the method read: ``raw`` or ``denoised`` counts; None without spots."""
    consistency: str | None
    """What maps add up to: ``exact``, ``denoised`` or ``none``; None without spots."""
    seconds: float
    """Run time."""
    notes: list[str]
    """Remarks for the user."""


def superres(
    store: str | Path,
    *,
    scale: float = 10,
    genes: Sequence[str] | None = None,
    including: Sequence[str] = (),
    model: str | Path | None = None,
    method: str | None = None,
    samples: int | None = None,
    keep_samples: bool = False,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    use_lr: bool = True,
    spots: str = "auto",
    consistency: str = "auto",
    base: str = "auto",
    region: tuple[float, float, float, float] | None = None,
    name: str | None = None,
    output: str | Path | None = None,
    features: str | Path | None = None,
    adapt: str | int = "auto",
    adapt_minutes: float = 10.0,
    save_model: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Superres:
    """Super-resolve a section and write the maps into its store.

    Maps are zero outside the section's support: outside the H&E, outside tissue, and far from any spot. A store
    that has no labels ``support`` gets them with its first map.

    Parameters
    ----------
    store
        A section by `stsr.prepare`, or any SpatialData store with an H&E image.
    scale
        100 um / bin size: 10 gives bins of 10 um, 5 of 20 um. Coarser maps are sums of the model's own bins.
    genes
        Names, comma lists, ``@file`` or ``all``; by default the model's genes that were measured.
    including
        Genes that the map must contain, for example to draw them; checked before the work begins.
    model
        A checkpoint; the packaged default model if neither it nor ``method`` is given.
    method
        A method that needs no training (``bilinear``, ``bicubic``, ``kriged``) instead of a model.
    samples
        Samples of a diffusion model; with two or more, their spread is written too. The spread of other models follows
        from the errors that they made in training, without samples.
    keep_samples
        Write each sample as an image ``NAME_sample1``, ...; else `stsr.samples` draws them on request.
    steps, sampler, guidance
        How a diffusion model is sampled.
    use_lr
        False predicts from the image alone.
    spots
        What methods read of the spots: ``raw`` counts, or ``denoised`` ones (`stsr.spots.denoising`). ``auto``:
        denoised, unless the spots were simulated as sums of all counts.
    base
        What methods start from between spots: ``raster``, linear interpolation; or ``kriged`` log densities
        (`stsr.spots.kriging`). ``auto``: the raster, which models are trained with; kriged where the model is adapted
        to the slide.
    consistency
        What maps are made to add up to: ``exact``, the measured counts of the spots; ``denoised``, their expected
        counts; ``smooth``, their expected counts in the mean of neighbouring spots; ``none``. ``auto``: exact for spots
        that were simulated as sums, else none, because a map that agrees with noisy counts copies their noise.
    region
        (x0, y0, x1, y1), um: write only the 100 um pixels that touch it. The map equals the same area of the map of the
        whole section.
    name
        Name of the element; ``superres_x{scale}`` by default.
    output
        Another store: a copy of the section with the result. The section itself by default.
    features
        The encoder or the array of patch features, for a model that was trained with features; by default the
        section's cached ones. They are computed once and cached in the section.
    adapt
        ``auto`` or a number of steps: train the model on the slide's own spots first, and keep it if it predicts
        reserved spots better (`stsr.verbs.superres.adaptation`). ``auto`` does so where enough spots were measured, and
        trains a model from nothing beside it if there are many. ``off`` uses the model as it is.
    adapt_minutes
        Adaptation begins no new step after this time.
    save_model
        Write the model that was kept to this file.
    seed
        The same seed gives the same maps.
    device
        ``auto``, ``cpu``, ``cuda[:n]`` or ``mps``.
    overwrite
        Replace earlier results of that name.
    progress
        Called with (done, total, label).
    report
        Called with lines for the user: an estimate of time and memory, and notes.

    Raises
    ------
    UsageError
        If the request does not fit the section or model: an unknown gene, a scale that does not nest, missing
        spots.
    StsrError
        If the section lacks what the model needs, the model is damaged, or the store cannot be written to.
    """
    began = time.monotonic()
    section = open_section(store)
    _check_output(section, output)
    loaded = load(model, method, section, use_lr=use_lr, device=resolve_device(device))
    configure_sampling(loaded.method, steps=steps, sampler=sampler, guidance=guidance)
    report, progress = report or silent, progress or silent
    wished = wanted_adaptation(adapt)

    def make(
        method: Loaded,
        start: str = base,
        kept: np.ndarray | None = None,
        chosen: Sequence[str] | None = None,
    ) -> SuperresJob:
        return make_job(
            section,
            method,
            scale=scale,
            genes=chosen or genes,
            samples=samples if method is loaded or method.method.samples or keep_samples else None,
            keep_samples=keep_samples,
            use_lr=use_lr,
            spots=spots,
            consistency=consistency,
            base=start,
            region=region,
            name=name,
            seed=seed,
            kept=kept,
        )

    job = make(loaded)
    check_included(including, job.genes)
    for note in job.notes:
        report(note)
    job = with_features(job, features, overwrite=overwrite, progress=progress, report=report)
    adapts = wished != OFF and (wished != AUTO or adaptable(job))
    if save_model is not None and not adapts:
        raise UsageError("no model is adapted here, so there is none for --save-model to keep; leave it out")
    if adapts:
        steps = None if wished == AUTO else int(wished)
        with interruptible() as interruption:
            found = adapt_model(
                loaded,
                lambda *asked: replace(make(*asked), features=job.features),
                section.spots if use_lr else None,
                base=base,
                steps=steps,
                minutes=adapt_minutes,
                seed=seed,
                progress=progress,
                interruption=interruption,
            )
        report(found.note)
        job = replace(make(found.loaded, found.base), features=job.features)
        job = replace(
            job,
            provenance={**job.provenance, "adaptation": found.record},
            notes=[*job.notes, found.note],
        )
        if save_model is not None:
            _save(found, save_model, job)
    job = with_denoised(job, progress)
    with interruptible() as interruption, _destination(section.path, output) as target:
        error = write_maps(
            replace(job, store=target),
            overwrite=overwrite,
            progress=progress,
            report=report,
            interruption=interruption,
        )
    remarks = notes_on_result(job)
    for remark in remarks:
        report(remark)
    return Superres(
        store=target,
        element=job.element,
        spread=job.spread,
        genes=len(job.genes),
        consistency_error=error,
        spots=None if job.counts is None else job.counts.read,
        consistency=None if job.counts is None else job.counts.consistency,
        seconds=time.monotonic() - began,
        notes=job.notes + remarks,
    )


def _save(found: Adapted, path: str | Path, job: SuperresJob) -> None:
    """Write an adapted model, with what it was adapted to."""
    provenance = {
        "trained_on": job.section.name,
        "adapted_from": job.provenance.get("model"),
        "adaptation": job.provenance["adaptation"],
        "base": found.base,
    }
    checkpoint.save(path, found.loaded.method, found.loaded.name, provenance)


def _check_output(section: Section, output: str | Path | None) -> None:
    """Refuse an output path that holds something else, before any work."""
    if output is None or Path(output).resolve() == section.path:
        return
    target = Path(output).resolve()
    if target.is_relative_to(section.path):
        raise UsageError(f"{output} lies inside {section.path.name}; choose another --output")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}; make it, or choose another --output")
    if not os.path.lexists(target):
        return
    if not catalogue.is_store(target):
        raise UsageError(f"{output} exists and is not a section store; choose another --output")
    if _measured(target) != _measured(section.path):
        raise UsageError(
            f"{output} exists and holds another section than {section.path.name}; choose another --output"
        )


def _measured(store: Path) -> dict:
    """The identity of a section: its elements that are not results, with their provenance and attributes."""
    found = catalogue.Catalogue(store)
    kept = [name for name in found.elements if not catalogue.is_result(found.provenance.get(name, {}))]
    return {name: (found.provenance.get(name), found.attributes_of(name)) for name in kept}


@contextmanager
def _destination(section: Path, output: str | Path | None) -> Iterator[Path]:
    """The store to write to: the section's own, or a copy, removed again if the run fails before it has a map."""
    if output is None or Path(output).resolve() == section:
        yield section
        return
    target = Path(output).resolve()
    fresh = not target.exists()  # else an earlier run's copy; its maps are guarded by --overwrite
    if fresh:
        with disk_errors(target), Workspace(target, "copy") as work:
            work.wipe()
            shutil.copytree(section, work.new)
            os.rename(work.new, target)
    try:
        yield target
    except (Interrupted, KeyboardInterrupt, SystemExit):
        raise  # the same command continues in the copy
    except BaseException:
        if fresh:
            shutil.rmtree(target, ignore_errors=True)
        raise
