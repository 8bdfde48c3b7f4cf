"""evaluate(): predict spots that were hidden, in every way of making maps, and say which way to use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stsr.device import resolve_device
from stsr.errors import StsrError, UsageError
from stsr.genes import wanted_genes
from stsr.methods.regression import UNetRegression
from stsr.progress import Progress, Report, silent
from stsr.signals import interruptible
from stsr.store.parts import Spots
from stsr.store.section import Section, open_section
from stsr.verbs.evaluate.folds import blocks, in_blocks, scattered
from stsr.verbs.evaluate.hiding import Hiding
from stsr.verbs.evaluate.scores import Bootstrap, Sums, slope
from stsr.verbs.evaluate.verdict import sentence
from stsr.verbs.evaluate.ways import KRIGED, Way, ways_of
from stsr.verbs.superres.loading import load, of_views

GENES = 200
"""Genes that are scored by default: those of the model with the most counts in the spots."""

SCATTERED, BLOCKS = "scattered", "blocks"
_LEAST_SPOTS = 10


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    section: str
    """Name of the section."""
    spots: int
    """Number of spots that were hidden in turn."""
    genes: int
    """Number of scored genes."""
    folds: int
    """Number of folds."""
    ways: pd.DataFrame
    """A row per way and kind of hiding (``hidden``: ``scattered`` or ``blocks``): mean over genes of ``pcc`` and
    ``deviance_explained`` with 95 % intervals (``_low``, ``_high``), their ``gain`` over kriged spots,
    and the median calibration ``slope``."""
    per_gene: pd.DataFrame
    """A row per way, kind of hiding and gene: ``pcc``, ``deviance_explained``, ``slope``, and whether it is ``ahead``
    of kriged spots beyond chance."""
    best: str
    """The way to use."""
    options: str
    """Options of ``stsr superres`` for it."""
    verdict: str
    """The finding in a sentence."""
    seconds: float
    """Run time."""


def evaluate(
    store: str | Path,
    *,
    model: str | Path | None = None,
    genes: Sequence[str] | None = None,
    folds: int = 5,
    image: bool = True,
    adapt_steps: int = 0,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Predict hidden spots of a section from the other spots and the H&E, and score every way of making maps.

    In turn, each fold of the spots is hidden, maps are made from the others, and summed over the hidden spots. Hidden
    are scattered spots, which have visible neighbours, and blocks of 5 x 5 spots, which test what the image adds.
    Counts of hidden spots never take part, not even in denoising. Nothing is written into the store. The network sees
    one orientation of each tile, where `superres` averages eight.

    Parameters
    ----------
    store
        A section with measured spots.
    model
        A checkpoint to compare with interpolation; the packaged model by default.
    genes
        Names, comma lists, ``@file`` or ``all``; by default at most 200 genes of the model with the most counts.
    folds
        Number of folds, at least 2.
    image
        False compares interpolations only.
    adapt_steps
        Also compare the model adapted to the visible spots of each fold by this many steps, as ``superres --adapt``
        does; 0 leaves it out, which is much faster.
    seed
        Of the folds and resamples.
    device
        ``auto``, ``cpu``, ``cuda[:n]`` or ``mps``.
    progress
        Called with (done, total, label).
    report
        Called with lines for the user.

    Raises
    ------
    UsageError
        If there are no spots, too few for the folds, or a gene is unknown.
    StsrError
        If the section lacks what the model needs, or counts are not raw.
    """
    began = time.monotonic()
    progress, report = progress or silent, report or silent
    section = open_section(store)
    spots = _checked(section, folds)
    ways, panel = _ways(section, model, image=image, adapt_steps=adapt_steps, device=device)
    chosen = _genes(spots, panel, genes)
    hidden_in = {
        SCATTERED: scattered(len(spots.centres_um), folds, seed),
        BLOCKS: in_blocks(spots.centres_um, spots.pitch_um, folds, seed),
    }
    counts = spots.select(chosen).toarray().astype(float)
    with interruptible() as interruption:
        predicted = _predicted(Hiding(section, chosen, ways, seed, interruption), hidden_in, progress)
    scored = [_scored(kind, ways, predicted[kind], counts, spots, chosen, seed) for kind in hidden_in]
    table = pd.concat([summary for summary, _ in scored], ignore_index=True)
    best, verdict = sentence(table, section.name)
    report(verdict)
    return Evaluation(
        section=section.name,
        spots=len(counts),
        genes=len(chosen),
        folds=folds,
        ways=table,
        per_gene=pd.concat([rows for _, rows in scored], ignore_index=True),
        best=best,
        options=next(way.options for way in ways if way.label == best),
        verdict=verdict,
        seconds=time.monotonic() - began,
    )


