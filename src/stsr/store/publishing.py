"""Safe writing: new stores and elements appear complete or not at all, even if the process is killed.

Everything is first written to a *workspace*, a hidden folder beside the store (``.sample.zarr.stsr-superres_x10``) on
the same file system, and then renamed into place. Nothing foreign is ever put inside the store. A publication is:

1. elements that are to be replaced leave the consolidated metadata (one atomic write), so no reader looks for them;
2. their folders move out, the new folders move in;
3. the root metadata, with the provenance, lists the new elements (one atomic write): from here on they are published.

A journal in the workspace lets the next writer undo steps 1 and 2 after a kill, or clean up after step 3. Readers need
no repair: the store opens in every state. Writers take turns by ``flock`` on a hidden file beside the store.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.files import check_writable, disk_errors
from stsr.store import catalogue, names
from stsr.store.catalogue import Catalogue
from stsr.store.consolidated import (
    consolidate,
    edit_consolidated,
    edit_root,
    entries_of,
    kind_entries,
    list_labels,
    write_json,
)
from stsr.store.threads import own_threads
from stsr.store.workspace import JOURNAL, Workspace, exchange, locked, move, remove_path

if TYPE_CHECKING:
    from spatialdata import SpatialData


def create(
    path: str | Path,
    sdata: SpatialData,
    provenance: dict[str, dict],
    overwrite: bool = False,
    um_per_unit: float = 1.0,
    coordinate_system: str = "global",
    attributes: Mapping[str, str] | None = None,
) -> Path:
    """Write a new section store.

    Parameters
    ----------
    path
        Path of the new store.
    sdata
        In memory or lazy (it may read from a store at ``path`` itself).
    provenance
        {element: {...}}: how each element was made. Elements without ``origin`` count as measured.
    overwrite
        Replace an existing store.
    um_per_unit, coordinate_system
        The section's coordinate system, and the um per unit of it.
    attributes
        Further attributes of the store.

    Returns
    -------
    path
        The store.

    Raises
    ------
    UsageError
        If the store exists and ``overwrite`` is false.
    StsrError
        If ``path`` is something else, or cannot be written to, or the disk is full.
    """
    import zarr

    store = Path(path).resolve()
    _check_target(store, path, overwrite)
    with disk_errors(store), Workspace(store, "new") as work:
        if (work.path / "replaced.zarr").exists() and not store.exists():
            os.rename(work.path / "replaced.zarr", store)  # a killed run without an atomic exchange
        work.wipe()
        # To look for empty chunks takes zarr longer than to compress them.
        with catalogue.quiet(), own_threads(), zarr.config.set({"array.write_empty_chunks": True}):
            sdata.write(work.new, update_sdata_path=False)
        consolidate(work.new)  # spatialdata does not, if ``update_sdata_path`` is false
        record = {name: {"origin": names.MEASURED, **entry} for name, entry in provenance.items()}
        stamp = {"written": _now()}
        root_attributes = {
            **(attributes or {}),
            names.ATTRS_KEY: {name: _plain({**entry, **stamp}) for name, entry in record.items()},
            names.FRAME_KEY: {"coordinate_system": coordinate_system, "um_per_unit": float(um_per_unit)},
        }
        edit_root(work.new, work.path, lambda root: root.update(root_attributes))
        with locked(store):
            _check_target(store, path, overwrite)
            if store.exists():
                exchange(work.new, store, aside=work.path / "replaced.zarr")
            else:
                os.rename(work.new, store)
    return Path(path)


def publish(
    path: str | Path, elements: dict[str, Any], provenance: dict[str, dict], overwrite: bool = False
) -> None:
    """Write elements into an existing store, all of them or none.

    Parameters
    ----------
    path
        The store.
    elements
        {name: SpatialData element or AnnData table}.
    provenance
        {name: {...}}, JSON-able; kept in the store's root attributes.
    overwrite
        Replace results of stsr of the same names.

    Raises
    ------
    UsageError
        If an element exists and ``overwrite`` is false.
    StsrError
        If an element of that name was not made by stsr, or the store cannot be written to, or the disk is full.
    """
    store = catalogue.require_store(path)
    with disk_errors(store), Workspace(store, next(iter(elements))) as work:
        recover(store, work)
        catalogue.check_free(Catalogue(store), list(elements), overwrite)
        work.wipe()
        write_elements(work.new, elements, catalogue.zarr_format(store))
        swap(store, work, provenance, overwrite)


def write_elements(path: Path, elements: dict[str, Any], zarr_format: int) -> None:
    """Write elements as a separate store, in the container format of the zarr version."""
    from spatialdata import SpatialData

    with catalogue.quiet():
        SpatialData.init_from_elements(elements).write(path, **container(zarr_format))


def container(zarr_format: int) -> dict:
    """Arguments of ``SpatialData.write`` for a zarr version."""
    if zarr_format == 3:
        return {}
    from spatialdata._io.format import SpatialDataContainerFormatV01

    return {"sdata_formats": SpatialDataContainerFormatV01()}


def swap(
    store: Path, work: Workspace, provenance: dict[str, dict], overwrite: bool, optional: Collection[str] = ()
) -> None:
    """Publish every element of the workspace's store into the store.

    Elements named in ``optional`` are skipped if the store already has them, written by any tool.

    Raises
    ------
    UsageError, StsrError
        As `publish`; the store is then unchanged.
    """
    with locked(store):
        _recover_all(store, work)
        found = Catalogue(store)  # as long as the lock is held, nobody else changes the store
        if found.consolidated is None:
            consolidate(store)  # without it readers list the folders, and see new elements one by one
            found = Catalogue(store)
        present = found.elements
        unneeded = set(optional) & {name.lower() for name in present}
        made = {name: kind for name, kind in catalogue.elements(work.new).items() if name not in unneeded}
        catalogue.check_free(found, list(made), overwrite)
        # The spread and samples of a replaced map are removed with it: they would describe another map.
        spreads = [names.spread_name(name) for name in made]
        samples = [name for name in present if names.map_of_sample(name) in made]
        ours = [name for name in (*spreads, *samples) if name in found.provenance and name not in made]
        replaced = {name: present[name] for name in (*made, *ours) if name in present}
        journal = {
            "token": uuid.uuid4().hex,
            "new": made,
            "old": replaced,
            "old_entries": entries_of(found, replaced),
            "old_provenance": {name: found.provenance.get(name, {}) for name in replaced},
            "provenance": {name: _plain(provenance.get(name, {})) for name in made},
        }
        write_json(work.path / JOURNAL, journal, work.path)
        try:
            _swap(store, work, journal)
        except BaseException:
            _undo(store, work, journal)
            raise
        (work.path / JOURNAL).unlink()


def _swap(store: Path, work: Workspace, journal: dict) -> None:
    if journal["old"]:
        edit_consolidated(store, work.path, drop=journal["old"])
    for name, kind in journal["old"].items():
        move(store / kind / name, work.path / "old" / kind / name)
    for kind in set(journal["new"].values()):
        _ensure_kind(store, work, kind)
    for name, kind in journal["new"].items():
        os.rename(work.new / kind / name, store / kind / name)
    list_labels(store, work.path)
    _commit(store, work, journal)


def _commit(store: Path, work: Workspace, journal: dict) -> None:
    """List the new elements in the root metadata: one file in zarr 3; in zarr 2 the attributes are written first."""
    entries = entries_of(Catalogue(work.new), journal["new"])
    entries.update(kind_entries(store, set(journal["new"].values())))
    stamp = {"written": _now(), "token": journal["token"]}

    def record(root: dict) -> None:
        _forget(
            root, journal["old"], {name: {**entry, **stamp} for name, entry in journal["provenance"].items()}
        )

    if catalogue.zarr_format(store) == 2:
        edit_root(store, work.path, record)
        edit_consolidated(store, work.path, add=entries)
    else:
        edit_consolidated(store, work.path, add=entries, also=record)


def recover(store: Path, work: Workspace) -> None:
    """Complete or undo publications that killed runs left unfinished, under the store's lock."""
    with locked(store):
        _recover_all(store, work)


