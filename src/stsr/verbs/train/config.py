"""Settings of training, and how a flat list of settings finds its config."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stsr.errors import StsrError, UsageError, did_you_mean
from stsr.methods.method import configured
from stsr.verbs.train.section import SPOT_KINDS

_GROUPS = ("train", "method")


@dataclass(frozen=True)
class TrainConfig:
    """How any method is trained; starting values are ours.

    Parameters
    ----------
    steps
        Steps of the optimiser.
    batch
        Tiles per step.
    learning_rate, warmup, final_rate
        AdamW's rate rises over ``warmup`` steps and falls as a cosine to ``final_rate`` of itself.
    weight_decay
        AdamW's, on matrices and kernels; biases, norms and other vectors have none.
    grad_clip
        Largest norm of the gradient; 0 for any.
    ema_decay
        Of the running mean of the weights that is validated and kept; shorter at the start.
    train_tile_lr
        Side of a training tile, low-resolution pixels.
    genes
        0 for all genes that the sections share, a number for the most expressed, or names.
    spots
        Kinds of simulated spots to learn from.
    phases, depths, stain, flips, tissue, gap_lr
        As in `stsr.verbs.train.tiles.TrainingTiles`.
    validate_every, validation_tiles
        Steps between validations, and how many tiles at most.
    log_every
        Steps between lines of the log.
    save_every, save_seconds
        The state is saved after so many steps or seconds, whichever comes first.
    select
        ``"best"`` keeps the weights of the best validation, ``"last"`` the last ones.
    storage
        ``"float32"``, or ``"float16"`` for a checkpoint of half the size.
    bf16, compile
        On CUDA: autocast, and torch.compile (pays for some thousand steps or more).
    prefetch
        Batches made ahead in a thread of their own; the result does not depend on it.

    Raises
    ------
    ValueError
        If a value makes no sense.
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
    spots: tuple[str, ...] = ("square", "visium")
    phases: int = 2
    depths: tuple[float, ...] = (1.0,)
    stain: float = 0.1
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
    bf16: bool = True
    compile: bool = False
    prefetch: int = 2

    def __post_init__(self):
        positive = (
            "steps",
            "batch",
            "learning_rate",
            "train_tile_lr",
            "phases",
            "validate_every",
            "log_every",
        )
        for name in (*positive, "save_every", "save_seconds", "validation_tiles"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "grad_clip", "gap_lr", "stain", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be below 0, it is {getattr(self, name)}")
        for name in ("final_rate", "tissue"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a part, from 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if isinstance(self.genes, int) and self.genes < 0:
            raise ValueError(f"genes is a number of genes or their names, not {self.genes}")
        if not self.spots or set(self.spots) - set(SPOT_KINDS):
            raise ValueError(f"spots are {' or '.join(SPOT_KINDS)}, not {', '.join(self.spots) or 'nothing'}")
        if not self.depths or not all(0 < depth <= 1 for depth in self.depths):
            raise ValueError(f"depths are parts of the transcripts, above 0 and up to 1, not {self.depths}")
        if self.select not in ("best", "last"):
            raise ValueError(f"select is best or last, not {self.select!r}")
        if self.storage not in ("float32", "float16"):
            raise ValueError(f"storage is float32 or float16, not {self.storage!r}")


def read_config(config: Mapping | str | Path | None) -> dict[str, Any]:
    """A mapping, or a TOML file as one.

    Raises
    ------
    UsageError
        If there is no such file, or it is no TOML.
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
        raise UsageError(f"{path} is no TOML ({error}); write lines such as: steps = 2000") from None
    except OSError as error:
        raise StsrError(f"{path} cannot be read ({error.strerror}); check --config") from error


def resolve(method: type, config: Mapping[str, Any], settings: Sequence[str]) -> tuple[Any, TrainConfig]:
    """The method's config and the training's, from tables, flat keys and ``key=value`` lines; later ones win.

    Parameters
    ----------
    method
        The class; its ``Config`` has the method's settings.
    config
        ``{"train": {...}, "method": {...}}``, flat keys, or both.
    settings
        ``"key=value"``; ``train.key`` or ``method.key`` where both have the key.

    Raises
    ------
    UsageError
        For an unknown key, naming the nearest known one, or an impossible value.
    """
    classes = {"train": TrainConfig, "method": method.Config}
    chosen: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}

    def put(key: str, value: Any) -> None:
        group, name = _home(key, classes)
        chosen[group][name] = _fitting(name, value, _default(classes[group], name))

    for key, value in config.items():
        if key in _GROUPS and isinstance(value, Mapping):
            for name, inner in value.items():
                put(f"{key}.{name}", inner)
        else:
            put(key, value)
    for line in settings:
        key, equals, text = line.partition("=")
        if not equals:
            raise UsageError(f"{line!r} is no setting; write it as key=value")
        put(key.strip(), _parsed(text.strip()))
    return configured(method.Config, chosen["method"]), configured(TrainConfig, chosen["train"])


def _home(key: str, classes: dict[str, type]) -> tuple[str, str]:
    """(group, name) of a key."""
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
    """A value as TOML writes it, a comma list, or else a plain word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [_parsed(part.strip()) for part in text.split(",") if part.strip()] if "," in text else text


def _default(config_class: type, name: str) -> Any:
    return next(field.default for field in fields(config_class) if field.name == name)


def _fitting(name: str, value: Any, default: Any) -> Any:
    """The value in the type of the default.

    Raises
    ------
    UsageError
        If it is of another.
    """
    if name == "genes" and not isinstance(value, bool) and isinstance(value, (int, str, list, tuple)):
        return value if isinstance(value, int) else tuple([value] if isinstance(value, str) else value)
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if isinstance(default, bool):
        right, what = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        right, what = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(default, float):
        right, what = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif isinstance(default, str):
        right, what = isinstance(value, str), "a word"
    else:
        return value
    if not right:
        raise UsageError(f"{name} must be {what}, not {value!r}")
    return float(value) if isinstance(default, float) else value
