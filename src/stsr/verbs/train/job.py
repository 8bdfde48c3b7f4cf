"""One training run: method, settings, data, and the random numbers of each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from stsr import checkpoint
from stsr.device import resolve_device
from stsr.errors import UsageError
from stsr.methods import DEFAULT_METHOD, method_class
from stsr.methods.batch import Requirements
from stsr.methods.method import Method, config_dict
from stsr.progress import Progress, Report, silent
from stsr.store.section import Section, open_section
from stsr.verbs.train.config import TrainConfig, read_config, resolve
from stsr.verbs.train.features import check_settings, read_features
from stsr.verbs.train.section import check_section
from stsr.verbs.train.slides import SlideTiles, check_slide
from stsr.verbs.train.tiles import TrainingTiles
from stsr.version import __version__

_NEUTRAL = ("prefetch", "save_every", "save_seconds", "log_every")  # settings that do not affect the result


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A resolved training run; fields without a description are as in `stsr.train`."""

    name: str
    """Of the method."""
    method: type[Method]
    method_config: Any
    config: TrainConfig
    tiles: TrainingTiles | SlideTiles
    device: torch.device
    seed: int
    """Determines all random numbers."""
    init: Path | None
    settings: dict[str, Any]
    """Everything that the result depends on, JSON-able."""

    def generator(
        self, purpose: str, number: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """Random numbers of one step, determined by the seed, so that a resumed run draws the same ones."""
        return torch.Generator(device or self.device).manual_seed(self.number(purpose, number))

    def number(self, purpose: str, number: int) -> int:
        """A separate seed for each purpose and step."""
        name = f"{self.seed}/{purpose}/{number}".encode()
        return int.from_bytes(blake2b(name, digest_size=7).digest(), "little")

    def autocast(self) -> torch.autocast:
        """Half precision on CUDA, if the config requests it."""
        on = self.device.type == "cuda" and self.config.bf16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)


def make_job(
    sections: Sequence[str | Path],
    *,
    method: str | None,
    config: Mapping[str, Any] | str | Path | None,
    settings: Sequence[str],
    steps: int | None,
    val: float,
    regions: dict | str | Path | None,
    device: str,
    seed: int,
    init: str | Path | None,
    features: Sequence[str | Path],
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
    report: Report = silent,
) -> TrainingJob:
    """Resolve all settings and read the sections; parameters are those of `stsr.train`.

    Raises
    ------
    UsageError
        If a setting is unknown or invalid, or ``init`` does not fit.
    StsrError
        If a section cannot be used for training.
    """
    if not sections:
        raise UsageError("no section was given; name at least one section")
    opened = [open_section(path) for path in sections]
    by_spots = _only_spots(opened)
    name = method or DEFAULT_METHOD
    chosen = _learning(name)
    if by_spots and not chosen.learns_from_spots:
        raise UsageError(
            f"{name} needs counts per bin, and {opened[0].name} has only spots; leave out --method, or give unet"
        )
    extra = [] if steps is None else [f"train.steps={steps}"]
    given = _started_from(init, by_spots) | read_config(config)
    method_config, training = resolve(chosen, given, [*settings, *extra])
    where = resolve_device(device)
    _check_spread_from(training, opened)
    regions = _read_regions(regions)
    progress(0, 1, f"reading {len(opened)} section{'s' if len(opened) > 1 else ''}")
    _check_sections(opened, method_config.requirements(()), report, by_spots)
    cached = read_features(
        opened, features, chosen, device=where, overwrite=overwrite, compute=not dry_run, progress=progress
    )
    method_config, training = resolve(chosen, {**cached.settings, **given}, [*settings, *extra])
    check_settings(method_config, cached)
    options: dict[str, Any] = {"val": val, "regions": regions, "seed": seed, "features": cached.maps}
    needs = method_config.requirements(())
    tiles: TrainingTiles | SlideTiles
    if by_spots:
        panel = None if init is None or training.genes else checkpoint.describe(init)["panel"]
        tiles = SlideTiles(opened, needs, training, panel=panel, progress=progress, **options)
    else:
        tiles = TrainingTiles(opened, needs, training, progress=progress, **options)
    whole = {
        "stsr": __version__,
        "method": name,
        "method_config": config_dict(method_config),
        "train": {key: value for key, value in asdict(training).items() if key not in _NEUTRAL},
        "seed": seed,
        "val": val,
        "regions": regions,
        "sections": [section.name for section in opened],
        "data": tiles.digest,
    }
    if features:
        whole["features"] = cached.record
    if init is not None:
        whole["init"] = _check_init(Path(init), name, tiles.panel)
    return TrainingJob(
        name=name,
        method=chosen,
        method_config=method_config,
        config=training,
        tiles=tiles,
        device=where,
        seed=seed,
        init=None if init is None else Path(init),
        settings=json.loads(json.dumps(whole)),
    )


