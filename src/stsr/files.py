"""Reading files that may be damaged, and writing files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from stsr.errors import StsrError

_OUR_OWN = (StsrError, MemoryError)


@contextmanager
def reading(path: Path):
    """Turn whatever a damaged file raises while it is read into one sentence.

    Raises
    ------
    StsrError
        If the file is missing, cut short or not what its name says.
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
        # pyarrow, h5py, tifffile, PIL and zarr all raise children of these for a truncated file.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise StsrError(
            f"{path} is damaged or cut short ({reason}); copy it again from its source"
        ) from error


def find(folder: Path, *patterns: str) -> Path | None:
    """The first file of a folder that matches the first pattern with any match, in name order."""
    for pattern in patterns:
        # Files that macOS writes beside others ("._name") are not the file.
        matches = sorted(p for p in folder.glob(pattern) if not p.name.startswith("._"))
        if matches:
            return matches[0]
    return None


def need(folder: Path, *patterns: str, what: str) -> Path:
    """As ``find``, but a missing file is refused.

    Raises
    ------
    StsrError
        Naming the file that is missing and what it is for.
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


def check_writable(path) -> None:
    """Fail early where a store cannot be written to.

    Raises
    ------
    StsrError
        If the store or the folder it lies in is read-only.
    """
    store = Path(path).resolve()
    for place in (store, store.parent):
        if place.exists() and not os.access(place, os.W_OK):
            raise StsrError(f"cannot write to {place}: it is read-only; write elsewhere with --output")


@contextmanager
def disk_errors(path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence.

    Raises
    ------
    StsrError
        For ENOSPC, EDQUOT, EACCES, EPERM and EROFS; other errors pass.
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
    """Write a file in one step: yields a temporary path beside it, which replaces it when the block ends well.

    The temporary name depends on the file alone, so what a killed process left is overwritten by the next.

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


def lock(handle: IO) -> bool:
    """Lock an open file for this process until it is closed; False if another process holds it.

    On file systems without locks everyone succeeds: one writer at a time, then.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True
