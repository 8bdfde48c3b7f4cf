"""What one training is: the method, its settings and its data, and where each step's random numbers come from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from stsr import checkpoint
from stsr.device import resolve_device
from stsr.errors import UsageError
from stsr.methods import DEFAULT_METHOD, method_class
from stsr.methods.method import Method, config_dict
from stsr.store.section import open_section
from stsr.verbs.train.config import TrainConfig, read_config, resolve
from stsr.verbs.train.section import check_section
from stsr.verbs.train.tiles import TrainingTiles
from stsr.version import __version__

_NEUTRAL = ("prefetch", "save_every", "save_seconds", "log_every")  # settings that leave the result as it is


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how."""

    name: str
    method: type[Method]
    method_config: Any
    config: TrainConfig
    tiles: TrainingTiles
    device: torch.device
    seed: int
    init: Path | None
    """A checkpoint whose weights are the start."""
    settings: dict
    """All that the result depends on, JSON-able."""

    def generator(
        self, purpose: str, number: int, device: torch.device | str | None = None
    ) -> torch.Generator:
        """Random numbers of one step: a function of the seed, so a resumed run draws what an unbroken one does."""
        return torch.Generator(device or self.device).manual_seed(self.number(purpose, number))

    def number(self, purpose: str, number: int) -> int:
        """A seed of its own for each purpose and step."""
        name = f"{self.seed}/{purpose}/{number}".encode()
        return int.from_bytes(blake2b(name, digest_size=7).digest(), "little")


def make_job(sections, method, config, settings, steps, val, regions, device, seed, init, progress) -> Job:
    """Resolve everything and read the sections; arguments as `stsr.verbs.train.verb.train` has them."""
    if not sections:
        raise UsageError("there is nothing to learn from; name at least one section")
    name = method or DEFAULT_METHOD
    chosen = method_class(name)
    if not chosen.learns:
        raise UsageError(f"{name} has nothing to learn; use it as it is: stsr superres STORE --method {name}")
    extra = [] if steps is None else [f"train.steps={steps}"]
    method_config, training = resolve(chosen, read_config(config), [*settings, *extra])
    where = resolve_device(device)
    regions = _read_regions(regions)
    opened = [open_section(path) for path in sections]
    progress(0, 1, f"reading {len(opened)} section{'s' if len(opened) > 1 else ''}")
    requirements = chosen(
        method_config, ("gene",)
    ).requirements  # a method tells what it needs whatever its panel
    for section in opened:
        check_section(section, requirements)
    tiles = TrainingTiles(
        opened,
        requirements,
        tile_lr=training.train_tile_lr,
        genes=training.genes or None,
        val=val,
        regions=regions,
        seed=seed,
        **{
            key: getattr(training, key)
            for key in ("spots", "gap_lr", "tissue", "phases", "depths", "stain", "flips")
        },
        validation_tiles=training.validation_tiles,
    )
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
    if init is not None:
        whole["init"] = _check_init(Path(init), name, tiles.panel)
    start = None if init is None else Path(init)
    return Job(
        name, chosen, method_config, training, tiles, where, seed, start, json.loads(json.dumps(whole))
    )


def _check_init(path: Path, name: str, panel: tuple[str, ...]) -> str:
    """The digest of a checkpoint that this training can start from."""
    header = checkpoint.describe(path)
    if header["method"] != name:
        raise UsageError(
            f"{path} is a {header['method']}; go on with --method {header['method']}, or without --init"
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
        raise UsageError(f"{regions} is no JSON of regions ({error}); see stsr train --help") from None
    if not isinstance(read, dict):
        raise UsageError(f'{regions} must hold {{"section": {{"exclude": [[x0, y0, x1, y1]]}}}}, in um')
    return read


def described(job: Job) -> dict:
    """Resolved settings and sizes: what a dry run prints and the run's folder keeps."""
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
