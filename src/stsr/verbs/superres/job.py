"""What one run of superres is to do, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.genes import wanted_genes
from stsr.geometry.grid import LR_UM, Grid
from stsr.geometry.measurement import Measurement
from stsr.methods import method_class
from stsr.methods.method import Method
from stsr.store import names
from stsr.store.section import Section
from stsr.verbs.superres.mixtures import mixtures
from stsr.version import __version__

DEFAULT_SAMPLES = 4


@dataclass(frozen=True)
class Loaded:
    """A method and where it comes from."""

    method: Method
    name: str
    model: str
    digest: str | None
    device: torch.device


@dataclass(frozen=True)
class Task:
    """Everything decided before the work begins."""

    section: Section
    loaded: Loaded
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
        """The bins that are written."""
        return self.grid.at(self.grid.bin_um * self.factor)


def check_included(including: Sequence[str], genes: list[str]) -> None:
    """Refuse genes that the map will not have.

    Raises
    ------
    UsageError
        Naming the first of them.
    """
    there = set(genes)
    for gene in including:
        if gene not in there:
            raise UsageError(f"{gene!r} is not among the {len(genes)} genes of this map; add it to --genes")


def load(model, method: str | None, section: Section, use_lr: bool, device: torch.device) -> Loaded:
    """The method to use: of a checkpoint, the packaged one, or one that needs no training.

    Raises
    ------
    UsageError
        If both are asked for, the method has to be trained, or it needs spots that are not there.
    StsrError
        If the checkpoint is missing or damaged.
    """
    if model is not None and method is not None:
        raise UsageError("--model and --method exclude each other: a model knows its method")
    if method is None:
        path = checkpoint.default_weights() if model is None else Path(model)
        loaded = checkpoint.load(path, device)
        label = "default" if model is None else path.name
        # channels_last is twice as fast on CPUs, and on tensor cores.
        fast = loaded.method.to(memory_format=torch.channels_last)
        return Loaded(fast, loaded.name, label, loaded.digest, device)
    chosen = method_class(method)
    if chosen.learns:
        raise UsageError(
            f"{method} has to be trained: stsr train SECTION --method {method} -o m.safetensors, then --model"
        )
    if section.spots is None or not use_lr:
        raise UsageError(f"{method} needs measured spots and {section.path.name} gives none; use a model")
    return Loaded(chosen(panel=tuple(section.spots.genes)).eval(), method, method, None, device)


def configure_sampling(method: Method, steps, sampler, guidance) -> None:
    """Set how a diffusion method samples; what is None stays as the method has it.

    Raises
    ------
    UsageError
        If the method does not sample, or a value is impossible.
    """
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


def make_task(section, loaded, scale, genes, samples, use_lr, consistency, region, name, seed) -> Task:
    """Decide and check everything; arguments are those of `stsr.superres`.

    Raises
    ------
    UsageError, StsrError
        As `stsr.superres`.
    """
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
            f"{plural(outside, 'gene')} not in the model's panel: inferred like panel genes with similar spots"
        )
    count = _samples(samples, method)
    element = names.check_name(name or names.superres_name(scale))
    sampling = asdict(method.sampling) if method.samples else {}
    provenance = {
        "command": "superres",
        "origin": "predicted",
        "stsr": __version__,
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
    return Task(
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


def plural(number: int, noun: str) -> str:
    """``1 gene``, ``2 genes``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
