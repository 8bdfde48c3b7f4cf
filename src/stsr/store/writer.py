"""Big maps, written block by block in bounded memory and published together when they are complete."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import disk_errors
from stsr.geometry.grid import Grid
from stsr.store import catalogue, names, publishing
from stsr.store.catalogue import Catalogue
from stsr.store.consolidated import consolidate
from stsr.store.elements import COUNT_CHUNKS, Frame, placed
from stsr.store.workspace import Workspace

CHUNKS = COUNT_CHUNKS
"""Genes, rows and columns of a chunk. Blocks on these borders are written without reading anything back."""
_PYRAMID_BINS = 1024  # maps with a longer side get coarser levels until one fits in this
_DONE = "done.jsonl"
_DIGEST = "digest"


class MapWriter:
    """(gene, y, x) images, filled in blocks and published when the ``with`` block ends without an error.

    Blocks finished by a killed run of the same command (same outputs, genes, grid and provenance) are kept: check
    `is_done` before computing one, and call `mark_done` after writing it. If the block ends with an error or an
    interruption, everything is removed, unless ``keep`` was set to True before, which keeps finished blocks.

    Parameters
    ----------
    path
        An existing store.
    elements
        Names of the maps, published as one group: ``["superres_x10", "superres_x10_sd"]``.
    genes
        Channel names.
    grid
        The bins.
    provenance
        {element: {...}}, JSON-able. May be added to until the end through the attribute ``provenance``. Its initial
        value decides whether a killed run was the same command, so it must not contain times.
    overwrite
        Replace results of stsr of the same names.
    frame
        The section's coordinate system and unit; read from the store by default.
    beside
        {name: SpatialData element} to publish with the maps if the store does not have them yet.
    chunks, dtype, pyramid
        Chunks and type of the values, and whether big maps get coarser levels.

    Raises
    ------
    UsageError
        If an element exists and ``overwrite`` is false, or its name is not allowed.
    StsrError
        If an element of that name was not made by stsr; if the store cannot be written to, the disk is full, or
        another process writes the same output.
    """

    def __init__(
        self,
        path: str | Path,
        elements: Sequence[str],
        genes: Sequence[str],
        grid: Grid,
        provenance: dict[str, dict] | None = None,
        overwrite: bool = False,
        *,
        frame: Frame | None = None,
        beside: Mapping[str, Any] | None = None,
        chunks: tuple[int, int, int] = CHUNKS,
        dtype: str = "float32",
        pyramid: bool = True,
    ):
        self.store = catalogue.require_store(path)
        self.elements = [names.check_name(element) for element in elements]
        self.genes = [str(gene) for gene in genes]
        self.grid = grid
        self._beside = dict(beside or {})
        known = provenance or {}
        self.provenance = {name: dict(known.get(name, {})) for name in (*self.elements, *self._beside)}
        self.keep = False
        self._frame = frame
        self._overwrite = overwrite
        self._chunks, self._dtype, self._pyramid = chunks, dtype, pyramid
        self._work = Workspace(self.store, self.elements[0])
        self._arrays: dict[str, Any] = {}  # finest level of each element
        self._done: dict[str, object] = {}

    @property
    def notes(self) -> dict[str, object]:
        """The note given to `mark_done` for each finished block, including those of a killed run."""
        return dict(self._done)

    def __enter__(self) -> MapWriter:
        with disk_errors(self.store):
            self._work.__enter__()
            self._work.keep = (
                self._work.path / _DIGEST
            ).exists()  # a refused command keeps the finished blocks
            try:
                publishing.recover(self.store, self._work)
                catalogue.check_free(Catalogue(self.store), self.elements, self._overwrite)
                digest = self._digest()
                if not self._resume(digest):
                    self._work.keep = False
                    self._work.wipe()
                    self._allocate()
                    (self._work.path / _DIGEST).write_text(digest)
                self._open()
            except BaseException:
                self._work.close()
                raise
        return self

    def write(self, element: str, genes: slice, rows: slice, columns: slice, values: np.ndarray) -> None:
        """Fill a block: values (genes, rows, columns).

        Raises
        ------
        StsrError
            If the disk is full.
        """
        with disk_errors(self.store):
            self._arrays[element][genes, rows, columns] = np.asarray(values, dtype=self._dtype)

    def is_done(self, block: str) -> bool:
        """Whether a block of this name was finished, by this run or by a killed one of the same command."""
        return block in self._done

    def scratch(self, name: str) -> Path:
        """A file for unfinished work. It is kept and removed together with the blocks that are done."""
        return self._work.path / name

    def mark_done(self, block: str, note: object = None) -> None:
        """Record that a block has been written; ``note`` is any JSON-able value to find in `notes`."""
        with disk_errors(self.store), open(self._work.path / _DONE, "a") as file:
            file.write(json.dumps([block, note]) + "\n")
        self._done[block] = note

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with disk_errors(self.store):
                    for element in self.elements:
                        self._build_pyramid(element)
                    consolidate(self._work.new)
                    publishing.swap(
                        self.store, self._work, self.provenance, self._overwrite, optional=(names.SUPPORT,)
                    )
                self.keep = False
        finally:
            self._arrays = {}
            self._work.keep = self.keep
            self._work.close()

    # -------------------------------------------------------------------------------------------- inside

    def _digest(self) -> str:
        made = {element: self.provenance[element] for element in self.elements}
        grid = [*self.grid.bounds_um, self.grid.bin_um, *self.grid.shape]
        what = [self.elements, self.genes, [float(value) for value in grid], made]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def _resume(self, digest: str) -> bool:
        """Reuse the finished blocks of a killed run of the same command, if there are any."""
        file = self._work.path / _DIGEST
        if not file.exists() or file.read_text() != digest:
            return False
        done = self._work.path / _DONE
        for line in done.read_text().splitlines() if done.exists() else []:
            try:
                block, note = json.loads(line)
            except ValueError:  # the kill came in the middle of this line
                continue
            self._done[block] = note
        whole = "".join(json.dumps(item) + "\n" for item in self._done.items())
        done.write_text(whole)
        return True

    def _levels(self) -> list[tuple[int, int]]:
        """(rows, columns) from fine to coarse."""
        levels = [self.grid.shape]
        while self._pyramid and max(levels[-1]) > _PYRAMID_BINS:
            rows, columns = levels[-1]
            levels.append((-(-rows // 2), -(-columns // 2)))
        return levels

    def _allocate(self) -> None:
        """Make elements without data: spatialdata writes a tiny image, whose arrays and sizes are then replaced."""
        version = catalogue.zarr_format(self.store)
        levels = self._levels()
        tiny = {name: self._tiny(len(levels)) for name in self.elements}
        publishing.write_elements(self._work.new, {**tiny, **self._beside}, version)
        for element in self.elements:
            folder = self._work.new / "images" / element
            for level, path in zip(levels, self._paths[element], strict=True):
                shutil.rmtree(folder / path)
                shape = (len(self.genes), *level)
                _allocate_array(folder / path, shape, version, chunks=self._chunks, dtype=self._dtype)
            _describe(folder, self.genes, levels)

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """Array folders of the levels of each element, fine to coarse; known once the elements are written."""
        found = Catalogue(self._work.new)
        return {element: found.levels_of(element)[0] for element in self.elements}

    def _tiny(self, levels: int) -> Any:
        """An image of one channel with the right transformation and number of levels."""
        from spatialdata.models import Image2DModel

        from stsr.store.section import open_section

        frame = self._frame or open_section(self.store).frame
        side = 2**levels
        with catalogue.quiet():
            return Image2DModel.parse(
                np.zeros((1, side, side), np.float32),
                dims=("c", "y", "x"),
                c_coords=["gene"],
                scale_factors=[2] * (levels - 1) or None,
                transformations=placed(self.grid.bin_to_um, frame),
            )

    def _open(self) -> None:
        import zarr

        for element in self.elements:
            finest = self._work.new / "images" / element / self._paths[element][0]
            self._arrays[element] = zarr.open_array(finest, mode="r+")

    def _build_pyramid(self, element: str) -> None:
        """Coarser levels as means of 2 x 2 bins, a row of chunks at a time."""
        import zarr

        folder = self._work.new / "images" / element
        for fine_path, coarse_path in pairwise(self._paths[element]):
            fine: Any = zarr.open_array(folder / fine_path, mode="r")
            coarse: Any = zarr.open_array(folder / coarse_path, mode="r+")
            for gene in range(0, coarse.shape[0], CHUNKS[0]):
                for row in range(0, coarse.shape[1], CHUNKS[1]):
                    genes = slice(gene, gene + CHUNKS[0])
                    rows = slice(row, min(row + CHUNKS[1], coarse.shape[1]))
                    coarse[genes, rows] = _halve(fine[genes, 2 * rows.start : 2 * rows.stop])


def _halve(values: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 bins: (g, y, x) -> (g, ceil(y / 2), ceil(x / 2)), the edge repeated at odd sizes."""
    values = np.pad(values, ((0, 0), (0, values.shape[1] % 2), (0, values.shape[2] % 2)), mode="edge")
    return (values[:, ::2, ::2] + values[:, 1::2, ::2] + values[:, ::2, 1::2] + values[:, 1::2, 1::2]) / 4


