"""Features of a section: read from its cache, or computed in blocks and published in its store."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from stsr.errors import StsrError, UsageError
from stsr.features.files import FeatureFile
from stsr.features.makers import Maker, maker_of
from stsr.geometry.grid import Grid
from stsr.progress import Progress, Report, silent
from stsr.signals import Interrupted, Interruption
from stsr.store import names
from stsr.store.parts import FeatureMap
from stsr.store.section import Section
from stsr.store.writer import MapWriter
from stsr.version import __version__

_READERS = 3  # blocks that are read ahead
_LARGEST = float(np.finfo(np.float16).max)

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Caller:
    """Who waits for a computation: told of its progress and in sentences, and able to interrupt it."""

    progress: Progress = silent
    report: Report = silent
    interruption: Interruption = field(default_factory=Interruption)


def section_features(
    section: Section,
    file: FeatureFile,
    *,
    device: torch.device,
    channels: int = 0,
    pixel_um: float | None = None,
    overwrite: bool = False,
    compute: bool = True,
    caller: Caller | None = None,
) -> FeatureMap:
    """Get a section's features from its cache, or compute and cache them.

    Parameters
    ----------
    section
        A section with an H&E.
    file
        The encoder or array.
    device
        Where the encoder runs.
    channels, pixel_um
        Number of channels and pixel size, um, of a model; any if 0 or None.
    overwrite
        Replace cached features of another file of the same name.
    compute
        False refuses to write anything.
    caller
        Who is told.

    Raises
    ------
    UsageError
        If other features of this name are cached, or the channels do not fit.
    StsrError
        If the section has no image, or the file is damaged or does not fit it.
    Interrupted
        After a signal; blocks that are done are kept for the same command.
    """
    found = section.features(file.digest, pixel_um)
    if found is not None:
        _check_channels(file, found.channels, channels)
        return found
    if not compute:
        raise UsageError(
            f"{section.path.name} has no features of {file.path.name} yet; run without --dry-run"
        )
    if section.image is None:
        raise StsrError(f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE")
    caller = caller or Caller()
    element = _free_name(section, file, overwrite)
    maker = maker_of(file, section.image, pixel_um, device, caller.report)
    _check_channels(file, maker.channels, channels)
    _cache(section, element, maker, _provenance(file, maker), overwrite, caller)
    fresh = Section(section.path, section.frame.um_per_unit, section.frame.name).features(file.digest)
    assert fresh is not None, "it has just been published"
    return fresh


def _free_name(section: Section, file: FeatureFile, overwrite: bool) -> str:
    """Name of the element, which must not hold other features."""
    element = names.features_name(file.path.stem)
    if element in section.catalogue.feature_elements and not overwrite:
        raise UsageError(
            f"{section.path.name} has {element!r} of another file or pixel size; add --overwrite to replace "
            f"them, or rename {file.path.name}"
        )
    if not os.access(section.path, os.W_OK):
        raise StsrError(
            f"features cannot be cached in {section.path}: it is read-only; use a copy of the section"
        )
    return element


def _provenance(file: FeatureFile, maker: Maker) -> dict[str, Any]:
    return {
        "command": "features",
        "origin": "derived",
        "stsr": __version__,
        "kind": file.kind,
        **file.record(),
        "channels": maker.channels,
        "features_um": maker.pixel_um,
        **maker.details,
    }


def _check_channels(file: FeatureFile, found: int, wanted: int) -> None:
    if wanted and found != wanted:
        raise UsageError(
            f"{file.path.name} has {found} channels and the model reads {wanted}; "
            f"give the features that it was trained with"
        )


def _cache(
    section: Section, element: str, maker: Maker, made: dict[str, Any], overwrite: bool, to: Caller
) -> None:
    """Write the features of a section in blocks, and publish them."""
    grid = section.grid(maker.pixel_um)
    wanted = section.measured(grid)
    side = maker.side
    places = [
        (slice(row, min(row + side, grid.height)), slice(column, min(column + side, grid.width)))
        for row in range(0, grid.height, side)
        for column in range(0, grid.width, side)
    ]
    places = [place for place in places if wanted[place].any()]
    size = len(places) * side**2 * maker.channels * 2 / 2**30
    to.report(
        f"features of {section.name}: {maker.channels} channels in pixels of {maker.pixel_um:g} um, "
        f"at most {size:.2f} GB in {element!r}"
    )
    with MapWriter(
        section.path,
        [element],
        [str(number) for number in range(maker.channels)],
        grid,
        {element: made},
        overwrite,
        frame=section.frame,
        chunks=(maker.channels, side, side),
        dtype="float16",
        pyramid=False,
    ) as writer:
        writer.keep = True
        try:
            _fill(writer, maker, places, wanted, section.name, to)
        except BaseException as error:
            writer.keep = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
            raise
        writer.keep = False


def _fill(
    writer: MapWriter,
    maker: Maker,
    places: list[tuple[slice, slice]],
    wanted: np.ndarray,
    name: str,
    to: Caller,
) -> None:
    """Make the blocks that no earlier run of the same command has made."""

    def window(place: tuple[slice, slice]) -> Grid:
        rows, columns = place
        return writer.grid.window(
            rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        )

    missing = [place for place in places if not writer.is_done(_block_name(place))]
    done = len(places) - len(missing)
    prepared = _ahead(lambda place: maker.prepare(window(place), wanted[place]), missing)
    for number, (place, ready) in enumerate(prepared, done + 1):
        values = maker.make(window(place), wanted[place], ready)
        if np.abs(values).max(initial=0) > _LARGEST:
            raise StsrError(
                f"features reach {np.abs(values).max():.3g}, beyond the {_LARGEST:.0f} of 16-bit floats; scale them"
            )
        writer.write(writer.elements[0], slice(0, maker.channels), *place, values)
        writer.mark_done(_block_name(place))
        to.progress(number, len(places), f"features of {name}")
        to.interruption.stop()


def _block_name(place: tuple[slice, slice]) -> str:
    return f"{place[0].start}.{place[1].start}"


def _ahead(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Yield (item, result) in order, with some results computed ahead in threads."""
    with ThreadPoolExecutor(_READERS, "stsr-features") as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > _READERS:
                    item, result = waiting.popleft()
                    yield item, result.result()
            while waiting:
                item, result = waiting.popleft()
                yield item, result.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
