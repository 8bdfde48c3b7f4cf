"""Read files that may be damaged, and write files atomically."""

from __future__ import annotations

import errno
import fcntl
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from stsr.errors import StsrError

_OUR_OWN = (StsrError, MemoryError)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report any error while a file is read as one sentence.

    Raises
    ------
    StsrError
        If the file is missing, damaged, truncated, or not of the expected format.
    """
    try:
        yield
    except _OUR_OWN:
        raise
    except FileNotFoundError as error:
        raise StsrError(f"{path} is missing; copy it again from the instrument's output") from error
    except PermissionError as error:
        raise StsrError(f"{path} cannot be read: permission denied; ask its owner for read access") from error
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        RuntimeError,
        IndexError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        # The exceptions of pyarrow, h5py, tifffile, PIL and zarr for truncated files derive from these.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise StsrError(
            f"{path} is damaged or cut short ({reason}); copy it again from its source"
        ) from error


def find(folder: Path, *patterns: str) -> Path | None:
    """Find the first file, by name, of the first pattern that matches any file in a folder; None without a match."""
    for pattern in patterns:
        # macOS writes metadata into files called "._name".
        matches = sorted(p for p in folder.glob(pattern) if not p.name.startswith("._"))
        if matches:
            return matches[0]
    return None


def need(folder: Path, *patterns: str, what: str) -> Path:
    """Find a file as `find` does, and raise if it is missing.

    Raises
    ------
    StsrError
        If no file matches; names the missing file and what it contains.
    """
    found = find(folder, *patterns)
    if found is None:
        raise StsrError(
            f"{patterns[0]} ({what}) is missing in {folder}; copy it from the instrument's output"
        )
    return found


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # file systems without locks
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_writable(path: str | Path) -> None:
    """Check early that a store can be written to.

    Raises
    ------
    StsrError
        If the store or its parent folder is read-only.
    """
    store = Path(path).resolve()
    for place in (store, store.parent):
        if place.exists() and not os.access(place, os.W_OK):
            raise StsrError(f"cannot write to {place}: it is read-only; write elsewhere with --output")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Report a full or read-only disk as one sentence.

    Raises
    ------
    StsrError
        For ENOSPC, EDQUOT, EACCES, EPERM and EROFS; other errors are not caught.
    """
    try:
        yield
    except OSError as error:
        number = error.errno
        if number in _FULL or "No space left" in str(error):
            raise StsrError(
                f"the disk of {Path(path).parent} is full; free some space or write elsewhere"
            ) from error
        if number in _FORBIDDEN:
            place = error.filename or path
            raise StsrError(
                f"cannot write to {place}: permission denied; write elsewhere with --output"
            ) from error
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path beside it, which replaces the file if the block succeeds.

    The temporary name depends on the file only, so that a file left by a killed process is overwritten by the next.

    Raises
    ------
    StsrError
        As `disk_errors`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def lock(handle: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False if another process holds the lock.

    On file systems without locks this always succeeds; users then must not run two writers at once.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True
