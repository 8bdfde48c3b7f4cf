"""The section's store on disk: the only place that knows element names, and what is in a store without opening it.

A store is an ordinary SpatialData zarr store, in zarr 3 (container 0.2) or zarr 2 (container 0.1). Everything here
reads small JSON files; spatialdata and zarr are not needed. Writing is in `stsr.store.publishing`.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM

HE = "he"
SPOTS = "spots"
TISSUE = "tissue"
CELLS = "cells"

KINDS = ("images", "labels", "points", "shapes", "tables")
ATTRS_KEY = "stsr"
"""Root attribute with the provenance of every element that stsr wrote: {element: {...}}."""
FRAME_KEY = "stsr_frame"
"""Root attribute of stores that stsr created: {"coordinate_system": name, "um_per_unit": value}."""
MEASURED = "measured"
"""``origin`` in the provenance of an element that came from an instrument; such elements are never replaced."""
RESULTS = ("predicted", "derived")
"""``origin`` of what a method said of a section, and of what was computed from its elements."""

_HR = re.compile(r"^hr_(\d+(?:\.\d+)?)um$")
_SUPERRES = re.compile(r"^superres_x(\d+(?:\.\d+)?)$")
_SPREAD = "_sd"


# ----------------------------------------------------------------------------------------------------- names


def table_name(element: str) -> str:
    """Name of the table that annotates an element: ``spots`` -> ``spots_table``.

    SpatialData 0.7 wants names unique over all kinds, so shapes and their table cannot share one.
    """
    return f"{element}_table"


def hr_name(bin_um: float) -> str:
    """Name of measured counts per bin: 10 -> ``hr_10um``."""
    return f"hr_{bin_um:g}um"


def superres_name(scale: float) -> str:
    """Name of a super-resolved map: 10 -> ``superres_x10`` (bins of 100 um / 10)."""
    return f"superres_x{scale:g}"


def celltype_name(scale: float) -> str:
    """Name of a cell type map: 10 -> ``celltype_x10``."""
    return f"celltype_x{scale:g}"


def gec_name(scale: float) -> str:
    """Name of a gene expression correlation table: 10 -> ``gec_x10``."""
    return f"gec_x{scale:g}"


def cells_name(scale: float) -> str:
    """Name of a cells x genes table: 10 -> ``cells_x10``."""
    return f"cells_x{scale:g}"


def spread_name(element: str) -> str:
    """Name of the spread over samples that belongs to a map: ``superres_x10`` -> ``superres_x10_sd``."""
    return element + _SPREAD


def bin_um_of(element: str) -> float | None:
    """Bin size in um that a map's name tells, or None when it tells none."""
    if match := _HR.match(element):
        return float(match[1])
    if match := _SUPERRES.match(element.removesuffix(_SPREAD)):
        return LR_UM / float(match[1])
    return None


def scale_of(element: str) -> float | None:
    """Scale (100 um / bin size) that a map's name tells, or None."""
    bin_um = bin_um_of(element)
    return None if bin_um is None else LR_UM / bin_um


def is_measured_name(element: str) -> bool:
    """Whether the name is kept for measured data: ``he``, ``spots``, ``tissue``, ``cells``, their tables, ``hr_*``."""
    base = element.lower().removesuffix("_table")
    return base in (HE, SPOTS, TISSUE, CELLS) or base.startswith("hr_")


def check_name(element: str) -> str:
    """The name itself, if it can be an output's name.

    Raises
    ------
    UsageError
        If SpatialData would refuse it, or it is kept for measured data.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", element):
        raise UsageError(f"an element cannot be called {element!r}; use letters, digits, '_', '-' and '.'")
    if is_measured_name(element):
        raise UsageError(f"the name {element!r} is kept for measured data; choose another with --name")
    return element


# ------------------------------------------------------------------------------------------ what a store holds


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
    names = _consolidated_names(path)
    if names is None:
        names = [f"{kind}/{child.name}" for kind in KINDS for child in _folders(path / kind)]
    found = {}
    for name in names:
        kind, _, element = name.partition("/")
        if kind in KINDS and element and "/" not in element and (path / kind / element).is_dir():
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
    found = root_attributes(path).get(ATTRS_KEY)
    return found if isinstance(found, dict) else {}


def is_result(entry: dict) -> bool:
    """Whether an element's provenance says that it is a result: neither measured nor simulated input."""
    return entry.get("origin", MEASURED) in RESULTS


def superres_elements(path) -> list[str]:
    """Super-resolved maps in the store, newest first, without their spreads."""
    made = provenance(path)

    def is_map(name: str, kind: str) -> bool:
        by_us = made.get(name, {}).get("command") == "superres" and not name.endswith(_SPREAD)
        return kind == "images" and (by_us or bool(_SUPERRES.match(name)))

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
    found = [name for name, kind in elements(path).items() if kind == "images" and _HR.match(name)]
    return sorted(found, key=bin_um_of)


def check_free(path, names: list[str], overwrite: bool) -> None:
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
    for name in names:
        old = present.get(name.lower())
        if old is None:
            continue
        if old != name or old not in made or made[old].get("origin") == MEASURED or is_measured_name(old):
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
