"""Cells as outlines in um: from a store, or from the files of QuPath, Xenium, Cellpose, sopa and others."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely

from stsr.errors import StsrError, UsageError
from stsr.files import reading
from stsr.geometry.outlines import areas, moved, polygonal, rings, traced
from stsr.store import catalogue, discovery, names

UM, PX = "um", "px"
COORDINATES = (UM, PX)
"""What coordinates in a file are: um of the section, or pixels of its H&E at full resolution."""

_GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
_TABLES = (".parquet", ".csv", ".csv.gz")
_PICTURES = (".tif", ".tiff", ".png")
_VERTICES = ("cell_id", "vertex_x", "vertex_y")
_CELLS_OF_QUPATH = {"cell", "detection"}
_DIAMETER_UM = (2.0, 150.0)  # median of what can be cells: from platelets to megakaryocytes
_ON_SECTION = 0.1  # least part of an import's cells: a whole slide may be given for a piece of it
_PADDED = 0.01  # by how much an image may have grown when its pyramid was built


@dataclass(frozen=True)
class Segmentation:
    """Cells of a section.

    Parameters
    ----------
    ids
        (n,) unique names: text, or whole numbers for labels.
    outlines
        (n,) valid shapely polygons or multipolygons, um.
    source
        Where they come from, for people.
    element
        Shapes or labels of the store that they are; None if they are new to it.
    """

    ids: np.ndarray
    outlines: np.ndarray
    source: str
    element: str | None = None

    @property
    def centres_um(self) -> np.ndarray:
        """(n, 2) x and y of the centroids, um."""
        return shapely.get_coordinates(shapely.centroid(self.outlines))


# ------------------------------------------------------------------------------------------------- in the store


def stored(section, element: str | None = None) -> Segmentation:
    """Cells that a section has.

    Parameters
    ----------
    section
        A `stsr.store.section.Section`.
    element
        Shapes or labels; by default the section's own cells.

    Raises
    ------
    UsageError
        If there is no such element, or it is neither shapes nor labels.
    StsrError
        If no element is named and the section has no cells, or the element holds no areas.
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
        ids, outlines = traced(array, _to_um(section, sdata.labels[element]))
    elif element in sdata.shapes:
        shapes = sdata.shapes[element]
        ids, outlines = shapes.index.to_numpy(), moved(areas(shapes), _to_um(section, shapes))
    else:
        there = [name for name, kind in section.elements.items() if kind in ("shapes", "labels")]
        raise UsageError(
            f"{section.path.name} has no shapes or labels {element!r}; it has: {', '.join(there) or 'none'}"
        )
    return _checked(Segmentation(ids, outlines, f"{element} of the store", element), element)


def of_table(section, table: str) -> Segmentation:
    """The cells that a table annotates, in its order.

    Raises
    ------
    UsageError, StsrError
        As `stored`; StsrError too if the element has lost some of the table's cells.
    """
    annotation = section.sdata.tables[table]
    attributes = annotation.uns["spatialdata_attrs"]
    found = stored(section, str(np.atleast_1d(attributes["region"])[0]))
    place = {name: number for number, name in enumerate(found.ids)}
    try:
        rows = [place[name] for name in annotation.obs[attributes["instance_key"]]]
    except KeyError as error:
        raise StsrError(
            f"{found.element!r} has no cell {error} of {table!r}; run stsr singlecell with --overwrite"
        ) from None
    return replace(found, ids=found.ids[rows], outlines=found.outlines[rows])


def measured_counts(section, segmentation: Segmentation):
    """What was measured in cells of the store.

    Returns
    -------
    counts, genes, rows
        Raw counts (m, g) csr, names (g,), and which cells (m,) of the segmentation they are of; None if nothing was
        measured in these cells, or not as raw counts.
    """
    sdata, element = section.sdata, segmentation.element
    made = {name for name, entry in section.provenance.items() if catalogue.is_result(entry)}
    tables = [
        name
        for name, table in sdata.tables.items()
        if name not in made and element in np.atleast_1d(table.uns.get("spatialdata_attrs", {}).get("region"))
    ]
    own = discovery.find_cells(sdata)  # its table may annotate a sister element: Xenium's circles
    if not tables and own and own[0] == element and own[1] not in (None, *made):
        tables = [own[1]]
    if not tables or element not in sdata.shapes:
        return None
    table = names.table_name(element) if names.table_name(element) in tables else tables[0]
    try:
        geometry, rows = discovery.annotated(sdata, element, table)
        counts, genes = discovery.raw_counts(sdata.tables[table], rows, section.path.name)
    except StsrError:
        return None
    place = {name: number for number, name in enumerate(segmentation.ids)}
    there = np.array([name in place for name in geometry.index])
    return counts[there], genes, np.array([place[name] for name in geometry.index[there]], dtype=int)


def _to_um(section, element) -> np.ndarray:
    return discovery.affine(element, section.frame.name, section.frame.um_per_unit)


# ------------------------------------------------------------------------------------------------------ in files


