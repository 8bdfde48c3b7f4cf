"""Patch features of a section's H&E: computed by an encoder or read from an array, once, and cached in its store."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from stsr.errors import StsrError, UsageError
from stsr.files import reading
from stsr.geometry.grid import Grid
from stsr.histology.features import PatchArray, features_um_of, open_patches, placing_file, resampled
from stsr.histology.image import Image
from stsr.nn.frozen import TORCHSCRIPT, WEIGHTS, FrozenEncoder, config_file, load_encoder
from stsr.progress import Progress, Report, silent
from stsr.signals import Interrupted, Interruption
from stsr.store import names
from stsr.store.parts import FeatureMap
from stsr.store.section import Section
from stsr.store.writer import MapWriter
from stsr.version import __version__

_SAMPLE_BYTES = 2**20
_DIGITS = 12  # of the sha256, as for checkpoints
_MARGIN = 1 / 8  # of a window, on each side, whose patches see too little around them and are cropped
_CHUNK_PX, _BLOCK_UM = 32, 1000.0  # largest sides of a block, which is one chunk
_WINDOWS_AT_ONCE = 16
_READERS = 3  # blocks of the image read ahead
_LARGEST = float(np.finfo(np.float16).max)

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class FeatureFile:
    """A file that gives features.

    Parameters
    ----------
    path
        An array (``.npy``, or the folder of a zarr array), or an encoder (``.pt``, ``.ts``, ``.safetensors``).
    """

    path: Path

    @property
    def kind(self) -> str:
        """``"encoder"`` or ``"array"``."""
        return "encoder" if self.path.suffix in (*TORCHSCRIPT, *WEIGHTS) else "array"

    @cached_property
    def digest(self) -> str:
        """First 12 digits of a sha256 of size, first and last MB, and settings in a JSON file beside it.

        Whole files are not hashed: they can have many GB. Of a zarr array, these are the names and sizes of all
        chunks, the metadata, and the content of some chunks.
        """
        if self.path.is_dir():
            parts = sorted(part for part in self.path.rglob("*") if part.is_file())
            sampled = {part for part in parts if part.suffix == ".json" or part.name.startswith(".")}
            sampled.update(parts[:: max(1, len(parts) // 8)])
        else:
            beside = config_file(self.path) if self.kind == "encoder" else placing_file(self.path)
            parts = [self.path, *([beside] if beside is not None and beside.is_file() else [])]
            sampled = set(parts)
        total = hashlib.sha256()
        for part in parts:
            size = part.stat().st_size
            named = str(part.relative_to(self.path)) if self.path.is_dir() else part.suffix
            total.update(f"{named}/{size}/".encode())
            if part in sampled:
                with reading(part), open(part, "rb") as file:
                    total.update(file.read(_SAMPLE_BYTES))
                    file.seek(max(0, size - _SAMPLE_BYTES))
                    total.update(file.read())
        return total.hexdigest()[:_DIGITS]

    def record(self) -> dict[str, str]:
        """Name and digest for provenance."""
        return {"file": self.path.name, "digest": self.digest}


def feature_file(path: str | Path, section: Section | None = None) -> FeatureFile:
    """Find a file of features; in a folder, the array named after the section.

    Raises
    ------
    UsageError
        If there is none, or its type is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"there are no features at {path}; check --features")
    is_zarr = (path / "zarr.json").is_file() or (path / ".zarray").is_file()
    if path.is_dir() and not is_zarr:
        candidates = [] if section is None else [path / f"{section.name}{end}" for end in (".npy", ".zarr")]
        found = next((each for each in candidates if each.exists()), None)
        if found is None:
            named = "a zarr array" if section is None else f"{section.name}.npy or {section.name}.zarr"
            raise UsageError(f"the folder {path} is not a zarr array and has no {named}; check --features")
        return FeatureFile(found)
    if not path.is_dir() and path.suffix not in (".npy", *TORCHSCRIPT, *WEIGHTS):
        raise UsageError(
            f"{path} is no file of features; give an array (.npy, .zarr), TorchScript (.pt, .ts) or .safetensors"
        )
    return FeatureFile(path)


def feature_files(paths: Sequence[str | Path], sections: Sequence[Section]) -> list[FeatureFile]:
    """One file for each section: an encoder or a folder for all, or arrays in the order of the sections.

    Raises
    ------
    UsageError
        If the files do not match the sections.
    """
    each = list(paths) * len(sections) if len(paths) == 1 else list(paths)
    remedy = "give one encoder, one array per section in their order, or a folder with <section name>.npy"
    if len(each) != len(sections):
        raise UsageError(f"there are {len(sections)} sections and {len(paths)} files of features; {remedy}")
    found = [feature_file(path, section) for path, section in zip(each, sections, strict=True)]
    arrays = {file.path.resolve() for file in found if file.kind == "array"}
    if len(arrays) not in (0, len(sections)) or (not arrays and len({file.path for file in found}) > 1):
        raise UsageError(f"an array belongs to one section, and encoders cannot be mixed; {remedy}")
    return found


class Maker(Protocol):
    """Makes the features of a section block by block."""

    channels: int
    pixel_um: float
    side: int
    """Side of a block, pixels."""
    details: dict[str, Any]
    """For provenance."""

    def prepare(self, window: Grid, wanted: np.ndarray) -> Any:
        """Read what a block needs; called in threads."""

    def make(self, window: Grid, wanted: np.ndarray, prepared: Any) -> np.ndarray:
        """Features (c, height, width) float32 of a block; those not ``wanted`` (height, width) may be 0."""


