"""Hidden folders beside a store, in which elements are prepared before they are published, and their locks."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stsr.errors import StsrError
from stsr.files import check_writable, lock

JOURNAL = "swap.json"
"""File in a workspace while a publication is under way; see `stsr.store.publishing`."""

_OWNER = "owner"
_LOCK_PATIENCE_S = 120.0  # a publication holds the lock for well below a second


class Workspace:
    """A hidden folder beside a store, in which one process prepares one output.

    The process holds a lock on a file in the folder, which the kernel releases when the process ends, even if it is
    killed. Leaving the ``with`` block removes the folder, unless ``keep`` is set.

    Parameters
    ----------
    store
        The store.
    key
        The output, such as ``superres_x10``.

    Attributes
    ----------
    path
        The folder.
    new
        The store in it that holds the new elements.
    keep
        Whether the folder stays when the ``with`` block ends.
    """

    def __init__(self, store: Path, key: str):
        self.store = store
        self.path = store.parent / f".{store.name}.stsr-{key}"
        self.new = self.path / "new.zarr"
        self.keep = False
        self._owner: IO | None = None

    def __enter__(self) -> Workspace:
        check_writable(self.store)
        if not self.acquire():
            output = self.path.name.partition(".stsr-")[2]
            raise StsrError(f"another stsr is writing {output!r} of {self.store.name}; wait until it is done")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder, unless it is to be kept, and unlock it."""
        # A journal that could not be undone still tells where the old elements are.
        if not self.keep and not (self.path / JOURNAL).exists():
            with suppress(OSError):
                self.wipe()
                shutil.rmtree(self.path, ignore_errors=True)
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def acquire(self) -> bool:
        """Lock the folder for this process, making it if needed; False if another process holds it."""
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                handle = open(self.path / _OWNER, "w")  # noqa: SIM115 - open as long as the workspace is held
            except FileNotFoundError:  # its last owner has just removed it
                continue
            if not lock(handle):
                handle.close()
                return False
            if _is_same_file(handle, self.path / _OWNER):
                self._owner = handle
                return True
            handle.close()

    def wipe(self) -> None:
        """Remove what remains of a killed run from the folder."""
        for child in self.path.iterdir():
            if child.name != _OWNER:
                remove_path(child)


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Let one process at a time change a store. The lock file lies beside the store and is removed after use.

    Raises
    ------
    StsrError
        If another process holds the lock for two minutes.
    """
    path = store.parent / f".{store.name}.stsr.lock"
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        handle = open(path, "w")  # noqa: SIM115 - closed below, after the work
        if lock(handle) and _is_same_file(handle, path):
            break
        handle.close()
        if time.monotonic() > deadline:
            raise StsrError(
                f"another process has been writing to {store.name} for two minutes; wait until it is done"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def _is_same_file(handle: IO, path: Path) -> bool:
    """Whether an open file is still the one at the path; another process may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def exchange(new: Path, store: Path, aside: Path) -> None:
    """Replace an old folder by a new one, in one step if the system supports it. The caller removes the old one."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(store), exchange) == 0:
        return
    os.rename(store, aside)
    os.rename(new, store)


def move(source: Path, target: Path) -> None:
    """Rename into a folder, which is made if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
