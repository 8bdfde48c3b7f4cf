"""Read cell outlines from a store, or from files of QuPath, Xenium, Cellpose, sopa and others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from stsr.errors import StsrError, UsageError
from stsr.files import reading
from stsr.geometry.outlines import areas, moved, polygonal, rings, traced
from stsr.histology.image import Image
from stsr.store import discovery
from stsr.store.parts import Cells
from stsr.store.section import Section, open_section

UM, PX = "um", "px"
COORDINATES = (UM, PX)
"""Units of coordinates in a file: um of the section, or pixels of its H&E at full resolution."""

_GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
_TABLES = (".parquet", ".csv", ".csv.gz")
_LABEL_IMAGES = (".tif", ".tiff", ".png")
_VERTICES = ("cell_id", "vertex_x", "vertex_y")
_CELLS_OF_QUPATH = {"cell", "detection"}
_DIAMETER_UM = (2.0, 150.0)  # plausible medians: from platelets to megakaryocytes
_MIN_ON_SECTION = 0.1  # fraction of the cells: a file may cover the whole slide and the section a piece of it
_PADDED = 0.01  # fraction by which an image may have been padded when its pyramid was built


# ------------------------------------------------------------------------------------------------- in the store


def stored(section: Section, element: str | None = None) -> Cells:
    """The cells of a section.

    Parameters
    ----------
    section
        The section.
    element
        Shapes or labels; by default the section's own cells.

    Raises
    ------
    UsageError
        If there is no such element, or it is neither shapes nor labels.
    StsrError
        If no element is named and the section has no cells, or the element has no outlines with an area.
    """
    sdata = section.sdata
    if element is None:
        found = discovery.find_cells(sdata)
        if found is None:
            raise StsrError(
                f"{section.path.name} has no cells; import some with --segmentation FILE, "
                f"name an element with --cells, or find nuclei on the H&E with --segment"
            )
        element = found[0]
    if element in sdata.labels:
        array = section.arrays("labels", element)[0]
        ids, outlines = traced(array, section.to_um(sdata.labels[element]))
    elif element in sdata.shapes:
        shapes = sdata.shapes[element]
        ids, outlines = shapes.index.to_numpy(), moved(areas(shapes), section.to_um(shapes))
    else:
        there = [name for name, kind in section.elements.items() if kind in ("shapes", "labels")]
        raise UsageError(
            f"{section.path.name} has no shapes or labels {element!r}; it has: {', '.join(there) or 'none'}"
        )
    return _checked(ids, outlines, f"{element} of the store", element)


def of_table(section: Section, table: str) -> Cells:
    """The cells that a table annotates, in the order of the table.

    Raises
    ------
    UsageError, StsrError
        As `stored`; StsrError also if the element lacks some of the table's cells.
    """
    annotation = section.sdata.tables[table]
    attributes = annotation.uns["spatialdata_attrs"]
    found = stored(section, discovery.regions(annotation)[0])
    place = {name: number for number, name in enumerate(found.ids)}
    try:
        rows = [place[name] for name in annotation.obs[attributes["instance_key"]]]
    except KeyError as error:
        raise StsrError(
            f"{found.element!r} has no cell {error} of {table!r}; run stsr singlecell with --overwrite"
        ) from None
    return found.take(np.array(rows, dtype=int))


# ------------------------------------------------------------------------------------------------------ in files


def imported(
    path: str | Path,
    section: Section,
    extent_um: tuple[float, float, float, float],
    coordinates: str | None = None,
) -> Cells:
    """Read cells from a file.

    Parameters
    ----------
    path
        GeoJSON (QuPath's, gzipped or not); parquet or csv with ``cell_id``, ``vertex_x`` and ``vertex_y`` (Xenium's
        boundaries), GeoParquet; a label image (.tif, .png, a zarr array or OME-Zarr) of the size of the H&E; a
        SpatialData store with cells.
    section
        The section they belong to.
    extent_um
        (x0, y0, x1, y1) of the section: if few cells lie there, their units are wrong.
    coordinates
        ``"um"`` or ``"px"``; by default px for GeoJSON, um for tables. Label images are always in pixels, stores in um.

    Raises
    ------
    UsageError
        If the format or the coordinates are unknown, or a label image is not the size of the H&E.
    StsrError
        If the file is missing, damaged, or holds no cells of this section.
    """
    path = Path(path)
    if coordinates not in (None, *COORDINATES):
        raise UsageError(f"--coordinates must be um or px, not {coordinates!r}")
    if not path.exists():
        raise StsrError(f"there is no segmentation at {path}; check --segmentation")
    name = path.name.lower()
    if path.is_dir():
        ids, outlines = _zarr(path, section)
    elif name.endswith(_LABEL_IMAGES):
        ids, outlines = _label_image(path, section)
    elif name.endswith((*_GEOJSON, *_TABLES)):
        is_json = name.endswith(_GEOJSON)
        ids, outlines = (_geojson if is_json else _table)(path)
        if (coordinates or (PX if is_json else UM)) == PX:
            outlines = moved(outlines, _image(section, path).px_to_um)
    else:
        raise UsageError(
            f"{path.name} is not a supported segmentation format; give .geojson, .parquet, .csv, .tif or .zarr"
        )
    found = _checked(ids, outlines, path.name)
    _check_place(found, extent_um, path.name)
    return found


def _geojson(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read cells or detections as QuPath exports them, with the cell's outline, not its nucleus; else all polygons."""
    with reading(path):
        content = path.read_bytes()
        loaded = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        features = loaded if isinstance(loaded, list) else loaded.get("features", [loaded])
        features = [
            f for f in features if (f.get("geometry") or {}).get("type") in ("Polygon", "MultiPolygon")
        ]
        kinds = [(f.get("properties") or {}).get("objectType") for f in features]
        if _CELLS_OF_QUPATH & set(kinds):
            features = [f for f, kind in zip(features, kinds, strict=True) if kind in _CELLS_OF_QUPATH]
        outlines = shapely.from_geojson([json.dumps(feature["geometry"]) for feature in features])
        named = [
            feature.get("id") or (feature.get("properties") or {}).get("cell_id") for feature in features
        ]
    if None in named or len(set(named)) < len(named):
        named = list(range(1, len(features) + 1))
    return np.array([str(name) for name in named]), np.asarray(outlines, dtype=object)


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read outlines from rows of vertices, or from GeoParquet."""
    import pandas as pd

    with reading(path):
        if path.suffix != ".parquet":
            vertices = pd.read_csv(path)
        else:
            import pyarrow.parquet as parquet

            if b"geo" in (parquet.read_schema(path).metadata or {}):
                import geopandas as gpd

                geometry = gpd.read_parquet(path)
                return geometry.index.astype(str).to_numpy(), areas(geometry)
            vertices = pd.read_parquet(path)
    missing = [column for column in _VERTICES if column not in vertices]
    if missing:
        raise StsrError(f"{path.name} has no column {missing[0]!r}; outlines need {', '.join(_VERTICES)}")
    vertices = vertices.dropna(subset=list(_VERTICES))
    if vertices.empty:
        raise StsrError(f"{path.name} contains no cell outlines; give another file with --segmentation")
    ids = vertices["cell_id"]
    if len(ids) and isinstance(ids.iloc[0], bytes):
        ids = ids.str.decode("utf-8")
    with reading(path):
        return rings(ids.astype(str).to_numpy(), vertices[["vertex_x", "vertex_y"]].to_numpy(float))


def _zarr(path: Path, section: Section) -> tuple[np.ndarray, np.ndarray]:
    """Read the cells of a SpatialData store, or a label image in zarr or OME-Zarr."""
    import zarr

    with reading(path):
        node: Any = zarr.open(path, mode="r")
        attributes: dict[str, Any] = dict(node.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if scales:  # OME-Zarr
            node = node[scales[0]["datasets"][0]["path"]]
    if isinstance(node, zarr.Array):
        return traced(node, _image_transform(node.shape, section, path))
    found = stored(open_section(path))
    return found.ids.astype(str), found.polygons


def _label_image(path: Path, section: Section) -> tuple[np.ndarray, np.ndarray]:
    import tifffile

    with reading(path):
        if path.suffix.lower() == ".png":
            from PIL import Image as Pillow

            labels = np.asarray(Pillow.open(path))
        else:
            labels = tifffile.imread(path)
    return traced(labels, _image_transform(labels.shape, section, path))


def _image_transform(shape: tuple[int, ...], section: Section, path: Path) -> np.ndarray:
    image = _image(section, path)
    near = len(shape) == 2 and all(
        (1 - _PADDED) * side <= size <= side
        for size, side in zip(shape, (image.height, image.width), strict=True)
    )
    if not near:
        raise UsageError(
            f"the labels in {path.name} have {' x '.join(map(str, shape))} pixels, the H&E {image.height} x "
            f"{image.width}; save the labels in the H&E's own pixels"
        )
    return image.px_to_um


def _image(section: Section, path: Path) -> Image:
    if section.image is None:
        raise StsrError(
            f"{path.name} is in pixels and {section.path.name} has no H&E; add --coordinates um if they are um"
        )
    return section.image


def _checked(ids: np.ndarray, outlines: np.ndarray, source: str, element: str | None = None) -> Cells:
    """Cells with valid polygons; outlines without an area are dropped."""
    placed = np.isfinite(shapely.bounds(outlines)).all(1)  # False for empty geometries, too
    ids, polygons = ids[placed], np.asarray(outlines, dtype=object)[placed]
    broken = ~shapely.is_valid(polygons)
    polygons[broken] = [polygonal(each) for each in shapely.make_valid(polygons[broken])]
    kept = shapely.area(polygons) > 0
    name = element or source
    if not kept.any():
        raise StsrError(f"{name} contains no cell outlines; give polygons, points with a radius, or labels")
    if len(set(ids[kept])) < kept.sum():
        raise StsrError(f"several cells in {name} have the same id; give each cell its own")
    return Cells.of_polygons(ids[kept], polygons[kept], source, element)


def _check_place(cells: Cells, extent_um: tuple[float, float, float, float], name: str) -> None:
    """Refuse cells that cannot belong to this section: wrong units, or another slide."""
    diameter = float(np.median(2 * np.sqrt(shapely.area(cells.polygons) / np.pi)))
    x0, y0, x1, y1 = extent_um
    x, y = cells.centres_um.T
    inside = float(np.mean((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)))
    if not _DIAMETER_UM[0] <= diameter <= _DIAMETER_UM[1] or inside < _MIN_ON_SECTION:
        raise StsrError(
            f"the cells in {name} have a median diameter of {diameter:.3g} um and {inside:.0%} of them lie on the "
            f"section; set the units of their coordinates with --coordinates um or --coordinates px"
        )
