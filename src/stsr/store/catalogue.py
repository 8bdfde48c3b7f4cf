"""What is in a store, without opening it.

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
from pathlib import Path

from stsr.errors import StsrError, UsageError
from stsr.store import names


def is_store(path) -> bool:
    """Whether the folder is a zarr group, as SpatialData stores are."""
    path = Path(path)
    if (path / ".zgroup").is_file():
        return True
    return load_json(path / "zarr.json").get("node_type") == "group"


def require_store(path) -> Path:
    """The real path (links resolved) of an existing store.

    Raises
    ------
    StsrError
        If there is none.
    """
    real = Path(path).resolve()
    if is_store(real):
        return real
    if not real.exists():
        raise StsrError(f"there is no section at {path}; make one: stsr prepare FOLDER --output {path}")
    raise StsrError(f"{path} is not a SpatialData store; make one of it: stsr prepare {path}")


def zarr_format(path) -> int:
    """2 or 3: the zarr version of a store."""
    return 2 if (Path(path) / ".zgroup").is_file() else 3


def elements(path) -> dict[str, str]:
    """Elements of a store as {name: kind}, the kinds being SpatialData's: images, labels, points, shapes, tables.

    Follows what a reader sees: the consolidated metadata if there is any, else the folders.
    """
    path = Path(path)
    found_names = _consolidated_names(path)
    if found_names is None:
        found_names = [f"{kind}/{child.name}" for kind in names.KINDS for child in _folders(path / kind)]
    found = {}
    for name in found_names:
        kind, _, element = name.partition("/")
        if kind in names.KINDS and element and "/" not in element and (path / kind / element).is_dir():
            found[element] = kind
    return found


def root_attributes(path) -> dict:
    """Attributes of the store's root group."""
    path = Path(path)
    return (
        load_json(path / ".zattrs")
        if zarr_format(path) == 2
        else load_json(path / "zarr.json").get("attributes", {})
    )


def element_attributes(path, element: str) -> dict:
    """Attributes of an element's zarr group, whichever the zarr version.

    Raises
    ------
    StsrError
        If the store has no such element.
    """
    path = Path(path)
    kind = elements(path).get(element)
    if kind is None:
        raise StsrError(
            f"{path.name} has no element {element!r}; it has: {', '.join(elements(path)) or 'nothing'}"
        )
    group = path / kind / element
    return (
        load_json(group / ".zattrs")
        if (group / ".zgroup").is_file()
        else load_json(group / "zarr.json").get("attributes", {})
    )


def image_metadata(path, element: str) -> tuple[list[str], list[str]]:
    """Array folders of an image or labels element from fine to coarse, and its channel names (empty if unnamed)."""
    attributes = element_attributes(path, element)
    ome = attributes.get("ome", attributes)
    levels = [dataset["path"] for dataset in ome["multiscales"][0]["datasets"]]
    channels = ome.get("omero", attributes.get("omero", {})).get("channels", [])
    return levels, [str(channel["label"]) for channel in channels]


def provenance(path) -> dict[str, dict]:
    """How each element that stsr wrote was made: {element: {"command": ..., "seed": ..., ...}}."""
    found = root_attributes(path).get(names.ATTRS_KEY)
    return found if isinstance(found, dict) else {}


def is_result(entry: dict) -> bool:
    """Whether an element's provenance says that it is a result: neither measured nor simulated input."""
    return entry.get("origin", names.MEASURED) in names.RESULTS


def superres_elements(path) -> list[str]:
    """Super-resolved maps in the store, newest first, without their spreads."""
    made = provenance(path)

    def is_map(name: str, kind: str) -> bool:
        by_us = made.get(name, {}).get("command") == "superres" and not names.is_spread(name)
        return kind == "images" and (by_us or names.is_superres(name))

    found = [name for name, kind in elements(path).items() if is_map(name, kind)]
    return sorted(found, key=lambda name: (made.get(name, {}).get("written", ""), name), reverse=True)


def newest_superres(path) -> str:
    """The super-resolved map that was written last.

    Raises
    ------
    StsrError
        If there is none.
    """
    found = superres_elements(path)
    if not found:
        raise StsrError(f"{Path(path).name} has no super-resolved map; run: stsr superres {path}")
    return found[0]


def hr_elements(path) -> list[str]:
    """Measured counts per bin in the store, finest first."""
    found = [name for name, kind in elements(path).items() if kind == "images" and names.is_hr(name)]
    return sorted(found, key=names.bin_um_of)


def check_free(path, outputs: list[str], overwrite: bool) -> None:
    """Refuse outputs that would replace something that must stay.

    Raises
    ------
    UsageError
        If an output exists and ``overwrite`` is false, or a name cannot be an output's.
    StsrError
        If an element of that name was measured, or was not written by stsr.
    """
    path = Path(path)
    made = provenance(path)
    present = {name.lower(): name for name in elements(path)}  # spatialdata compares names without case
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
                f"{old!r} in {path.name} is not a result of stsr and stays as it is; choose another --name"
            )
        if not overwrite:
            raise UsageError(f"{path.name} already has {name!r}; add --overwrite to replace it")


def _consolidated_names(path: Path) -> list[str] | None:
    if zarr_format(path) == 2:
        metadata = load_json(path / ".zmetadata").get("metadata")
        return (
            None
            if metadata is None
            else [key.rpartition("/")[0] for key in metadata if key.endswith(".zgroup")]
        )
    consolidated = load_json(path / "zarr.json").get("consolidated_metadata")
    return None if consolidated is None else list(consolidated["metadata"])


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def load_json(path: Path) -> dict:
    """A JSON file of the store as a dict, empty if there is no such file.

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
    """Keep the talk of spatialdata and ome-zarr off stdout, which belongs to the next command in the pipeline."""
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
