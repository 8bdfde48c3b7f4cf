"""Build SpatialData elements from the parts of a section, placed in um."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stsr.geometry.grid import Grid
from stsr.histology.image import Image, Pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

UM = "global"
"""Coordinate system of stores written by stsr, in um."""

COUNT_CHUNKS = (16, 256, 256)
_IMAGE_CHUNKS = (3, 1024, 1024)
_COARSEST = 256  # px; the shortest side of the smallest pyramid level is not below this
REGION, INSTANCE = "region", "instance_id"


@dataclass(frozen=True)
class Frame:
    """Coordinate system of a section, and its units.

    Parameters
    ----------
    name
        Name of the coordinate system in the store.
    um_per_unit
        Size of one unit, um.
    """

    name: str
    um_per_unit: float


IN_UM = Frame(UM, 1.0)
"""Frame of stores written by stsr."""


def placed(to_um: np.ndarray, frame: Frame = IN_UM) -> dict[str, Any]:
    """Transformation of an element, from the affine (3, 3) of its own coordinates (x, y, 1) to um."""
    from spatialdata.transformations import Affine

    to_unit = np.diag([1 / frame.um_per_unit, 1 / frame.um_per_unit, 1.0]) @ to_um
    return {frame.name: Affine(to_unit, input_axes=("x", "y"), output_axes=("x", "y"))}


def with_pyramid(image: Image) -> Image:
    """The image with several levels: its own, or lazy ones built here.

    A pyramid that is built here starts from an image whose sides are whole numbers of its coarsest pixels (the last
    row and column are repeated), so that levels lie on each other exactly.
    """
    if len(image.levels) > 1:
        return image
    return Image(_pyramid(image.levels[0]), image.px_to_um, path=image.path)


def he_image(image: Image) -> Any:
    """Make a multi-scale image (c, y, x) of the H&E in its own pixels, with its own pyramid or a new one."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import set_transformation
    from xarray import DataArray, Dataset, DataTree

    levels = with_pyramid(image).levels
    height, width = levels[0].shape[1:]
    scales = {}
    for number, level in enumerate(levels):
        y = (np.arange(level.shape[1]) + 0.5) * height / level.shape[1]
        x = (np.arange(level.shape[2]) + 0.5) * width / level.shape[2]
        coords = {"c": ["r", "g", "b"], "y": y, "x": x}
        array = DataArray(level, name="image", dims=("c", "y", "x"), coords=coords, attrs={"transform": {}})
        scales[f"scale{number}"] = Dataset({"image": array})
    tree = DataTree.from_dict(scales)
    set_transformation(tree, placed(image.px_to_um)[UM], UM)
    Image2DModel().validate(tree)
    return tree