def _learning(name: str) -> type[Method]:
    """The class of a method that can be trained."""
    chosen = method_class(name)
    if not chosen.learns:
        raise UsageError(
            f"{name} has no parameters to train; use it directly: stsr superres STORE --method {name}"
        )
    return chosen


def _check_spread_from(config: TrainConfig, sections: Sequence[Section]) -> None:
    """Refuse names that are not those of sections."""
    known = [section.name for section in sections]
    for name in config.spread_from:
        if name not in known:
            raise UsageError(
                f"spread_from names {name!r}, which is not one of the sections: {', '.join(known)}"
            )


def _only_spots(sections: Sequence[Section]) -> bool:
    """Whether the sections have spots, but no counts per bin.

    Raises
    ------
    UsageError
        If that is so for some of them.
    """
    spots = [section for section in sections if section.hr is None and section.spots is not None]
    if spots and len(spots) < len(sections):
        raise UsageError(
            f"{spots[0].name} has only spots, and others have counts per bin; train on either kind, then on the other "
            "with --init"
        )
    return bool(spots)


def _started_from(init: str | Path | None, by_spots: bool) -> dict[str, Any]:
    """Settings of the model that training on spots starts from."""
    return {"method": checkpoint.describe(init)["config"]} if init is not None and by_spots else {}


def _check_sections(sections: Sequence[Section], needs: Requirements, report: Report, by_spots: bool) -> None:
    """Check that sections can be used for training, and report images that are coarser than the method reads."""
    for section in sections:
        if by_spots:
            check_slide(section)
        else:
            check_section(section, needs)
        image = section.image
        if image is not None and not image.resolves(needs.image_um):
            report(
                f"the H&E of {section.name} has {image.um_per_px:.3g} um per pixel, and the model reads "
                f"{needs.image_um:g} um: detail is missing"
            )


def _check_init(path: Path, name: str, panel: tuple[str, ...]) -> str:
    """Check that training can start from a checkpoint, and return its digest."""
    header = checkpoint.describe(path)
    if header["method"] != name:
        raise UsageError(
            f"{path} is a {header['method']} model; train with --method {header['method']}, or without --init"
        )
    if tuple(header["panel"]) != tuple(panel):
        raise UsageError(f"{path} has another panel than these sections share; train without --init")
    return checkpoint.digest(path)


def _read_regions(regions: dict | str | Path | None) -> dict:
    if regions is None or isinstance(regions, dict):
        return regions or {}
    try:
        read = json.loads(Path(regions).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{regions} is not a JSON file of regions ({error}); see stsr train --help"
        ) from None
    if not isinstance(read, dict):
        raise UsageError(f'{regions} must contain {{"section": {{"exclude": [[x0, y0, x1, y1]]}}}}, in um')
    return read


def described(job: TrainingJob) -> dict[str, Any]:
    """Resolved settings and sizes, as a dry run prints them and the run's folder keeps them."""
    method = job.method(job.method_config, job.tiles.panel, job.tiles.reference)
    return {
        "method": job.name,
        "device": str(job.device),
        "seed": job.seed,
        "config": {"train": asdict(job.config), "method": config_dict(job.method_config)},
        "sections": job.settings["sections"],
        "panel": len(job.tiles.panel),
        "tiles": job.tiles.count,
        "validation_tiles": job.tiles.validation_count,
        "gaps_lr": job.tiles.gaps_lr,
        "parameters": sum(parameter.numel() for parameter in method.parameters()),
    }
