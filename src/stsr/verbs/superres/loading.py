"""Load the method of a run: a checkpoint, the packaged model, or a method that needs no training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stsr import checkpoint
from stsr.errors import UsageError
from stsr.geometry.grid import LR_UM, raster_um
from stsr.methods import method_class
from stsr.methods.method import Method, channels_last
from stsr.store.section import Section
from stsr.verbs.superres.spots import AUTO


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A method and where it comes from."""

    method: Method
    """Ready to predict, on the device."""
    name: str
    """As in `stsr.methods.METHODS`."""
    model: str
    """The checkpoint's file name, ``default``, or the method's name if it needs no training."""
    digest: str | None
    """Of the checkpoint; None without one."""
    device: torch.device
    features: dict[str, Any] = field(default_factory=dict)
    """Patch features that a checkpoint was trained with; empty without."""
    base: str = AUTO
    """What ``auto`` means for the base of its maps: what an adapted model was trained with."""


def load(
    model: str | Path | None, method: str | None, section: Section, *, use_lr: bool, device: torch.device
) -> Loaded:
    """Load the method to use: from a checkpoint, the packaged one, or one that needs no training.

    Raises
    ------
    UsageError
        If both are given, the method has to be trained, or it needs spots and the section has none.
    StsrError
        If the checkpoint is missing or damaged.
    """
    if model is not None and method is not None:
        raise UsageError("--model and --method exclude each other: a model contains its method")
    if method is None:
        path = checkpoint.default_weights() if model is None else Path(model)
        loaded = checkpoint.load(path, device)
        label = "default" if model is None else path.name
        # channels_last is twice as fast on CPUs, and on tensor cores.
        fast = channels_last(loaded.method)
        return Loaded(
            method=fast,
            name=loaded.name,
            model=label,
            digest=loaded.digest,
            device=device,
            features=loaded.provenance.get("features") or {},
            base=loaded.provenance.get("base", AUTO),
        )
    chosen: Any = method_class(method)
    if chosen.learns:
        raise UsageError(
            f"{method} has to be trained: stsr train SECTION --method {method} -o m.safetensors, then --model"
        )
    if section.spots is None or not use_lr:
        raise UsageError(f"{method} needs measured spots and {section.path.name} has none; use a model")
    baseline = chosen(_bins_of(section, chosen.Config()), tuple(section.spots.genes)).eval()
    return Loaded(method=baseline, name=method, model=method, digest=None, device=device)


def _bins_of(section: Section, config: Any) -> Any:
    """The config with the section's own bins if they do not add up to 100 um, such as 8 um of Visium HD."""
    own = None if section.hr is None else section.hr.grid.bin_um
    return config if own is None or raster_um(own) == LR_UM else replace(config, bin_um=own)


def configure_sampling(
    method: Method, *, steps: int | None, sampler: str | None, guidance: float | None
) -> None:
    """Set how a diffusion method samples; a value of None keeps the method's own.

    Raises
    ------
    UsageError
        If the method does not sample, or a value is out of range.
    """
    wishes = {"steps": steps, "sampler": sampler, "guidance": guidance}
    asked = {key: value for key, value in wishes.items() if value is not None}
    if not asked:
        return
    if not hasattr(method, "sampling"):
        raise UsageError(f"this model does not sample; leave out {', '.join('--' + key for key in asked)}")
    sampling: Any = method.sampling
    try:
        method.sampling = replace(sampling, **asked)
    except ValueError as error:
        raise UsageError(str(error)) from error


def of_views(loaded: Loaded, views: int) -> Loaded:
    """The same weights, predicting from another number of orientations of a tile; methods without views as they are.

    One orientation takes an eighth of the time of eight, for 0.002 of PCC.
    """
    method: Any = copy.copy(loaded.method)
    if hasattr(method.config, "views"):
        method.config = replace(method.config, views=views)
    return replace(loaded, method=method)