def _pyramid(level: Pixels) -> list[Pixels]:
    import dask.array as da

    halvings = 0
    while min(level.shape[1:]) >> (halvings + 1) >= _COARSEST:
        halvings += 1
    pad = [(0, -size % 2**halvings) for size in level.shape[1:]]
    levels = [da.pad(level, [(0, 0), *pad], mode="edge").rechunk(_IMAGE_CHUNKS)]
    for _ in range(halvings):
        fine = levels[-1]
        chunks = (fine.chunks[0], *(tuple(size // 2 for size in sizes) for sizes in fine.chunks[1:]))
        levels.append(fine.map_blocks(_halve, chunks=chunks, dtype=np.uint8).rechunk(_IMAGE_CHUNKS))
    return levels


def _halve(pixels: np.ndarray) -> np.ndarray:
    """Rounded mean of 2 x 2 pixels: (c, 2 h, 2 w) uint8 -> (c, h, w)."""
    rows = pixels[:, 0::2].astype(np.uint16) + pixels[:, 1::2]
    return ((rows[:, :, 0::2] + rows[:, :, 1::2] + 2) // 4).astype(np.uint8)


class Counter(Protocol):
    """Counts bins in blocks of `COUNT_CHUNKS` genes."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""

    @property
    def dtype(self) -> Any:
        """Data type that holds the largest count."""

    def block(self, number: int, dtype: Any) -> np.ndarray:
        """Counts of one block (genes, bins)."""


def count_image(counter: Counter, grid: Grid, genes: list[str]) -> DataArray:
    """Image of counts per bin (gene, y, x), counted in blocks of genes while it is written."""
    import dask
    import dask.array as da
    from spatialdata.models import Image2DModel

    dtype = counter.dtype

    def block(number: int) -> np.ndarray:
        return counter.block(number, dtype).reshape(-1, *grid.shape)  # (genes in block, y, x)

    parts = []
    for number in range(counter.blocks):
        count = min(COUNT_CHUNKS[0], len(genes) - number * COUNT_CHUNKS[0])
        lazy = dask.delayed(block, pure=False)(number)
        parts.append(da.from_delayed(lazy, (count, *grid.shape), dtype))
    counts = da.concatenate(parts).rechunk(COUNT_CHUNKS)  # (genes, y, x)
    return Image2DModel.parse(
        counts, dims=("c", "y", "x"), c_coords=genes, transformations=placed(grid.bin_to_um)
    )


def labels(values: np.ndarray, grid: Grid, frame: Frame = IN_UM) -> DataArray:
    """Labels (y, x), one per bin: a mask, or codes with 0 for none."""
    from spatialdata.models import Labels2DModel

    if values.dtype == bool:
        values = values.astype(np.uint8)
    return Labels2DModel.parse(values, dims=("y", "x"), transformations=placed(grid.bin_to_um, frame))


def spot_shapes(centres_um: np.ndarray, shape: str, size_um: float, names: Sequence[str]) -> GeoDataFrame:
    """Shapes of spots: circles, or polygons for squares, indexed by spot names."""
    import geopandas as gpd
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    x, y = np.asarray(centres_um, float).T
    half = size_um / 2
    if shape == "square":
        frame = gpd.GeoDataFrame(geometry=shapely.box(x - half, y - half, x + half, y + half), index=names)
    else:
        frame = gpd.GeoDataFrame({"radius": half}, geometry=shapely.points(x, y), index=names)
    return ShapesModel.parse(frame, transformations={UM: Identity()})


def cell_shapes(outlines: GeoDataFrame, frame: Frame = IN_UM) -> GeoDataFrame:
    """Shapes of cells: polygons, or points with a radius, in um, indexed by cell ids."""
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity, Scale

    units = 1 / frame.um_per_unit
    place = Identity() if units == 1 else Scale([units, units], ("x", "y"))
    return ShapesModel.parse(outlines, transformations={frame.name: place})


def table(counts: AnnData, element: str, centres_um: np.ndarray | None = None) -> AnnData:
    """Copy counts into a table that annotates an element by its index.

    Parameters
    ----------
    counts
        AnnData (instances, genes) whose ``obs_names`` are the index of the element.
    element
        The annotated element.
    centres_um
        (instances, 2), stored as ``obsm["spatial"]`` for other tools.
    """
    from spatialdata.models import TableModel

    counts = counts.copy()
    counts.uns.pop(TableModel.ATTRS_KEY, None)
    if centres_um is not None:
        counts.obsm["spatial"] = np.asarray(centres_um, float)
    return annotating(counts, element, counts.obs_names.to_numpy())


def annotating(table: AnnData, element: str, instances: np.ndarray) -> AnnData:
    """Make the rows of a table annotate instances of an element; changes the table and returns it.

    Parameters
    ----------
    table
        AnnData (instances, anything).
    element
        Shapes or labels.
    instances
        (n,) index values of the shapes, or codes of the labels, in the element's own data type, as joins need.
    """
    import pandas as pd
    from spatialdata.models import TableModel

    table.obs[REGION] = pd.Categorical([element] * table.n_obs)
    table.obs[INSTANCE] = instances
    return TableModel.parse(table, region=element, region_key=REGION, instance_key=INSTANCE)


def free_table(table: AnnData) -> AnnData:
    """Make a table that annotates no element."""
    from spatialdata.models import TableModel

    return TableModel.parse(table)


def store_of(parts: dict[str, Any]) -> SpatialData:
    """Combine elements {name: element}, in memory or lazy, into a `spatialdata.SpatialData`."""
    from spatialdata import SpatialData

    return SpatialData.init_from_elements(parts)
