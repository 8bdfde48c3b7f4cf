"""The contents of a store, without opening it in SpatialData.

A store is an ordinary SpatialData zarr store, in zarr 3 (container 0.2) or zarr 2 (container 0.1). Everything here
reads small JSON files; spatialdata and zarr are not needed. Writing is in `stsr.store.publishing`.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stsr.errors import StsrError, UsageError
from stsr.store import names


@dataclass(frozen=True)
class Catalogue:
    """A snapshot of a store's contents: each JSON file is read at most once, when it is first needed.

    It does not show elements published later. The functions of this module that take a path read the store anew.

    Parameters
    ----------
    path
        The store.
    """

    path: Path

    @cached_property
    def _root(self) -> dict[str, Any]:
        """Root metadata of zarr 3: attributes and consolidated metadata."""
        return load_json(self.path / "zarr.json")

    @cached_property
    def _attributes_read(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root group."""
        if zarr_format(self.path) == 2:
            return load_json(self.path / ".zattrs")
        return self._root.get("attributes", {})

    @cached_property
    def elements(self) -> dict[str, str]:
        """Elements as {name: kind}, the kinds being SpatialData's: images, labels, points, shapes, tables.

        Taken from the consolidated metadata, as other readers do; from the folders if there is none.
        """
        if self.consolidated is None:
            groups = [f"{kind}/{child.name}" for kind in names.KINDS for child in _folders(self.path / kind)]
        else:
            groups = [key.removesuffix("/.zgroup") for key in self.consolidated]
        found = {}
        for group in groups:
            kind, _, element = group.partition("/")
            if kind in names.KINDS and element and "/" not in element and (self.path / group).is_dir():
                found[element] = kind
        return found

    @cached_property
    def consolidated(self) -> dict[str, Any] | None:
        """The consolidated metadata, {key: metadata}; None if there is none."""
        if zarr_format(self.path) == 2:
            return load_json(self.path / ".zmetadata").get("metadata")
        found = self._root.get("consolidated_metadata")
        return None if found is None else found["metadata"]

    @cached_property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """How each element that stsr wrote was made: {element: {"command": ..., "seed": ..., ...}}."""
        found = self.attributes.get(names.ATTRS_KEY)
        return found if isinstance(found, dict) else {}

    def attributes_of(self, element: str) -> dict[str, Any]:
        """Attributes of an element's zarr group.

        Raises
        ------
        StsrError
            If the store has no such element.
        """
        if element not in self._attributes_read:
            kind = self.elements.get(element)
            if kind is None:
                there = ", ".join(self.elements) or "nothing"
                raise StsrError(f"{self.path.name} has no element {element!r}; it has: {there}")
            group = self.path / kind / element
            if zarr_format(group) == 2:
                self._attributes_read[element] = load_json(group / ".zattrs")
            else:
                self._attributes_read[element] = load_json(group / "zarr.json").get("attributes", {})
        return self._attributes_read[element]

    def levels_of(self, element: str) -> tuple[list[str], list[str]]:
        """Array folders of an image or labels element from fine to coarse, and its channel names (empty if unnamed).

        Raises
        ------
        StsrError
            If the store has no such element.
        """
        attributes = self.attributes_of(element)
        ome = attributes.get("ome", attributes)
        levels = [dataset["path"] for dataset in ome["multiscales"][0]["datasets"]]
        channels = ome.get("omero", attributes.get("omero", {})).get("channels", [])
        return levels, [str(channel["label"]) for channel in channels]

    @property
    def superres_elements(self) -> list[str]:
        """Super-resolved maps, newest first, without their standard deviations and samples."""

        def is_map(name: str, kind: str) -> bool:
            by_us = self.provenance.get(name, {}).get("command") == "superres"
            beside = names.is_spread(name) or names.map_of_sample(name) is not None
            return kind == "images" and ((by_us and not beside) or names.is_superres(name))

        def age(name: str) -> tuple[str, str]:
            return self.provenance.get(name, {}).get("written", ""), name

        return sorted(
            (name for name, kind in self.elements.items() if is_map(name, kind)), key=age, reverse=True
        )

    def newest_superres(self) -> str:
        """The super-resolved map that was written last.

        Raises
        ------
        StsrError
            If there is none.
        """
        found = self.superres_elements
        if not found:
            raise StsrError(f"{self.path.name} has no super-resolved map; run: stsr superres {self.path}")
        return found[0]

    @property
    def feature_elements(self) -> dict[str, dict[str, Any]]:
        """Cached patch features, {name: provenance}."""
        return {
            name: self.provenance[name]
            for name, kind in self.elements.items()
            if kind == "images" and self.provenance.get(name, {}).get("command") == "features"
        }

    @property
    def hr_elements(self) -> list[str]:
        """Measured counts per bin, smallest bins first."""
        measured = [name for name, kind in self.elements.items() if kind == "images" and names.is_hr(name)]
        return sorted(measured, key=lambda name: names.bin_um_of(name) or 0.0)


