"""Where things are prepared before they appear in a store: hidden folders beside it, locks, and a disk's refusals."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stsr.errors import StsrError
from stsr.files import check_writable, lock

JOURNAL = "swap.json"
"""Kept in a workspace while a publication is under way; see `stsr.store.publishing`."""

_OWNER = "owner"
_LOCK_PATIENCE_S = 120.0  # a publication holds the lock for well below a second


class Workspace:
    """A hidden folder beside a store in which one process prepares one output.

    Its owner holds a lock on a file in it, which the kernel frees when the process ends, however it ends. Leaving the
    ``with`` block removes the folder, unless ``keep`` is set.
    """

    def __init__(self, store: Path, key: str):
        self.store = store
        self.path = store.parent / f".{store.name}.stsr-{key}"
        self.new = self.path / "new.zarr"
        self.keep = False
        self._owner = None

    def __enter__(self) -> Workspace:
        check_writable(self.store)
        if not self.acquire():
            output = self.path.name.partition(".stsr-")[2]
            raise StsrError(f"another stsr is writing {output!r} of {self.store.name}; wait until it is done")
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Remove it, or leave it for others if it is to be kept."""
        # A journal that could not be undone still knows where the old elements are.
        if self.keep or (self.path / JOURNAL).exists():
            self.release()
        else:
            self.remove()

    def acquire(self) -> bool:
        """Make it ours; False if another living process has it."""
        while True:
            self.path.mkdir(exist_ok=True)
            try:
                handle = open(self.path / _OWNER, "w")  # noqa: SIM115 - held as long as the workspace is
            except FileNotFoundError:  # its last owner removed it just now
                continue
            if not lock(handle):
                handle.close()
                return False
            if _is_same_file(handle, self.path / _OWNER):
                self._owner = handle
                return True
            handle.close()

    def wipe(self) -> None:
        """Remove what an earlier, killed run left."""
        for child in self.path.iterdir():
            if child.name != _OWNER:
                remove_path(child)

    def release(self) -> None:
        """Let others have it, contents and all."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def remove(self) -> None:
        """Remove it from disk."""
        with suppress(OSError):
            self.wipe()
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """One writer at a time. The lock file lies beside the store and goes when nobody needs it."""
    path = store.parent / f".{store.name}.stsr.lock"
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        handle = open(path, "w")  # noqa: SIM115 - closed below, after the work
        if lock(handle) and _is_same_file(handle, path):
            break
        handle.close()
        if time.monotonic() > deadline:
            raise StsrError(
                f"another process has been writing to {store.name} for long; wait until it is done"
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def _is_same_file(handle, path: Path) -> bool:
    """Whether an open file is still the one at that path: its last owner may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def exchange(new: Path, store: Path, aside: Path) -> None:
    """Put a new folder where an old one is, in one step where the system can, and leave the old one to be removed."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(store), exchange) == 0:
        return
    os.rename(store, aside)
    os.rename(new, store)


def move(source: Path, target: Path) -> None:
    """Rename into a folder that may not be there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
