"""Files of patch features: encoders and arrays, and which of them belongs to which section."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stsr.errors import UsageError
from stsr.files import reading
from stsr.histology.features import placing_file
from stsr.nn.frozen import TORCHSCRIPT, WEIGHTS, config_file
from stsr.store.section import Section

_SAMPLE_BYTES = 2**20
_DIGITS = 12  # of the sha256, as for checkpoints


@dataclass(frozen=True)
class FeatureFile:
    """A file that gives features.

    Parameters
    ----------
    path
        An array (``.npy``, or the folder of a zarr array), or an encoder (``.pt``, ``.ts``, ``.safetensors``).
    """

    path: Path

    @property
    def kind(self) -> str:
        """``"encoder"`` or ``"array"``."""
        return "encoder" if self.path.suffix in (*TORCHSCRIPT, *WEIGHTS) else "array"

    @cached_property
    def digest(self) -> str:
        """First 12 digits of a sha256 of size, first and last MB, and settings in a JSON file beside it.

        Whole files are not hashed: they can have many GB. Of a zarr array, these are the names and sizes of all
        chunks, the metadata, and the content of some chunks.
        """
        if self.path.is_dir():
            parts = sorted(part for part in self.path.rglob("*") if part.is_file())
            sampled = {part for part in parts if part.suffix == ".json" or part.name.startswith(".")}
            sampled.update(parts[:: max(1, len(parts) // 8)])
        else:
            beside = config_file(self.path) if self.kind == "encoder" else placing_file(self.path)
            parts = [self.path, *([beside] if beside is not None and beside.is_file() else [])]
            sampled = set(parts)
        total = hashlib.sha256()
        for part in parts:
            size = part.stat().st_size
            named = str(part.relative_to(self.path)) if self.path.is_dir() else part.suffix
            total.update(f"{named}/{size}/".encode())
            if part in sampled:
                with reading(part), open(part, "rb") as file:
                    total.update(file.read(_SAMPLE_BYTES))
                    file.seek(max(0, size - _SAMPLE_BYTES))
                    total.update(file.read())
        return total.hexdigest()[:_DIGITS]

    def record(self) -> dict[str, str]:
        """Name and digest for provenance."""
        return {"file": self.path.name, "digest": self.digest}


def feature_file(path: str | Path, section: Section | None = None) -> FeatureFile:
    """Find a file of features; in a folder, the array named after the section.

    Raises
    ------
    UsageError
        If there is none, or its type is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"there are no features at {path}; check --features")
    is_zarr = (path / "zarr.json").is_file() or (path / ".zarray").is_file()
    if path.is_dir() and not is_zarr:
        candidates = [] if section is None else [path / f"{section.name}{end}" for end in (".npy", ".zarr")]
        found = next((each for each in candidates if each.exists()), None)
        if found is None:
            named = "a zarr array" if section is None else f"{section.name}.npy or {section.name}.zarr"
            raise UsageError(f"the folder {path} is not a zarr array and has no {named}; check --features")
        return FeatureFile(found)
    if not path.is_dir() and path.suffix not in (".npy", *TORCHSCRIPT, *WEIGHTS):
        raise UsageError(
            f"{path} is no file of features; give an array (.npy, .zarr), TorchScript (.pt, .ts) or .safetensors"
        )
    return FeatureFile(path)


def feature_files(paths: Sequence[str | Path], sections: Sequence[Section]) -> list[FeatureFile]:
    """One file for each section: an encoder or a folder for all, or arrays in the order of the sections.

    Raises
    ------
    UsageError
        If the files do not match the sections.
    """
    each = list(paths) * len(sections) if len(paths) == 1 else list(paths)
    remedy = "give one encoder, one array per section in their order, or a folder with <section name>.npy"
    if len(each) != len(sections):
        raise UsageError(f"there are {len(sections)} sections and {len(paths)} files of features; {remedy}")
    found = [feature_file(path, section) for path, section in zip(each, sections, strict=True)]
    arrays = {file.path.resolve() for file in found if file.kind == "array"}
    if len(arrays) not in (0, len(sections)) or (not arrays and len({file.path for file in found}) > 1):
        raise UsageError(f"an array belongs to one section, and encoders cannot be mixed; {remedy}")
    return found