def is_store(path: str | Path) -> bool:
    """Whether the path is a zarr group, as SpatialData stores are."""
    path = Path(path)
    if (path / ".zgroup").is_file():
        return True
    return load_json(path / "zarr.json").get("node_type") == "group"


def require_store(path: str | Path) -> Path:
    """The path of an existing store, with symbolic links resolved.

    Raises
    ------
    StsrError
        If there is no store at this path.
    """
    real = Path(path).resolve()
    if is_store(real):
        return real
    if not real.exists():
        raise StsrError(f"there is no section at {path}; make one: stsr prepare FOLDER --output {path}")
    raise StsrError(f"{path} is not a SpatialData store; convert it first: stsr prepare {path}")


def zarr_format(path: str | Path) -> int:
    """The zarr version of a store: 2 or 3."""
    return 2 if (Path(path) / ".zgroup").is_file() else 3


def elements(path: str | Path) -> dict[str, str]:
    """Elements of a store as {name: kind}; see `Catalogue.elements`."""
    return Catalogue(Path(path)).elements


def provenance(path: str | Path) -> dict[str, dict[str, Any]]:
    """How each element that stsr wrote was made; see `Catalogue.provenance`."""
    return Catalogue(Path(path)).provenance


def is_result(entry: dict[str, Any]) -> bool:
    """Whether an element is a result of stsr according to its provenance, rather than measured or simulated input."""
    return entry.get("origin", names.MEASURED) in names.RESULTS


def check_free(found: Catalogue, outputs: list[str], overwrite: bool) -> None:
    """Refuse to replace measured data, or results without ``overwrite``.

    Raises
    ------
    UsageError
        If an output exists and ``overwrite`` is false.
    StsrError
        If an element of that name was measured, or was not written by stsr.
    """
    made, store = found.provenance, found.path.name
    present = {name.lower(): name for name in found.elements}  # spatialdata compares names without case
    for name in outputs:
        old = present.get(name.lower())
        if old is None:
            continue
        if (
            old != name
            or old not in made
            or made[old].get("origin") == names.MEASURED
            or names.is_measured_name(old)
        ):
            raise StsrError(
                f"{old!r} in {store} is not a result of stsr and is never replaced; choose another --name"
            )
        if not overwrite:
            raise UsageError(f"{store} already has {name!r}; add --overwrite to replace it")


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of the store as a dict; empty if there is no such file.

    Raises
    ------
    StsrError
        If it is damaged.
    """
    try:
        loaded = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise StsrError(
            f"{path} is damaged; restore the store, or prepare it again with --overwrite"
        ) from None
    return loaded if isinstance(loaded, dict) else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence log messages, warnings and stdout output of spatialdata and ome-zarr: stdout carries only results."""
    loggers = [logging.getLogger(name) for name in ("spatialdata", "ome_zarr")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