def _checked(section: Section, folds: int) -> Spots:
    spots = section.spots
    if spots is None:
        raise UsageError(f"{section.path.name} has no measured spots to hide; evaluate needs them")
    if folds < 2:
        raise UsageError(f"--folds must be at least 2, not {folds}")
    if len(spots.centres_um) < max(_LEAST_SPOTS, 2 * folds):
        raise UsageError(
            f"{section.path.name} has {len(spots.centres_um)} spots; hiding {folds} folds needs at least "
            f"{max(_LEAST_SPOTS, 2 * folds)}"
        )
    return spots


def _ways(
    section: Section, model: str | Path | None, *, image: bool, adapt_steps: int, device: str
) -> tuple[list[Way], tuple[str, ...]]:
    """The ways to compare, and the panel of the model; without an H&E there is no model."""
    where = resolve_device(device)
    if adapt_steps < 0:
        raise UsageError(f"--adapt is a number of steps, or 0, not {adapt_steps}")
    bilinear, kriged = (
        load(None, name, section, use_lr=True, device=where) for name in ("bilinear", "kriged")
    )
    if not image:
        return ways_of(bilinear, kriged, None, ""), ()
    if section.image is None:
        if model is not None:
            raise StsrError(
                f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE, or leave out --model"
            )
        return ways_of(bilinear, kriged, None, ""), ()
    loaded = of_views(load(model, None, section, use_lr=True, device=where), 1)
    options = "" if model is None else f"--model {model}"
    if adapt_steps and not isinstance(loaded.method, UNetRegression):
        raise UsageError(
            f"{loaded.name} cannot be adapted to a slide; leave out --adapt, or use unet or corrdiff"
        )
    return ways_of(bilinear, kriged, loaded, options, adapt_steps), loaded.method.requirements.panel


def _predicted(
    hiding: Hiding, hidden_in: dict[str, np.ndarray], progress: Progress
) -> dict[str, list[np.ndarray]]:
    """Counts (spots, g) of each way, by the kind of hiding; every spot is predicted while it is hidden."""
    total, done = sum(len(np.unique(fold)) for fold in hidden_in.values()), 0
    predicted = {}
    for kind, fold in hidden_in.items():
        predicted[kind] = [np.full((len(fold), len(hiding.genes)), np.nan) for _ in hiding.ways]
        for number in np.unique(fold):
            progress(done, total, "predicting hidden spots")
            hidden = np.flatnonzero(fold == number)
            for values, found in zip(predicted[kind], hiding.predict(hidden), strict=True):
                values[hidden] = found
            done += 1
    progress(done, total, "predicting hidden spots")
    return predicted


def _genes(spots: Spots, panel: tuple[str, ...], genes: Sequence[str] | None) -> list[str]:
    """The genes to score, most counts first unless they are named."""
    totals = dict(zip(spots.genes, np.asarray(spots.counts.sum(0)).ravel(), strict=True))
    if genes is not None:
        chosen = wanted_genes(genes, spots.genes, panel)
        counted = [gene for gene in chosen if totals.get(gene, 0) > 0]
        if not counted:
            raise UsageError("none of these genes has counts in the spots; choose others")
        return counted
    known = [gene for gene in panel if totals.get(gene, 0) > 0] or [
        gene for gene, total in totals.items() if total > 0
    ]
    return sorted(known, key=lambda gene: (-totals[gene], gene))[:GENES]


def _scored(
    kind: str,
    ways: list[Way],
    predicted: list[np.ndarray],
    counts: np.ndarray,
    spots: Spots,
    genes: list[str],
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the ways, and of each gene, over the spots that maps cover."""
    seen = np.isfinite(predicted[0]).all(1)
    block = np.unique(blocks(spots.centres_um[seen], spots.pitch_um), return_inverse=True)[1]
    sums = [Sums.of(values[seen], counts[seen], block) for values in predicted]
    plain = sums[[way.label for way in ways].index(KRIGED)]
    draws = Bootstrap(int(block.max(initial=-1)) + 1, seed)
    summary, rows = [], []
    for way, own, values in zip(ways, sums, predicted, strict=True):
        slopes = slope(values[seen], counts[seen])
        row: dict[str, object] = {"way": way.label, "hidden": kind, "options": way.options}
        for score in ("pcc", "deviance_explained"):
            for name, found in (
                (score, draws.mean(own, score)),
                (f"{score}_gain", draws.difference(own, plain, score)),
            ):
                row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        row["slope"] = float(np.nanmedian(slopes)) if np.isfinite(slopes).any() else np.nan
        summary.append(row)
        rows.append(
            pd.DataFrame(
                {
                    "way": way.label,
                    "hidden": kind,
                    "gene": genes,
                    "counts": counts.sum(0),
                    "pcc": own.pcc(),
                    "deviance_explained": own.deviance_explained(),
                    "slope": slopes,
                    "ahead": draws.genes_ahead(own, plain),
                }
            )
        )
    return pd.DataFrame(summary), pd.concat(rows, ignore_index=True)