def imported(
    path: str | Path,
    section,
    extent_um: tuple[float, float, float, float],
    coordinates: str | None = None,
) -> Segmentation:
    """Cells of a file.

    Parameters
    ----------
    path
        GeoJSON (QuPath's, gzipped or not); parquet or csv with ``cell_id``, ``vertex_x`` and ``vertex_y`` (Xenium's
        boundaries), GeoParquet; a label image (.tif, .png, a zarr array or OME-Zarr) of the size of the H&E; a
        SpatialData store with cells.
    section
        The `stsr.store.section.Section` they are for.
    extent_um
        (x0, y0, x1, y1), where cells are looked for: they must lie there, or their units are wrong.
    coordinates
        ``"um"`` or ``"px"``; by default px for GeoJSON, um for tables. Label images are always in pixels, stores in um.

    Raises
    ------
    UsageError
        If the format or the coordinates are unknown, or a label image has another size than the H&E.
    StsrError
        If the file is missing, damaged, or holds no cells of this section.
    """
    path = Path(path)
    if coordinates not in (None, *COORDINATES):
        raise UsageError(f"--coordinates is um or px, not {coordinates!r}")
    if not path.exists():
        raise StsrError(f"there is no segmentation at {path}; check --segmentation")
    name = path.name.lower()
    if path.is_dir():
        ids, outlines = _zarr(path, section)
    elif name.endswith(_PICTURES):
        ids, outlines = _picture(path, section)
    elif name.endswith((*_GEOJSON, *_TABLES)):
        is_json = name.endswith(_GEOJSON)
        ids, outlines = (_geojson if is_json else _table)(path)
        if (coordinates or (PX if is_json else UM)) == PX:
            outlines = moved(outlines, _image(section, path).px_to_um)
    else:
        raise UsageError(
            f"{path.name} is no segmentation that stsr reads; give .geojson, .parquet, .csv, .tif or .zarr"
        )
    found = _checked(Segmentation(ids, outlines, path.name), path.name)
    _check_place(found, extent_um, path.name)
    return found


def _geojson(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cells or detections as QuPath exports them, with their own outline and not their nucleus'; else all polygons."""
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
        named = range(1, len(features) + 1)
    return np.array([str(name) for name in named]), np.asarray(outlines, dtype=object)


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Outlines as rows of vertices, or a GeoParquet."""
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
        raise StsrError(f"{path.name} has no outline of a cell; give another file with --segmentation")
    ids = vertices["cell_id"]
    if len(ids) and isinstance(ids.iloc[0], bytes):
        ids = ids.str.decode("utf-8")
    with reading(path):
        return rings(ids.astype(str).to_numpy(), vertices[["vertex_x", "vertex_y"]].to_numpy(float))


def _zarr(path: Path, section) -> tuple[np.ndarray, np.ndarray]:
    """The cells of a SpatialData store, or an array of labels."""
    import zarr

    from stsr.store.section import open_section

    with reading(path):
        node = zarr.open(path, mode="r")
        attributes = dict(node.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if scales:  # labels as OME-Zarr
            node = node[scales[0]["datasets"][0]["path"]]
    if isinstance(node, zarr.Array):
        return traced(node, _image_transform(node.shape, section, path))
    found = stored(open_section(path))
    return found.ids.astype(str), found.outlines


def _picture(path: Path, section) -> tuple[np.ndarray, np.ndarray]:
    import tifffile

    with reading(path):
        if path.suffix.lower() == ".png":
            from PIL import Image as Pillow

            labels = np.asarray(Pillow.open(path))
        else:
            labels = tifffile.imread(path)
    return traced(labels, _image_transform(labels.shape, section, path))


def _image_transform(shape: tuple[int, ...], section, path: Path) -> np.ndarray:
    image = _image(section, path)
    near = len(shape) == 2 and all(
        (1 - _PADDED) * side <= size <= side
        for size, side in zip(shape, (image.height, image.width), strict=True)
    )
    if not near:
        raise UsageError(
            f"the labels in {path.name} have {' x '.join(map(str, shape))} pixels, the H&E {image.height} x "
            f"{image.width}; save them in the H&E's own pixels"
        )
    return image.px_to_um


def _image(section, path: Path):
    if section.image is None:
        raise StsrError(
            f"{path.name} is in pixels and {section.path.name} has no H&E; add --coordinates um if they are um"
        )
    return section.image


def _checked(found: Segmentation, name: str) -> Segmentation:
    """Valid areas only; what encloses nothing is left out."""
    placed = np.isfinite(shapely.bounds(found.outlines)).all(1)  # not so for what is empty, too
    found = replace(found, ids=found.ids[placed], outlines=np.asarray(found.outlines, dtype=object)[placed])
    outlines = found.outlines.copy()
    broken = ~shapely.is_valid(outlines)
    outlines[broken] = [polygonal(each) for each in shapely.make_valid(outlines[broken])]
    kept = shapely.area(outlines) > 0
    if not kept.any():
        raise StsrError(f"{name} holds no outline of a cell; give polygons, points with a radius, or labels")
    if len(set(found.ids[kept])) < kept.sum():
        raise StsrError(f"several cells in {name} have the same id; give each its own")
    return replace(found, ids=found.ids[kept], outlines=outlines[kept])


def _check_place(found: Segmentation, extent_um, name: str) -> None:
    """Refuse cells that cannot be this section's: wrong units, or another slide."""
    diameter = float(np.median(2 * np.sqrt(shapely.area(found.outlines) / np.pi)))
    x0, y0, x1, y1 = extent_um
    x, y = found.centres_um.T
    inside = float(np.mean((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)))
    if not _DIAMETER_UM[0] <= diameter <= _DIAMETER_UM[1] or inside < _ON_SECTION:
        raise StsrError(
            f"the cells in {name} have a diameter of {diameter:.3g} um and {inside:.0%} of them lie on the section; "
            f"say what their coordinates are with --coordinates um or --coordinates px"
        )
