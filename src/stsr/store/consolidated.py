"""Root metadata of a store: attributes, and the consolidated copy of all metadata, which readers use.

Every edit writes a file in a scratch folder on the same file system and renames it into place. zarr 3 keeps attributes
and the consolidated copy in one file, ``zarr.json``; zarr 2 in two, ``.zattrs`` and ``.zmetadata``.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stsr.store import catalogue
from stsr.store.catalogue import Catalogue


def consolidate(store: Path) -> None:
    """Write the consolidated metadata from every group and array of the store."""
    import zarr

    with catalogue.quiet():  # zarr warns of the parquet files of shapes and points
        zarr.consolidate_metadata(zarr.storage.LocalStore(store))


def entries_of(found: Catalogue, elements: dict[str, str]) -> dict[str, Any]:
    """Consolidated metadata of elements ({name: kind}): {key: metadata}."""
    folders = {f"{kind}/{name}" for name, kind in elements.items()}
    metadata = found.consolidated or {}
    return {key: value for key, value in metadata.items() if "/".join(key.split("/")[:2]) in folders}


def kind_entries(store: Path, kinds: set[str]) -> dict[str, Any]:
    """Metadata of the groups of kinds (``images``, ``labels``), read from disk."""
    files = (".zgroup", ".zattrs") if catalogue.zarr_format(store) == 2 else ("zarr.json",)
    found = {f"{kind}/{file}": catalogue.load_json(store / kind / file) for kind in kinds for file in files}
    return {key.removesuffix("/zarr.json"): value for key, value in found.items() if value}


def edit_consolidated(
    store: Path,
    scratch: Path,
    drop: dict[str, str] | None = None,
    add: dict[str, Any] | None = None,
    also: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Change the consolidated metadata, if the store has them, in one atomic write.

    Parameters
    ----------
    store, scratch
        The store, and a folder on the same file system.
    drop
        Elements to remove, {name: kind}.
    add
        Metadata to add, {key: metadata}.
    also
        Edits the root attributes in the same write (zarr 3 only, where both are in one file).
    """
    file = store / (".zmetadata" if catalogue.zarr_format(store) == 2 else "zarr.json")
    whole = catalogue.load_json(file)
    holder = whole if catalogue.zarr_format(store) == 2 else whole.get("consolidated_metadata") or {}
    metadata = holder.get("metadata")
    if metadata is not None:
        folders = {f"{kind}/{name}" for name, kind in (drop or {}).items()}
        kept = {key: value for key, value in metadata.items() if "/".join(key.split("/")[:2]) not in folders}
        merged = {**kept, **(add or {})}
        # zarr builds its tree in this order, and needs all groups of one depth before the next.
        holder["metadata"] = {
            key: merged[key] for key in sorted(merged, key=lambda key: (key.count("/"), key))
        }
        if catalogue.zarr_format(store) == 2:
            holder["metadata"][".zattrs"] = catalogue.Catalogue(store).attributes
    if also is not None:
        also(whole.setdefault("attributes", {}))
    if metadata is not None or also is not None:
        write_json(file, whole, scratch)


def edit_root(store: Path, scratch: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the root attributes in one atomic write per file."""
    if catalogue.zarr_format(store) == 3:
        whole = catalogue.load_json(store / "zarr.json")
        edit(whole.setdefault("attributes", {}))
        write_json(store / "zarr.json", whole, scratch)
        return
    attributes = catalogue.Catalogue(store).attributes
    edit(attributes)
    write_json(store / ".zattrs", attributes, scratch)
    edit_consolidated(store, scratch)


def list_labels(store: Path, scratch: Path) -> None:
    """Update the list of labels in the attributes of their group, which OME-Zarr readers use."""
    group = store / "labels"
    file = group / (".zattrs" if (group / ".zgroup").exists() else "zarr.json")
    whole = catalogue.load_json(file)
    attributes = whole if file.name == ".zattrs" else whole.get("attributes", {})
    holder = attributes.get("ome", attributes)
    if "labels" in holder:
        present = sorted(child.name for child in group.iterdir() if child.is_dir())
        if holder["labels"] != present:
            holder["labels"] = present
            write_json(file, whole, scratch)


def write_json(path: Path, content: dict[str, Any], scratch: Path) -> None:
    """Write JSON to ``path`` atomically, by a rename from the scratch folder."""
    temporary = scratch / f"json-{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