def _allocate_array(
    path: Path, shape: tuple[int, int, int], version: int, *, chunks: tuple[int, int, int], dtype: str
) -> None:
    """An empty array whose missing chunks read as 0; zstd after a byte shuffle is small and quick on floats."""
    import zarr
    from zarr.codecs import BloscCodec

    fitting = tuple(min(chunk, size) for chunk, size in zip(chunks, shape, strict=True))
    encoding: dict[str, Any]
    if version == 2:
        from numcodecs import Blosc

        encoding = {
            "zarr_format": 2,
            "compressors": Blosc("zstd", clevel=1, shuffle=Blosc.SHUFFLE),
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
    else:
        encoding = {
            "compressors": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            "dimension_names": ("c", "y", "x"),
        }
    zarr.create_array(
        path, shape=shape, chunks=fitting, dtype=dtype, fill_value=0.0, overwrite=True, **encoding
    )


def _describe(folder: Path, genes: list[str], levels: list[tuple[int, int]]) -> None:
    """Put gene names and the real sizes of the levels into the OME metadata of the tiny image."""
    file = folder / (".zattrs" if (folder / ".zattrs").exists() else "zarr.json")
    whole = json.loads(file.read_text())
    attributes = whole if file.name == ".zattrs" else whole["attributes"]
    ome = attributes.get("ome", attributes)
    if "multiscales" not in ome:
        raise StsrError(
            "stsr cannot read the image metadata that this version of spatialdata writes; install spatialdata 0.7"
        )
    ome["omero"]["channels"] = [{"label": gene} for gene in genes]
    (height, width) = levels[0]
    for dataset, (rows, columns) in zip(ome["multiscales"][0]["datasets"], levels, strict=True):
        dataset["coordinateTransformations"] = [
            {"type": "scale", "scale": [1.0, height / rows, width / columns]}
        ]
    file.write_text(json.dumps(whole))
