"""The folder beside a model that holds the log and the state of its training, from which training resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stsr.checkpoint import read_tensors, write_tensors
from stsr.errors import StsrError, UsageError
from stsr.files import disk_errors, lock, replacing
from stsr.methods.method import Method


@dataclass
class State:
    """Everything that training needs to resume exactly.

    Random numbers have no state: those of a step are determined by the seed and the step.
    """

    method: Method
    ema: Method
    """A copy of the network in training, with averaged weights."""
    optimizer: torch.optim.Optimizer
    """AdamW."""
    step: int = 0
    """Completed steps."""
    best: float | None = None
    """Smallest validation loss so far."""
    best_step: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averaged weights at that step."""
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums of the loss terms since the last log line; their number is under ``"steps"``."""
    seconds: float = 0.0
    """Training time so far."""

    def save(self, path: Path) -> None:
        """Write the state, in one atomic step."""
        tensors = {f"best/{key}": tensor for key, tensor in self.best_weights.items()}
        for part, module in (("method", self.method), ("ema", self.ema)):
            tensors |= {f"{part}/{key}": tensor for key, tensor in module.state_dict().items()}
        for key, parameter in self.method.named_parameters():
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        header = {
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "pending": {key: float(value) for key, value in self.pending.items()},
            "seconds": self.seconds,
        }
        write_tensors(path, tensors, header)

    def restore(self, path: Path) -> None:
        """Restore a state that `save` wrote.

        Raises
        ------
        StsrError
            If the file is damaged or belongs to another method.
        """
        header, tensors = read_tensors(path)
        parts: dict[str, dict[str, torch.Tensor]] = {"best": {}, "method": {}, "ema": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            part, _, rest = key.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        try:
            self.method.load_state_dict(parts["method"])
            self.ema.load_state_dict(parts["ema"])
            device = self.method.reference.device
            self.best_weights = {key: tensor.to(device) for key, tensor in parts["best"].items()}
            parameters = dict(self.method.named_parameters())
            for key, tensor in parts["optimizer"].items():
                name, _, of = key.partition("/")
                # Moments have the memory layout of their parameter; AdamW keeps its step count on the CPU.
                like = torch.empty_like(parameters[of]) if name != "step" else torch.empty_like(tensor)
                self.optimizer.state[parameters[of]][name] = like.copy_(tensor)
            self.step, self.best, self.best_step = header["step"], header["best"], header["best_step"]
            self.pending = {
                key: torch.tensor(value, device=device) for key, value in header["pending"].items()
            }
            self.seconds = header["seconds"]
        except (KeyError, RuntimeError, TypeError) as error:
            raise StsrError(f"{path} does not fit this training; start over with --overwrite") from error


class RunFolder:
    """The folder with ``config.json``, ``log.jsonl`` and, until training is finished, ``state.safetensors``.

    Parameters
    ----------
    output
        The model; the folder is ``<its stem>.run`` beside it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = output.with_suffix(".run")
        self.log_path = self.path / "log.jsonl"
        self.state_path = self.path / "state.safetensors"
        self._config_path = self.path / "config.json"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Reserve the folder for this process.

        Raises
        ------
        StsrError
            If another process trains this model, or the folder cannot be written to.
        """
        fresh = not self.path.exists()
        try:
            with disk_errors(self.output):
                self.path.mkdir(parents=True, exist_ok=True)
                handle = open(self.path / "lock", "w")  # noqa: SIM115 - closed below, after the work
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(
                f"{self.path} cannot be created because a file has this name; move it or give another --output"
            ) from error
        with handle:
            if not lock(handle):
                raise StsrError(f"another stsr process is training {self.output}; wait until it is done")
            try:
                yield
            except BaseException:
                if fresh and not self.state_path.exists():  # nothing to resume from
                    shutil.rmtree(self.path, ignore_errors=True)
                raise

    def check(self, settings: dict | None, overwrite: bool) -> bool:
        """Decide whether to resume (True) or to start (False).

        Parameters
        ----------
        settings
            Everything that the result depends on; None before the data are read, for a first check.
        overwrite
            Whether a finished model or another run may be replaced.

        Raises
        ------
        UsageError
            If the model exists, or an unfinished run has other settings.
        """
        record = self._record()
        if record is None or record.get("finished"):
            if self.output.exists() and not overwrite:
                known = record is not None and settings == record.get("settings")
                state = "is already trained with these settings" if known else "exists"
                if settings is None and record is not None:
                    return False  # checked again once the data are read
                raise UsageError(
                    f"{self.output} {state}; add --overwrite to train it again or give another --output"
                )
            return False
        if settings is None or (overwrite and settings != record.get("settings")):
            return False
        if settings != record.get("settings"):
            other = _differences(record.get("settings") or {}, settings)
            raise UsageError(
                f"{self.path} holds an unfinished run with other {', '.join(other)}; "
                "add --overwrite to start over or give another --output"
            )
        return True

    def begin(self, settings: dict, details: dict) -> None:
        """Start a run with an empty log."""
        for path in (self.state_path, self.log_path):
            path.unlink(missing_ok=True)
        self._write({"settings": settings, "finished": False, **details})

    def resume(self, state: State) -> None:
        """Restore the last saved state, if there is one, and drop later lines of the log."""
        if self.state_path.exists():
            try:
                state.restore(self.state_path)
            except StsrError as error:
                raise StsrError(
                    f"the unfinished run in {self.path} is damaged; remove that folder and run the same command again"
                ) from error
        lines = self.log_path.read_text().splitlines() if self.log_path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.step]
        with replacing(self.log_path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def log(self, line: dict) -> None:
        """Append a line to the log."""
        with disk_errors(self.output), open(self.log_path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> None:
        """Mark the run as finished and remove its state."""
        self._write({**(self._record() or {}), "finished": True})
        self.state_path.unlink(missing_ok=True)

    def _record(self) -> dict | None:
        try:
            return json.loads(self._config_path.read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None

    def _write(self, record: dict) -> None:
        with replacing(self._config_path) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


def _step_of(line: str) -> float:
    """The step of a log line; infinity for a truncated line."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _differences(old: dict, new: dict) -> list[str]:
    """Names of settings that differ, one level deep."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
        elif a != b:
            found.append(key)
    return found or ["settings"]
