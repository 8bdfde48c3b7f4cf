"""The parts of a section: spots, maps, masks and cells, all in um."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from stsr.errors import UsageError
from stsr.geometry.grid import Grid
from stsr.geometry.lattice import bounds_of, grid_around, median_pitch
from stsr.geometry.measurement import Measurement
from stsr.geometry.outlines import areas
from stsr.store.arrays import StoredArray

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame


@dataclass(frozen=True)
class Spots:
    """Measured spots.

    Parameters
    ----------
    centres_um
        (n, 2) x and y, um.
    counts
        (n, g) raw counts, csr float32.
    genes
        Gene names, g.
    shape
        ``"disc"`` or ``"square"``.
    size_um
        Diameter or side, um.
    """

    centres_um: np.ndarray
    counts: sp.csr_matrix
    genes: list[str]
    shape: str
    size_um: float

    @property
    def bounds_um(self) -> tuple[float, float, float, float]:
        """Bounds (x0, y0, x1, y1) of all spots in their full size, um."""
        return bounds_of(self.centres_um, self.size_um)

    @property
    def area_um2(self) -> float:
        """Area of a spot, um2."""
        return self.size_um**2 * (math.pi / 4 if self.shape == "disc" else 1.0)

    @cached_property
    def pitch_um(self) -> float:
        """Median distance to the nearest other spot, um; for a single spot its size."""
        return median_pitch(self.centres_um) or self.size_um

    def grid(self, bin_um: float) -> Grid:
        """The section's raster around the spots; see `stsr.geometry.lattice.grid_around`."""
        return grid_around(self.centres_um, self.size_um, bin_um)

    def take(self, rows: np.ndarray) -> Spots:
        """Some of the spots, by index."""
        return replace(self, centres_um=self.centres_um[rows], counts=self.counts[rows])

    def measurement(self, grid: Grid) -> Measurement:
        """The fraction of each bin that each spot covers."""
        make = Measurement.discs if self.shape == "disc" else Measurement.squares
        return make(grid, self.centres_um, self.size_um)

    def select(self, genes: Sequence[str]) -> sp.csr_matrix:
        """Counts (n, len(genes)) of the given genes; 0 for genes that were not measured."""
        place = {gene: number for number, gene in enumerate(self.genes)}
        known = [(place[gene], column) for column, gene in enumerate(genes) if gene in place]
        rows, columns = np.array(known, dtype=int).reshape(-1, 2).T
        chosen = sp.csr_matrix(
            (np.ones(len(rows), np.float32), (rows, columns)), (len(self.genes), len(genes))
        )
        return (self.counts @ chosen).tocsr()

    def describe(self) -> dict[str, Any]:
        """Summarise as plain JSON types."""
        return {
            "number": int(self.counts.shape[0]),
            "genes": len(self.genes),
            "gene_names": list(self.genes),
            "counts": float(self.counts.sum(dtype=np.float64)),
            "shape": self.shape,
            "size_um": self.size_um,
            "pitch_um": self.pitch_um,
        }


