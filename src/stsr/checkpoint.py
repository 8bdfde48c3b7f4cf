"""Checkpoints: a trained method as one self-contained safetensors file, never unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from stsr.errors import StsrError, UsageError
from stsr.files import replacing
from stsr.methods import method_class
from stsr.methods.method import Method, config_dict, configured
from stsr.version import __version__

FORMAT = 1
"""Version of the header; newer versions are refused."""

_KEY = "stsr"
_SUM = "sum"
_STORAGE = {"float32": torch.float32, "float16": torch.float16}
_DIGITS = 12  # of the sha256: 48 bits identify a checkpoint and fit in a table


@dataclass(frozen=True)
class Checkpoint:
    """A trained method and its origin."""

    method: Method
    """In eval mode, on the requested device."""
    name: str
    """The method's name, as in `stsr.methods.METHODS`."""
    provenance: dict
    """Training data, their licence, and training settings."""
    digest: str
    """First 12 digits of the file's sha256."""


def save(path: str | Path, method: Method, name: str, provenance: dict, storage: str = "float32") -> Path:
    """Write a checkpoint; an existing file is replaced in one step.

    Parameters
    ----------
    path
        The file.
    method
        Its parameters and buffers are written; buffers (statistics) keep their type.
    name
        The method's name.
    provenance
        Training data, their licence, and training settings; JSON-able.
    storage
        ``"float32"``, or ``"float16"`` for half the size.

    Raises
    ------
    UsageError
        If ``storage`` is neither.
    StsrError
        If the disk is full or read-only.
    """
    if storage not in _STORAGE:
        raise UsageError(f"storage must be {' or '.join(_STORAGE)}, not {storage!r}")
    parameters = {key for key, _ in method.named_parameters()}
    tensors = {}
    for key, tensor in method.state_dict().items():
        lower = key in parameters and tensor.is_floating_point()
        tensors[key] = tensor.detach().to(_STORAGE[storage]) if lower else tensor.detach()
    header = {
        "format": FORMAT,
        "stsr": __version__,
        "method": name,
        "config": config_dict(method.config),
        "panel": list(method.panel),
        "requirements": {k: v for k, v in asdict(method.requirements).items() if k != "panel"},
        "storage": storage,
        "provenance": provenance,
    }
    write_tensors(path, tensors, header)
    return Path(path)


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    StsrError
        If the file is missing, damaged, not made by stsr, or made by a newer version.
    """
    path = Path(path)
    header, tensors = read_tensors(path)
    _check_format(path, header)
    try:
        name = header["method"]
        chosen = method_class(name)
        method = chosen(configured(chosen.Config, header["config"]), tuple(header["panel"]))
        method.load_state_dict(tensors)
        provenance = header["provenance"]
    except UsageError as error:  # unknown method or setting
        made = header.get("stsr", "(unknown version)")
        raise StsrError(
            f"{path} was made by stsr {made} and does not fit this version ({error}); upgrade stsr"
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, "its weights do not fit its own config") from error
    return Checkpoint(method.to(device).eval(), name, provenance, digest(path))


def start_from(method: Method, path: str | Path) -> None:
    """Load the weights of a checkpoint into a method; buffers of another shape keep their initial values.

    Raises
    ------
    UsageError
        If the weights do not fit the method's config.
    StsrError
        As `load`.
    """
    header, tensors = read_tensors(path)
    _check_format(Path(path), header)
    own = method.state_dict()
    for key, parameter in method.named_parameters():
        if key not in tensors or tensors[key].shape != parameter.shape:
            raise UsageError(f"{path} was trained with another config; give the same settings")
    fitting = {
        key: tensor for key, tensor in tensors.items() if key in own and tensor.shape == own[key].shape
    }
    method.load_state_dict(fitting, strict=False)


def describe(path: str | Path) -> dict:
    """Read the header of a checkpoint: method, config, panel, requirements, provenance.

    Raises
    ------
    StsrError
        As `load`.
    """
    with _opened(Path(path)) as file:
        header = _header(Path(path), file)
    _check_format(Path(path), header)
    return header


def digest(path: str | Path) -> str:
    """First 12 digits of a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def default_weights() -> Path:
    """Path of the packaged default model.

    Raises
    ------
    StsrError
        If this installation has none.
    """
    path = Path(str(resources.files("stsr") / "weights" / "default.safetensors"))
    if not path.is_file():
        raise StsrError(
            "this installation has no default model; train one with stsr train and pass it with --model"
        )
    return path


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], header: dict) -> None:
    """Write tensors and a JSON-able header as one safetensors file, in one atomic step.

    Raises
    ------
    StsrError
        If the disk is full or read-only.
    """
    from safetensors.torch import save as as_bytes

    path = Path(path)
    # Cloned, because safetensors refuses tensors that share memory; contiguous, because it stores no strides.
    apart = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    whole = {**header, _SUM: _sum(apart)}
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(as_bytes(apart, metadata={_KEY: json.dumps(whole, sort_keys=True)}))
    except OSError as error:
        raise StsrError(
            f"cannot write {path} ({error.strerror or error}); write elsewhere with --output"
        ) from error


def read_tensors(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read the header and the tensors of a file by `write_tensors`.

    Raises
    ------
    StsrError
        If the file is missing, damaged or not made by stsr.
    """
    path = Path(path)
    with _opened(path) as file:
        header = _header(path, file)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    known = header.pop(_SUM, None)  # absent in files of the first versions
    if known is not None and known != _sum(tensors):
        raise _damaged(path, "the checksum of its weights is wrong")
    return header, tensors


def _sum(tensors: dict[str, torch.Tensor]) -> str:
    """Checksum of names and values; safetensors itself does not detect changed bits."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode())
        total.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise StsrError(
            f"there is no model at {path}; check the path or train one: stsr train SECTION -o {path}"
        )
    if not path.is_file():
        raise StsrError(f"{path} is a folder, not a model; give the .safetensors file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, "not a complete safetensors file") from error
    except OSError as error:
        raise StsrError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _header(path: Path, file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise StsrError(
            f"{path} was not made by stsr; give a model by stsr train, or omit --model for the default model"
        )
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, "its header is broken") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is broken")
    return header


def _check_format(path: Path, header: dict) -> None:
    version = header.get("format")
    if not isinstance(version, int):
        raise _damaged(path, "its header has no version")
    if version > FORMAT:
        raise StsrError(
            f"{path} was made by a newer stsr ({header.get('stsr', 'unknown')}); upgrade stsr to use it"
        )


def _damaged(path: Path, reason: str) -> StsrError:
    return StsrError(f"{path} is damaged ({reason}); copy it again or train it again")