class ArrayMaker:
    """Features from an array of patches."""

    def __init__(self, patches: PatchArray, pixel_um: float | None):
        self.patches = patches
        self.channels = patches.channels
        self.pixel_um = pixel_um or features_um_of(patches.spacing_um)
        self.side = _CHUNK_PX
        self.details = {"spacing_um": round(patches.spacing_um, 4)}

    def prepare(self, window: Grid, wanted: np.ndarray) -> np.ndarray:
        """Resample the patches."""
        return self.patches.read(window)

    def make(self, window: Grid, wanted: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """Return what `prepare` made."""
        return prepared


class EncoderMaker:
    """Features of overlapping windows of the H&E, whose margins are cropped."""

    def __init__(self, encoder: FrozenEncoder, image: Image, pixel_um: float | None):
        self.encoder, self.image = encoder, image
        settings = encoder.settings
        probe = encoder.encode(np.full((1, 3, settings.image_px, settings.image_px), 255, np.uint8))
        self.per_side, self.channels = probe.shape[1], probe.shape[3]
        one = self.per_side == 1
        self.spacing_um = (
            (settings.stride_um or settings.side_um) if one else settings.side_um / self.per_side
        )
        self.pixel_um = pixel_um or features_um_of(self.spacing_um)
        kept_um = self.pixel_um if one else settings.side_um * (1 - 2 * _MARGIN)
        self.core = max(1, int(kept_um / self.pixel_um + 1e-6))  # pixels along the kept middle of a window
        self.margin_um = (settings.side_um - self.core * self.pixel_um) / 2
        most = min(_CHUNK_PX, _BLOCK_UM / self.pixel_um)
        self.side = self.core * max(1, round(most / self.core))
        self.details = {
            "spacing_um": round(self.spacing_um, 4),
            "um_per_px": settings.um_per_px,
            "image_px": settings.image_px,
            "tokens": settings.tokens,
        }

    def prepare(self, window: Grid, wanted: np.ndarray) -> np.ndarray:
        """Read the image of a block and its margins (3, y, x)."""
        um = self.encoder.settings.um_per_px
        height, width = (
            int(np.ceil((-(-size // self.core) * self.core * self.pixel_um + 2 * self.margin_um) / um)) + 1
            for size in window.shape
        )
        return self.image.read(
            Grid(window.x0_um - self.margin_um, window.y0_um - self.margin_um, um, height, width)
        )

    def make(self, window: Grid, wanted: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """Encode the windows that have a wanted pixel."""
        core, px = self.core, self.encoder.settings.image_px
        starts = [
            (row, column)
            for row in range(0, window.height, core)
            for column in range(0, window.width, core)
            if wanted[row : row + core, column : column + core].any()
        ]
        values = np.zeros((*window.shape, self.channels), np.float32)
        middle = Grid(self.margin_um, self.margin_um, self.pixel_um, core, core)  # within a window
        scale = self.per_side / self.encoder.settings.side_um  # patches per um
        for first in range(0, len(starts), _WINDOWS_AT_ONCE):
            batch = starts[first : first + _WINDOWS_AT_ONCE]
            tokens = self.encoder.encode(np.stack([self._cut(prepared, *start, px) for start in batch]))
            for (row, column), own in zip(batch, tokens, strict=True):
                target = values[row : row + core, column : column + core]
                cells = resampled(own, np.diag([scale, scale, 1.0]), middle)
                target[:] = cells[: target.shape[0], : target.shape[1]]
        return values.transpose(2, 0, 1)

    def _cut(self, image: np.ndarray, row: int, column: int, px: int) -> np.ndarray:
        y, x = (round(at * self.pixel_um / self.encoder.settings.um_per_px) for at in (row, column))
        return image[:, y : y + px, x : x + px]


def section_features(
    section: Section,
    file: FeatureFile,
    *,
    device: torch.device,
    channels: int = 0,
    pixel_um: float | None = None,
    overwrite: bool = False,
    compute: bool = True,
    progress: Progress = silent,
    report: Report = silent,
    interruption: Interruption | None = None,
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
    if section.image is None:
        raise StsrError(f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE")
    if not compute:
        raise UsageError(
            f"{section.path.name} has no features of {file.path.name} yet; run without --dry-run"
        )
    element = names.features_name(file.path.stem)
    if element in section.catalogue.feature_elements and not overwrite:
        raise UsageError(
            f"{section.path.name} has {element!r} of another file or pixel size; add --overwrite to replace "
            f"them, or rename {file.path.name}"
        )
    maker: Maker
    if file.kind == "array":
        maker = ArrayMaker(open_patches(file.path, section.image), pixel_um)
    else:
        maker = EncoderMaker(load_encoder(file.path, device), section.image, pixel_um)
    _check_channels(file, maker.channels, channels)
    made = {
        "command": "features",
        "origin": "derived",
        "stsr": __version__,
        "kind": file.kind,
        **file.record(),
        "channels": maker.channels,
        "features_um": maker.pixel_um,
        **maker.details,
    }
    _cache(section, element, maker, made, overwrite, _Reporting(progress, report, interruption))
    fresh = Section(section.path, section.frame.um_per_unit, section.frame.name).features(file.digest)
    assert fresh is not None, "it has just been published"
    return fresh


@dataclass(frozen=True)
class _Reporting:
    progress: Progress
    report: Report
    interruption: Interruption | None


def _check_channels(file: FeatureFile, found: int, wanted: int) -> None:
    if wanted and found != wanted:
        raise UsageError(
            f"{file.path.name} has {found} channels and the model reads {wanted}; "
            f"give the features that it was trained with"
        )


def _cache(
    section: Section, element: str, maker: Maker, made: dict[str, Any], overwrite: bool, to: _Reporting
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
    to: _Reporting,
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
        if to.interruption is not None:
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