class Map:
    """A map on disk: (gene, y, x) values per bin.

    Parameters
    ----------
    grid
        The bins.
    genes
        Gene names in the order of the first axis.
    array
        The values.
    """

    def __init__(self, grid: Grid, genes: list[str], array: StoredArray):
        self.grid = grid
        self.genes = genes
        self._array = array

    @property
    def fractional(self) -> bool:
        """Whether values may be other than whole numbers."""
        return bool(np.dtype(self._array.dtype).kind == "f")

    def read(self, genes: Sequence[str] | None = None, window: Grid | None = None) -> np.ndarray:
        """Read some genes in a window.

        Parameters
        ----------
        genes
            Gene names in the wanted order; all by default.
        window
            A grid whose bins coincide with those of the map; the whole map by default. Zero beyond the map.

        Returns
        -------
        values
            (genes, height, width) in the stored data type.

        Raises
        ------
        UsageError
            If a gene is not in the map.
        ValueError
            If the bins of the window do not coincide with the map's.
        """
        index = self._index(genes)
        window = window or self.grid
        row, column = self.grid.offset_of(window)
        maps = np.zeros((len(index), *window.shape), dtype=self._array.dtype)
        rows = slice(max(row, 0), min(row + window.height, self.grid.height))
        columns = slice(max(column, 0), min(column + window.width, self.grid.width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return maps
        into = maps[:, rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]
        if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            into[:] = self._array[index[0] : index[0] + len(index), rows, columns]
        elif len(index):
            into[:] = self._array.rows(index, rows, columns)
        return maps

    def total(self) -> float:
        """Sum of all values, read in blocks of genes."""
        step = self._array.chunks[0]
        blocks = (self._array[start : start + step] for start in range(0, len(self.genes), step))
        return float(sum(block.sum(dtype=np.float64) for block in blocks))

    def describe(self, counts: float | None = None) -> dict[str, Any]:
        """Summarise as plain JSON types; ``counts`` is the sum of all values, if it is known."""
        return {
            "bin_um": self.grid.bin_um,
            "height": self.grid.height,
            "width": self.grid.width,
            "genes": len(self.genes),
            "gene_names": list(self.genes),
            "counts": self.total() if counts is None else float(counts),
        }

    def _index(self, genes: Sequence[str] | None) -> np.ndarray:
        if genes is None:
            return np.arange(len(self.genes))
        place = self._places
        missing = [gene for gene in genes if gene not in place]
        if missing:
            raise UsageError(f"the map has no gene {', '.join(missing[:3])}; it has {len(self.genes)} others")
        return np.array([place[gene] for gene in genes], dtype=int)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {gene: number for number, gene in enumerate(self.genes)}


@dataclass(frozen=True)
class FeatureMap:
    """Patch features of a section's H&E on its raster.

    Parameters
    ----------
    element
        Name in the store.
    stored
        (channel, y, x).
    """

    element: str
    stored: Map

    @property
    def channels(self) -> int:
        """Length of a vector."""
        return len(self.stored.genes)

    @property
    def pixel_um(self) -> float:
        """Side of a pixel, um; rounded, because it went through the section's own units."""
        return round(self.stored.grid.bin_um, 6)

    def read(self, window: Grid) -> np.ndarray:
        """Values (c, height, width) float32 in a window of pixels of the same size, 0 beyond the section.

        Where its pixels do not coincide with those of the store, they are interpolated linearly.
        """
        grid = self.stored.grid
        row, column = (
            round((at - start) / grid.bin_um, 6)
            for at, start in ((window.y0_um, grid.y0_um), (window.x0_um, grid.x0_um))
        )
        (top, down), (left, right) = ((math.floor(at), at % 1) for at in (row, column))
        height, width = window.height + (down > 0), window.width + (right > 0)
        values = self.stored.read(None, grid.window(top, left, height, width)).astype(np.float32)
        if down:
            values = (1 - down) * values[:, :-1] + down * values[:, 1:]
        if right:
            values = (1 - right) * values[:, :, :-1] + right * values[:, :, 1:]
        return values


class Mask:
    """A label image placed in um; 0 is outside."""

    def __init__(self, labels: StoredArray | np.ndarray, px_to_um: np.ndarray):
        self._labels = labels
        self._um_to_px = np.linalg.inv(px_to_um)
        self._px_to_um = np.asarray(px_to_um, dtype=np.float64)

    @property
    def grid(self) -> Grid | None:
        """The raster of the labels, um; None if it does not consist of square bins along the axes."""
        (bin_um, skew_x, x0), (skew_y, bin_y_um, y0) = self._px_to_um[:2]
        if bin_um <= 0 or max(abs(skew_x), abs(skew_y), abs(bin_um - bin_y_um)) > 1e-6 * bin_um:
            return None
        return Grid(float(x0), float(y0), float(bin_um), *self._labels.shape)

    def read(self, grid: Grid) -> np.ndarray:
        """Bins whose centre lies in the mask, (height, width) bool; False beyond the label image."""
        (a, b, c), (d, e, f) = self._um_to_px[:2]
        x, y = grid.centres_um()
        columns = np.floor(a * x[None, :] + b * y[:, None] + c).astype(np.int64)
        rows = np.floor(d * x[None, :] + e * y[:, None] + f).astype(np.int64)
        height, width = self._labels.shape
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        mask = np.zeros(grid.shape, dtype=bool)
        if inside.any():
            top, left = rows[inside].min(), columns[inside].min()
            part = self._labels[top : rows[inside].max() + 1, left : columns[inside].max() + 1]
            mask[inside] = np.asarray(part)[rows[inside] - top, columns[inside] - left] > 0
        return mask


@dataclass(frozen=True)
class Cells:
    """Segmented cells, from a store, a platform's files or a new segmentation.

    Parameters
    ----------
    outlines
        GeoDataFrame of polygons, or of points with a column ``radius``, um. The index holds unique cell ids: text, or
        whole numbers for labels.
    counts
        AnnData (cells, genes) in the same order, or None.
    source
        Where the cells come from, for messages and provenance.
    element
        The shapes or labels of the store with these cells; None if they are not in a store.
    """

    outlines: GeoDataFrame
    counts: AnnData | None = None
    source: str = ""
    element: str | None = None

    @classmethod
    def of_polygons(
        cls, ids: np.ndarray, polygons: np.ndarray, source: str = "", element: str | None = None
    ) -> Cells:
        """Cells without counts, from ids (n,) and shapely polygons (n,), um."""
        import geopandas as gpd

        return cls(gpd.GeoDataFrame(geometry=polygons, index=ids), None, source, element)

    def __len__(self) -> int:
        return len(self.outlines)

    @property
    def ids(self) -> np.ndarray:
        """(n,) cell ids."""
        return self.outlines.index.to_numpy()

    @cached_property
    def polygons(self) -> np.ndarray:
        """(n,) shapely polygons or multipolygons, um; points with a radius as polygons of the disc's area."""
        return areas(self.outlines)

    @cached_property
    def centres_um(self) -> np.ndarray:
        """(n, 2) x and y of the centroids, um."""
        centroid = self.outlines.geometry.centroid
        return np.stack([centroid.x.to_numpy(), centroid.y.to_numpy()], axis=1)

    def take(self, rows: np.ndarray) -> Cells:
        """Some of the cells, by index (m,) or mask (n,)."""
        counts = None if self.counts is None else self.counts[rows]
        return replace(self, outlines=self.outlines.iloc[rows], counts=counts)

    def describe(self) -> dict[str, Any]:
        """Summarise as plain JSON types."""
        genes = None if self.counts is None else int(self.counts.n_vars)
        return {"number": len(self), "genes": genes}
