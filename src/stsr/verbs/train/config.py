"""Settings of training, and how config files and ``key=value`` settings are resolved."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stsr.errors import StsrError, UsageError, did_you_mean
from stsr.methods.method import Method, check_not_negative, check_positive, configured
from stsr.verbs.train.spots import SPOT_KINDS

_GROUPS = ("train", "method")
_ACCEPTED: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
}
"""Type of a default: types of values that replace it, and their name."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training, the same for all methods.

    Parameters
    ----------
    steps
        Number of optimiser steps.
    batch
        Tiles per step.
    learning_rate, warmup, final_rate
        The learning rate of AdamW rises linearly over ``warmup`` steps, then falls as a cosine to the fraction
        ``final_rate``.
    weight_decay
        Weight decay of AdamW on matrices and kernels; biases, norms and other vectors have none.
    grad_clip
        Maximum norm of the gradient; 0 for no limit.
    ema_decay
        Decay of the averaged weights, which are validated and kept; smaller at the start.
    train_tile_lr
        Side of a training tile, low-resolution pixels.
    genes
        The panel: 0 for all genes, a number for the most highly expressed (in the training area), or names. The most
        expressed genes are taken from the sections in turn, each by its own ranking.
    panel
        ``"union"`` for the genes of any section; ``"shared"`` for those that all sections have.
    spots
        Kinds of simulated spots, one drawn per tile: ``"square"``, ``"visium"``.
    phases
        Shifts of the tiles per axis within a low-resolution pixel. 5 are 20 um apart, finer than a spot; the list of
        positions grows with their square.
    depths
        Fractions to which transcripts are thinned before they are halved, one drawn per tile.
    spot_counts
        Draw depths between that at which the mean spot has this many counts of the panel, and 1, instead; evenly
        on a logarithmic scale. 0 for ``depths``.
    denoised
        Fraction of tiles with denoised spots, as prediction denoises them.
    realisations
        Number of times that the spots of each section are simulated and denoised, at other places and depths and from
        other halves of the transcripts.
    stain
        Strength of random staining: standard deviation of the log amount of each stain. Hue and background vary in
        proportion.
    coarse
        Fraction of tiles whose image is given the resolution of a coarser scan (one of 4 and 10 um per pixel), so that
        the model copes with one.
    flips
        Whether tiles are rotated and mirrored.
    tissue
        Minimum fraction of a tile that lies in tissue. Tiles are drawn in proportion to this fraction.
    gap_lr
        Distance of training tiles from excluded and validation areas, low-resolution pixels. 0 for one tile, or less
        if that would take more than a quarter of the training tiles, but at least 1.
    validate_every, validation_tiles
        Steps between validations, and maximum number of validation tiles.
    log_every
        Steps between log lines.
    save_every, save_seconds
        Steps or seconds after which the state is saved, whichever comes first.
    select
        ``"best"`` keeps the weights with the smallest validation loss, ``"last"`` the last ones.
    storage
        ``"float32"``, or ``"float16"`` for a checkpoint of half the size.
    spread_from
        Names of the sections on whose validation tiles the spread is fitted; all by default. Sections in which a
        part of the cells is missing would make it too large.
    bf16, compile
        On CUDA: bfloat16 autocast, and torch.compile (worthwhile from some thousand steps).
    prefetch
        Batches prepared ahead in a separate thread; the result does not depend on it.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    steps: int = 2000
    batch: int = 8
    learning_rate: float = 1e-3
    warmup: int = 50
    final_rate: float = 0.02
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.995
    train_tile_lr: int = 6
    genes: int | tuple[str, ...] = 0
    panel: str = "union"
    spots: tuple[str, ...] = ("square", "visium")
    phases: int = 5
    depths: tuple[float, ...] = (1.0,)
    spot_counts: int = 0
    denoised: float = 0.0
    realisations: int = 8
    stain: float = 0.25
    coarse: float = 0.15
    flips: bool = True
    tissue: float = 0.3
    gap_lr: int = 0
    validate_every: int = 100
    validation_tiles: int = 48
    log_every: int = 10
    save_every: int = 500
    save_seconds: float = 60.0
    select: str = "best"
    storage: str = "float32"
    spread_from: tuple[str, ...] = ()
    bf16: bool = True
    compile: bool = False
    prefetch: int = 2

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch", "learning_rate", "train_tile_lr", "phases", "validate_every")
        check_positive(self, "log_every", "save_every", "save_seconds", "validation_tiles", "realisations")
        check_not_negative(self, "warmup", "weight_decay", "grad_clip", "gap_lr", "stain", "prefetch")
        check_not_negative(self, "spot_counts")
        for name in ("final_rate", "tissue", "coarse", "denoised"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if isinstance(self.genes, int) and self.genes < 0:
            raise ValueError(f"genes must be a number of genes or their names, not {self.genes}")
        if self.panel not in ("union", "shared"):
            raise ValueError(f"panel must be union or shared, not {self.panel!r}")
        if not self.spots or set(self.spots) - set(SPOT_KINDS):
            raise ValueError(
                f"spots must be {' or '.join(SPOT_KINDS)}, not {', '.join(self.spots) or 'nothing'}"
            )
        if not self.depths or not all(0 < depth <= 1 for depth in self.depths):
            raise ValueError(
                f"depths must be fractions of the transcripts, above 0 and at most 1, not {self.depths}"
            )
        if self.spot_counts and tuple(self.depths) != (1.0,):
            raise ValueError("depths and spot_counts exclude each other; leave out one of them")
        if self.select not in ("best", "last"):
            raise ValueError(f"select must be best or last, not {self.select!r}")
        if self.storage not in ("float32", "float16"):
            raise ValueError(f"storage must be float32 or float16, not {self.storage!r}")


def read_config(config: Mapping | str | Path | None) -> dict[str, Any]:
    """Read settings from a mapping or a TOML file.

    Raises
    ------
    UsageError
        If there is no such file, or it is not a TOML file.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"there is no config at {path}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file ({error}); write lines such as: steps = 2000") from None
    except OSError as error:
        raise StsrError(f"{path} cannot be read ({error.strerror}); check --config") from error


def resolve(
    method: type[Method], config: Mapping[str, Any], settings: Sequence[str]
) -> tuple[Any, TrainConfig]:
    """Build the configs of the method and of training from tables, flat keys and ``key=value`` lines.

    Later values override earlier ones.

    Parameters
    ----------
    method
        The method's class.
    config
        ``{"train": {...}, "method": {...}}``, flat keys, or both.
    settings
        ``"key=value"``; ``train.key=value`` or ``method.key=value`` if both have the key.

    Raises
    ------
    UsageError
        For an unknown key, naming the nearest known one, or an invalid value.
    """
    classes = {"train": TrainConfig, "method": method.Config}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}

    def put(key: str, value: Any) -> None:
        group, name = _home(key, classes)
        chosen[group][name] = _fitting(name, value, getattr(classes[group], name))

    for key, value in config.items():
        if key in _GROUPS and isinstance(value, Mapping):
            for name, inner in value.items():
                put(f"{key}.{name}", inner)
        else:
            put(key, value)
    for line in settings:
        key, equals, text = line.partition("=")
        if not equals:
            raise UsageError(f"{line!r} is not a setting; write it as key=value")
        put(key.strip(), _parsed(text.strip()))
    return configured(method.Config, chosen["method"]), configured(TrainConfig, chosen["train"])


def _home(key: str, classes: dict[str, type]) -> tuple[str, str]:
    """Group (train or method) and name of a key."""
    group, dot, name = key.partition(".")
    if not dot:
        group, name = "", key
    names = {each: [field.name for field in fields(cls)] for each, cls in classes.items()}
    found = [each for each in _GROUPS if group in ("", each) and name in names[each]]
    if len(found) > 1:
        raise UsageError(
            f"{key!r} is a setting of training and of the method; write train.{key} or method.{key}"
        )
    if not found:
        known = [name for each in _GROUPS for name in names[each]]
        hint = did_you_mean(name, known, f"known are: {', '.join(known)}.")
        raise UsageError(f"{key!r} is not a setting of training or of this method; {hint}")
    return found[0], name


def _parsed(text: str) -> Any:
    """Parse a value: TOML, a comma-separated list, or else text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [_parsed(part.strip()) for part in text.split(",") if part.strip()] if "," in text else text


def _fitting(name: str, value: Any, default: Any) -> Any:
    """Convert a value to the type of the default.

    Raises
    ------
    UsageError
        If it has another type.
    """
    if name == "genes" and not isinstance(value, bool) and isinstance(value, (int, str, list, tuple)):
        return value if isinstance(value, int) else tuple([value] if isinstance(value, str) else value)
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    accepted, what = _ACCEPTED[type(default)]
    if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise UsageError(f"{name} must be {what}, not {value!r}")
    return float(value) if isinstance(default, float) else value
