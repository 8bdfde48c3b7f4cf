"""A section as the verbs read it: image, spots, maps and cells in um, whichever tool wrote the store."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM, Grid, add_up
from stsr.histology.image import Image
from stsr.histology.tissue import SUPPORT_UM, supported
from stsr.store import catalogue, discovery, names
from stsr.store.arrays import StoredArray
from stsr.store.catalogue import Catalogue
from stsr.store.discovery import Frame
from stsr.store.parts import Cells, FeatureMap, Map, Mask, Spots

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData


def open_section(
    path: str | Path, um_per_unit: float | None = None, coordinate_system: str | None = None
) -> Section:
    """Open a section store for reading; nothing is loaded yet.

    Parameters
    ----------
    path
        A store written by `stsr prepare`, or any SpatialData store.
    um_per_unit, coordinate_system
        The frame, for stores that do not record it. Found by default; see `stsr.store.discovery.find_frame`.

    Raises
    ------
    StsrError
        If there is no SpatialData store at ``path``.
    """
    return Section(catalogue.require_store(path), um_per_unit, coordinate_system)


class Section:
    """One tissue section. All coordinates are um: those of the frame's coordinate system times its um per unit.

    Metadata are read once, when they are first needed. Open the section again to see elements published since
    then.

    Parameters
    ----------
    path
        The store.
    um_per_unit, coordinate_system
        As for `open_section`.
    """

    def __init__(
        self, path: str | Path, um_per_unit: float | None = None, coordinate_system: str | None = None
    ):
        self.path = Path(path)
        self.catalogue = Catalogue(self.path)
        self._um_per_unit = um_per_unit
        self._coordinate_system = coordinate_system

    @property
    def name(self) -> str:
        """The store's name without its suffix."""
        return self.path.name.removesuffix(".zarr")

    @cached_property
    def sdata(self) -> SpatialData:
        """The `spatialdata.SpatialData`, lazy.

        Raises
        ------
        StsrError
            If spatialdata cannot read the store.
        """
        from spatialdata import read_zarr

        try:
            with catalogue.quiet():
                return read_zarr(self.path)
        except Exception as error:  # the readers behind spatialdata raise many kinds
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise StsrError(
                f"{self.path} cannot be read ({reason}); restore it, or prepare it again with --overwrite"
            ) from error

    @cached_property
    def frame(self) -> Frame:
        """Coordinate system and um per unit.

        Raises
        ------
        StsrError
            If the um per unit cannot be found.
        """
        own = self.catalogue.attributes.get(names.FRAME_KEY) or {}
        system = self._coordinate_system or own.get("coordinate_system")
        um_per_unit = self._um_per_unit or own.get("um_per_unit")
        if system and um_per_unit:
            return Frame(system, float(um_per_unit))
        return discovery.find_frame(self.sdata, system, um_per_unit)

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """How each element that stsr wrote was made."""
        return self.catalogue.provenance

    @property
    def elements(self) -> dict[str, str]:
        """{name: kind} of everything in the store."""
        return self.catalogue.elements

    @cached_property
    def image(self) -> Image | None:
        """The H&E: ``he``, or the finest three-channel image in the frame; None if there is none."""
        is_ours = self.elements.get(names.HE) == "images"
        name = names.HE if is_ours else discovery.find_image(self.sdata, self.frame)
        if name is None:
            return None
        return Image(self.arrays("images", name), self.to_um(self.sdata.images[name]))

    @cached_property
    def spots(self) -> Spots | None:
        """The measured spots; None if there are none."""
        found = discovery.find_spots(self.sdata)
        if found is None:
            return None
        shapes, table = found
        geometry, rows = discovery.annotated(self.sdata, shapes, table)
        centres, sizes, shape = discovery.outline(geometry, self.to_um(self.sdata.shapes[shapes]))
        size = float(np.median(sizes)) if len(sizes) else LR_UM
        if names.FRAME_KEY not in self.catalogue.attributes:
            size = discovery.true_size(centres, size, shape)
        annotation = self.sdata.tables[table]
        counts, genes = discovery.raw_counts(annotation, rows, self.path.name)
        return Spots(centres, counts, genes, shape, size)

    @property
    def spots_are_sums(self) -> bool:
        """Whether the spots were simulated from all counts of `hr`, so that they are their exact sums."""
        made = self.provenance.get(names.table_name(names.SPOTS), {})
        return made.get("origin") == "simulated" and made.get("depth", 1) == 1

    @cached_property
    def hr(self) -> Map | None:
        """Measured counts in the smallest bins, ``hr_*um``; None if there are none."""
        found = self.catalogue.hr_elements
        return self.map(found[0]) if found else None

    @cached_property
    def unseen(self) -> Map | None:
        """The part of the counts of `hr` that simulated spots do not contain; None if it is not stored."""
        found = [names.unseen_name(name) for name in self.catalogue.hr_elements[:1]]
        return self.map(found[0]) if found and self.elements.get(found[0]) == "images" else None

    @property
    def divided_from_um(self) -> float:
        """Side of the instrument's bins from which the counts of `hr` were divided by area, um; 0 for transcripts."""
        made = self.provenance.get(next(iter(self.catalogue.hr_elements), ""), {})
        return float(made.get("divided_by_area_from_um", 0))

    @property
    def organ(self) -> str | None:
        """The organ, if the store names it."""
        return self.catalogue.attributes.get(names.ORGAN_KEY)

    @property
    def _counts_of_hr(self) -> float | None:
        """Sum of all values of `hr` according to its provenance: a slide's takes long to read."""
        return self.provenance.get(self.catalogue.hr_elements[0], {}).get("counts")

    def map(self, element: str) -> Map:
        """A (gene, y, x) image of the store, such as ``superres_x10``.

        Raises
        ------
        UsageError
            If there is no such image.
        StsrError
            If its pixels are not squares along the axes of the section.
        """
        if self.elements.get(element) != "images":
            images = [name for name, kind in self.elements.items() if kind == "images"]
            raise UsageError(
                f"{self.path.name} has no map {element!r}; it has: {', '.join(images) or 'no images'}"
            )
        _, genes = self.catalogue.levels_of(element)
        array = self.arrays("images", element)[0]
        to_um = self.to_um(self.sdata.images[element])
        skew = max(abs(to_um[0, 1]), abs(to_um[1, 0]), abs(to_um[0, 0] - to_um[1, 1]))
        if to_um[0, 0] <= 0 or skew > 1e-6 * abs(to_um[0, 0]):
            raise StsrError(
                f"{element!r} in {self.path.name} is not a raster of square bins along the section's axes; "
                f"name another map"
            )
        named = names.bin_um_of(element)
        bin_um = named if named and abs(named - to_um[0, 0]) < 1e-3 * named else float(to_um[0, 0])
        genes = genes or [str(number) for number in range(array.shape[0])]
        height, width = array.shape[1:]
        return Map(Grid(float(to_um[0, 2]), float(to_um[1, 2]), bin_um, height, width), genes, array)

    def features(self, digest: str, pixel_um: float | None = None) -> FeatureMap | None:
        """Cached patch features of the file with this digest, of any or a given pixel size, um; None if absent."""
        for name, made in self.catalogue.feature_elements.items():
            if made.get("digest") == digest and pixel_um in (None, made.get("features_um")):
                return FeatureMap(name, self.map(name))
        return None

    def arrays(self, kind: str, element: str) -> list[StoredArray]:
        """Pyramid levels of an element as arrays on disk, fine to coarse.

        They bypass dask: building its graph takes longer than reading a tile.
        """
        levels, _ = self.catalogue.levels_of(element)
        return [StoredArray(self.path / kind / element / level) for level in levels]

    @cached_property
    def tissue(self) -> Mask | None:
        """The tissue mask; None if there is none."""
        return self._mask(names.TISSUE)

    def support(self, grid: Grid) -> np.ndarray:
        """Bins where a map may be believed: (height, width) bool.

        A bin counts if the H&E covers it, it lies in tissue, and a spot is near; a condition is skipped if the
        section has no image, tissue mask or spots. Bins that are multiples of 10 um count if at least half of
        their area does. Labels ``support`` of the store are used if their bins coincide with these.
        """
        stored = self._stored_support
        if stored is not None and _coincide(stored.grid, grid):
            return stored.read(grid)
        factor = round(grid.bin_um / SUPPORT_UM)
        if factor > 1 and abs(factor * SUPPORT_UM - grid.bin_um) < 1e-6:
            return 2 * add_up(self.support(grid.at(SUPPORT_UM)).astype(np.int64), factor) >= factor**2
        tissue = self.tissue.read if self.tissue is not None else None
        centres_um = self.spots.centres_um if self.spots is not None else None
        return supported(grid, self.image, tissue, centres_um)

    def measured(self, grid: Grid) -> np.ndarray:
        """Bins where the section was measured, with or without an H&E: (height, width) bool.

        The tissue; without a mask the surroundings of spots; without spots everything.
        """
        if self.tissue is not None:
            return self.tissue.read(grid)
        return supported(grid, None, None, None if self.spots is None else self.spots.centres_um)

    @cached_property
    def _stored_support(self) -> Mask | None:
        return self._mask(names.SUPPORT)

    def _mask(self, name: str) -> Mask | None:
        if self.elements.get(name) != "labels":
            return None
        return Mask(self.arrays("labels", name)[0], self.to_um(self.sdata.labels[name]))

    @cached_property
    def cells(self) -> Cells | None:
        """The segmented cells, with their table if they have one; None if there are no cells."""
        found = discovery.find_cells(self.sdata)
        if found is None:
            return None
        shapes, table = found
        source = f"{shapes} of the store"
        if table is None:
            geometry = self.sdata.shapes[shapes]
            return Cells(discovery.in_um(geometry, self.to_um(geometry)), None, source, shapes)
        outlines, rows = self.annotated(shapes, table)
        return Cells(outlines, self.sdata.tables[table][rows], source, shapes)

    def annotated(self, shapes: str, table: str) -> tuple[GeoDataFrame, np.ndarray]:
        """`stsr.store.discovery.annotated` with the shapes in um."""
        geometry, rows = discovery.annotated(self.sdata, shapes, table)
        return discovery.in_um(geometry, self.to_um(self.sdata.shapes[shapes])), rows

    @property
    def extent_um(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the measured area, um: of the bins, else the spots, else the image.

        Raises
        ------
        StsrError
            If the section has none of them.
        """
        if self.hr is not None:
            return self.hr.grid.bounds_um
        if self.spots is not None:
            return self.spots.bounds_um
        if self.image is not None:
            return self.image.bounds_um
        raise StsrError(
            f"{self.path.name} has neither spots nor an image; run: stsr prepare {self.path} --he IMAGE"
        )

    def of_spots(self, rows: np.ndarray) -> Section:
        """The same section as if only some of its spots had been measured, by index."""
        assert self.spots is not None
        other = copy.copy(self)
        other.__dict__["spots"] = self.spots.take(rows)  # instead of the cached ones
        return other

    def grid(self, bin_um: float) -> Grid:
        """The section's raster with bins of this size; the same area at every bin size.

        Raises
        ------
        ValueError
            If bins do not nest in 100 um.
        StsrError
            If the section has no area.
        """
        if self.hr is not None:
            return Grid.covering(self.hr.grid.bounds_um, bin_um)
        if self.spots is None:
            return Grid.covering(self.extent_um, bin_um)
        return self.spots.grid(bin_um)

    def describe(self) -> dict[str, Any]:
        """Summarise the section as plain JSON types, as `stsr info` prints it; missing parts are None."""
        extent = [round(value, 3) for value in self.extent_um]
        return {
            "path": str(self.path),
            "coordinate_system": self.frame.name,
            "um_per_unit": self.frame.um_per_unit,
            "extent_um": extent,
            "size_um": [round(extent[2] - extent[0], 3), round(extent[3] - extent[1], 3)],
            "image": self._describe_image(),
            "spots": None if self.spots is None else self.spots.describe(),
            "hr": None if self.hr is None else self.hr.describe(self._counts_of_hr),
            "cells": None if self.cells is None else self.cells.describe(),
            "image_overlap": self.image_overlap,
            "elements": self.elements,
            "provenance": self.provenance,
        }

    @cached_property
    def image_overlap(self) -> float | None:
        """Fraction of the spots, or of the measured area if there are no spots, that lies within the image."""
        if self.image is None or (self.spots is None and self.hr is None):
            return None
        if self.spots is not None:
            inside = self.image.contains(*self.spots.centres_um.T)
        else:
            inside = self.image.covered(self.grid(LR_UM))
        return float(np.mean(inside)) if inside.size else 0.0

    def _describe_image(self) -> dict[str, Any] | None:
        if self.image is None:
            return None
        return {
            "um_per_px": self.image.um_per_px,
            "height": self.image.height,
            "width": self.image.width,
            "bounds_um": list(self.image.bounds_um),
        }

    def to_um(self, element: Any) -> np.ndarray:
        """Affine (3, 3) from the own coordinates (x, y, 1) of a SpatialData element to um."""
        return discovery.affine(element, self.frame.name, self.frame.um_per_unit)


def _coincide(stored: Grid | None, grid: Grid) -> bool:
    """Whether the bins of two grids are of the same size and lie on each other."""
    if stored is None:
        return False
    try:
        stored.offset_of(grid)
    except ValueError:
        return False
    return True