def _recover_all(store: Path, work: Workspace) -> None:
    for path in sorted(store.parent.glob(f".{glob.escape(store.name)}.stsr-*/{JOURNAL}")):
        if path.parent == work.path:
            _settle(store, work)
            continue
        other = Workspace(store, path.parent.name.partition(".stsr-")[2])
        if other.acquire():
            _settle(store, other)
            other.keep = (other.path / "new.zarr").exists()  # finished blocks of a map, for the same command
            other.close()


def _settle(store: Path, work: Workspace) -> None:
    try:
        journal = json.loads((work.path / JOURNAL).read_text())
    except FileNotFoundError:
        return
    done = catalogue.provenance(store)
    if any(done.get(name, {}).get("token") == journal["token"] for name in journal["new"]):
        _commit(store, work, journal)  # again: in zarr 2 the consolidated metadata may be missing
        work.wipe()
    else:
        _undo(store, work, journal)


def _undo(store: Path, work: Workspace, journal: dict) -> None:
    """Restore the store and move the new elements back to the workspace. Safe to kill and repeat."""
    edit_consolidated(store, work.path, drop={**journal["new"], **journal["old"]})
    for name, kind in journal["new"].items():
        old_moved = name in journal["old"] and (work.path / "old" / journal["old"][name] / name).exists()
        came_in = (store / kind / name).exists() and not (work.new / kind / name).exists()
        if came_in and (old_moved or name not in journal["old"]):
            move(store / kind / name, work.new / kind / name)
    for name, kind in journal["old"].items():
        if (work.path / "old" / kind / name).exists():
            move(work.path / "old" / kind / name, store / kind / name)
    list_labels(store, work.path)
    restored = {name: entry for name, entry in journal["old_provenance"].items() if entry}
    edit_root(store, work.path, lambda root: _forget(root, journal["new"], restored))
    edit_consolidated(store, work.path, add=journal["old_entries"])
    (work.path / JOURNAL).unlink()


def _forget(root: dict, elements, instead: dict) -> None:
    found = root.setdefault(names.ATTRS_KEY, {})
    for name in elements:
        found.pop(name, None)
    found.update(instead)


def _ensure_kind(store: Path, work: Workspace, kind: str) -> None:
    """Make the group of a kind (``images``) if needed: prepared aside and renamed, so that it always has metadata."""
    if (store / kind).exists():
        return
    fresh = work.path / f"group-{kind}"
    remove_path(fresh)
    fresh.mkdir()
    for file in ("zarr.json", ".zgroup", ".zattrs"):
        if (work.new / kind / file).exists():
            shutil.copyfile(work.new / kind / file, fresh / file)
    os.rename(fresh, store / kind)


def _check_target(store: Path, shown, overwrite: bool) -> None:
    check_writable(store)
    if not store.parent.is_dir():
        raise StsrError(f"there is no folder {store.parent}; make it, or choose another --output")
    if not store.exists():
        return
    if not catalogue.is_store(store):
        raise StsrError(f"{shown} exists and is not a SpatialData store; choose another --output")
    if not overwrite:
        raise UsageError(f"{shown} exists; add --overwrite to replace it, or choose another --output")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _plain(value):
    """Convert a value to plain JSON types."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value
