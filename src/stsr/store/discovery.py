"""Stores written by other tools: find the image, spots and cells, and the size of a unit in um."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.geometry.lattice import (
    VISIUM_PITCH_UM,
    VISIUM_SPOT_UM,
    is_hexagonal,
    is_visium_pitch,
    lattice_um,
    median_pitch,
)
from stsr.histology.image import um_per_px_of
from stsr.store import catalogue, names
from stsr.store.elements import Frame

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray

_HD_BINS = re.compile(r"(?:square|bin)_?(\d{3})um", re.IGNORECASE)  # spatialdata_io.visium_hd: square_008um
_CELL_NAMES = (names.CELLS, "cell_boundaries", "cell_circles", "nucleus_boundaries")
_LATTICE = ("array_row", "array_col")


def find_frame(sdata: SpatialData, system: str | None = None, um_per_unit: float | None = None) -> Frame:
    """Find the frame of a store that does not record it.

    Tried in this order: maps whose names contain their bin size; Xenium elements, whose own coordinates are um;
    Visium HD bins, whose names contain their pitch; round spots on a hexagonal lattice (from array rows and columns,
    else from their distances), whose neighbours are 100 um apart. The spot diameter of Space Ranger is not used: it
    means 65 um in older data and 55 um in newer. Square arrays without such a name, and single Visium spots, do not
    determine the scale.

    Raises
    ------
    StsrError
        If none of these is found.
    """
    system = system or _main_system(sdata)
    if um_per_unit is None:
        guesses = (_um_from_maps, _um_from_xenium, _um_from_hd, _um_from_lattice)
        um_per_unit = next(filter(None, (guess(sdata, system) for guess in guesses)), None)
    if um_per_unit is None:
        raise StsrError(
            "the store does not record the size of its coordinate units in um; "
            "give it: stsr prepare STORE --um-per-px VALUE"
        )
    return Frame(system, float(um_per_unit))


def affine(element: Any, system: str, um_per_unit: float = 1.0) -> np.ndarray:
    """Affine (3, 3) from an element's own coordinates (x, y, 1) to um.

    Raises
    ------
    StsrError
        If the element is not placed in the coordinate system.
    """
    from spatialdata.transformations import get_transformation

    found = get_transformation(element, get_all=True)
    if system not in found:
        raise StsrError(
            f"an element is not placed in the coordinate system {system!r}; prepare the section again"
        )
    matrix = np.asarray(found[system].to_affine_matrix(("x", "y"), ("x", "y")), dtype=np.float64)
    return np.diag([um_per_unit, um_per_unit, 1.0]) @ matrix


def find_image(sdata: SpatialData, frame: Frame) -> str | None:
    """Find the 8-bit image of three or four channels with the smallest pixels in the frame."""
    found = []
    for name, element in sdata.images.items():
        array = finest(element)
        if array.sizes["c"] in (3, 4) and array.dtype == np.uint8 and _lies_in(element, frame.name):
            found.append((abs(np.linalg.det(affine(element, frame.name)[:2, :2])), name))
    return min(found)[1] if found else None


def finest(element: Any) -> DataArray:
    """Full-resolution level of an image or labels element."""
    return next(iter(element["scale0"].values())) if hasattr(element, "children") else element


def find_spots(sdata: SpatialData) -> tuple[str, str] | None:
    """Find the names of the spots' shapes and of the table that annotates them; None without spots.

    These are ``spots`` if present, else shapes whose table has array rows and columns. Of Visium HD bins the coarsest
    are used: finer ones have too few counts each to be a low-resolution measurement.
    """
    pairs = [pair for pair in _annotations(sdata) if pair[0] in sdata.shapes]
    for shapes, table in pairs:
        if shapes == names.SPOTS:
            return shapes, table
    on_lattice = [pair for pair in pairs if all(key in sdata.tables[pair[1]].obs for key in _LATTICE)]
    found = on_lattice or [
        pair for pair in pairs if not _is_cells(pair[0]) and "radius" in sdata.shapes[pair[0]]
    ]
    return max(found, key=lambda pair: _hd_bin_um(pair[0]) or 0.0) if found else None


def find_hd_table(sdata: SpatialData) -> tuple[str, float] | None:
    """Find the table of the finest Visium HD bins, by name as by ``spatialdata_io.visium_hd``, and their size, um."""
    made = sdata.attrs.get(names.ATTRS_KEY, {})
    found = [
        (bin_um, name)
        for name, table in sdata.tables.items()
        if (bin_um := _hd_bin_um(name)) and name not in made and all(key in table.obs for key in _LATTICE)
    ]
    return min(found)[::-1] if found else None


def find_cells(sdata: SpatialData) -> tuple[str, str | None] | None:
    """Find the names of the cells' shapes and of their table, if they have one; None without cells."""
    annotations = dict(_annotations(sdata))
    tables = [table for shapes, table in annotations.items() if _is_cells(shapes)]
    for name in _CELL_NAMES:
        if name in sdata.shapes:
            return name, annotations.get(name) or _table_that_fits(sdata, name, tables)
    return None


def annotated(sdata: SpatialData, shapes: str, table: str) -> tuple[GeoDataFrame, np.ndarray]:
    """Match shapes with the rows of a table that annotate them, in the order of the table.

    Returns
    -------
    geometry, rows
        GeoDataFrame (n) and the indices (n,) of the table rows that annotate it.

    Raises
    ------
    StsrError
        If table and shapes have no instance in common.
    """
    annotation = sdata.tables[table]
    attributes = annotation.uns["spatialdata_attrs"]
    region, instances = annotation.obs[attributes["region_key"]], annotation.obs[attributes["instance_key"]]
    geometry = sdata.shapes[shapes]
    mine = (region.astype(str) == shapes).to_numpy()
    if not mine.any():  # the table annotates a sister element, such as circles of the same cells
        mine = np.ones(len(region), dtype=bool)
    place = geometry.index.get_indexer(instances)
    if (place[mine] < 0).all() and geometry.index.dtype != instances.dtype:
        # Numbers in one, text in the other.
        place = geometry.index.astype(str).get_indexer(instances.astype(str))
    rows = np.flatnonzero(mine & (place >= 0))
    if not len(rows):
        raise StsrError(
            f"the table {table!r} and the shapes {shapes!r} have no instance in common; prepare the section again"
        )
    return geometry.iloc[place[rows]], rows


def regions(table: AnnData) -> list[str]:
    """Elements that a table annotates."""
    found = table.uns.get("spatialdata_attrs", {}).get("region")
    return [str(element) for element in np.atleast_1d([] if found is None else found)]


def outline(geometry: GeoDataFrame, to_um: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Centres (n, 2) and sizes (n,), um, of circles or squares, and ``"disc"`` or ``"square"``."""
    scale = um_per_px_of(to_um)
    centroid = geometry.geometry.centroid
    centres = np.stack([centroid.x.to_numpy(), centroid.y.to_numpy(), np.ones(len(geometry))], axis=1)
    centres = (centres @ to_um.T)[:, :2]
    if "radius" in geometry:
        return centres, 2 * scale * geometry["radius"].to_numpy(), "disc"
    return centres, scale * np.sqrt(geometry.geometry.area.to_numpy()), "square"


def in_um(geometry: GeoDataFrame, to_um: np.ndarray) -> GeoDataFrame:
    """Transform shapes to um."""
    (a, b, x), (d, e, y) = to_um[:2]
    moved = geometry.copy()
    moved.geometry = geometry.geometry.affine_transform([a, b, d, e, x, y])
    if "radius" in moved:
        moved["radius"] = moved["radius"] * um_per_px_of(to_um)
    moved.attrs = {}  # the transformation it held no longer applies
    return moved


def true_size(centres_um: np.ndarray, size_um: float, shape: str) -> float:
    """55 um for discs on Visium's lattice, otherwise the size given in the store."""
    is_visium = shape == "disc" and is_visium_pitch(median_pitch(centres_um))
    return VISIUM_SPOT_UM if is_visium else size_um


def raw_counts(table: AnnData, rows: np.ndarray, where: str) -> tuple[sp.csr_matrix, list[str]]:
    """Raw counts (n, g) float32 and gene names of some rows of a table: ``layers["counts"]``, else X, else raw.

    Raises
    ------
    StsrError
        If none of them contains non-negative integers only.
    """
    candidates = [(table.layers.get("counts"), table.var_names), (table.X, table.var_names)]
    if table.raw is not None:
        candidates.append((table.raw.X, table.raw.var_names))
    for matrix, genes in candidates:
        if matrix is None:
            continue
        counts = sp.csr_matrix(matrix[rows], dtype=np.float32)
        if np.all(counts.data >= 0) and np.array_equal(counts.data, np.rint(counts.data)):
            return counts, [str(gene) for gene in genes]
    raise StsrError(
        f"the spots' table in {where} contains no raw counts (integers); "
        "put them in layers['counts'] and save it again"
    )


# ------------------------------------------------------------------------------------------------------ frames


def _main_system(sdata: SpatialData) -> str:
    """Coordinate system of the spots, else of all elements; of several, ``global`` or the most frequent one."""
    from spatialdata.transformations import get_transformation

    votes: dict[str, int] = {}
    found = find_spots(sdata)
    everything = (element for _, _, element in sdata.gen_spatial_elements())
    chosen = [sdata.shapes[found[0]]] if found else everything
    for element in chosen:
        for system in get_transformation(element, get_all=True):
            votes[system] = votes.get(system, 0) + 1
    if not votes or "global" in votes:
        return "global"
    # spatialdata_io.visium adds "<dataset>_downscaled_hires" and the like; the plain name is the full resolution
    return min(votes, key=lambda system: ("_downscaled_" in system, -votes[system], len(system)))


def _um_from_maps(sdata: SpatialData, system: str) -> float | None:
    for name, element in sdata.images.items():
        bin_um = names.bin_um_of(name)
        if bin_um and _lies_in(element, system):
            return bin_um / um_per_px_of(affine(element, system))
    return None


def _um_from_xenium(sdata: SpatialData, system: str) -> float | None:
    """In stores by spatialdata_io.xenium, points and shapes are in um and the coordinate system is in pixels."""
    known = (sdata.points, "transcripts"), (sdata.shapes, "cell_circles"), (sdata.shapes, "cell_boundaries")
    for container, name in known:
        if name in container and _lies_in(container[name], system):
            return 1 / um_per_px_of(affine(container[name], system))
    return None


def _um_from_hd(sdata: SpatialData, system: str) -> float | None:
    found = find_spots(sdata)
    bin_um = _hd_bin_um(found[0]) if found else None
    if found is None or not bin_um or not _lies_in(sdata.shapes[found[0]], system):
        return None
    pitch = median_pitch(outline(sdata.shapes[found[0]], affine(sdata.shapes[found[0]], system))[0])
    return bin_um / pitch if pitch else None


def _um_from_lattice(sdata: SpatialData, system: str) -> float | None:
    found = find_spots(sdata)
    if found is None or not _lies_in(sdata.shapes[found[0]], system):
        return None
    geometry, rows = annotated(sdata, *found)
    centres, _, shape = outline(geometry, affine(sdata.shapes[found[0]], system))
    table = sdata.tables[found[1]].obs.iloc[rows]
    if all(key in table for key in _LATTICE):
        return lattice_um(centres, *(table[key].to_numpy(dtype=float) for key in _LATTICE))
    pitch = median_pitch(centres) if shape == "disc" and is_hexagonal(centres) else None
    return VISIUM_PITCH_UM / pitch if pitch else None


# ---------------------------------------------------------------------------------------------------- elements


def _annotations(sdata: SpatialData) -> list[tuple[str, str]]:
    """(element, table) of every table that annotates an element, without results of stsr."""
    pairs = []
    made = sdata.attrs.get(names.ATTRS_KEY, {})
    for name, table in sdata.tables.items():
        if catalogue.is_result(made.get(name, {})):
            continue  # derived from measured elements, not measured itself
        pairs += [(region, name) for region in regions(table)]
    # Tables named after the element come first.
    return sorted(pairs, key=lambda pair: (pair[1] != names.table_name(pair[0]), pair))


def _is_cells(shapes: str) -> bool:
    return shapes in _CELL_NAMES or "cell" in shapes.lower() or "nucle" in shapes.lower()


def _hd_bin_um(shapes: str) -> float | None:
    match = _HD_BINS.search(shapes)
    return float(match[1]) if match else None


def _lies_in(element: Any, system: str) -> bool:
    from spatialdata.transformations import get_transformation

    return system in get_transformation(element, get_all=True)


def _table_that_fits(sdata: SpatialData, shapes: str, tables: list[str]) -> str | None:
    """Table of a sister element (for Xenium, the circles) with the same instances as these shapes."""
    for table in tables:
        try:
            annotated(sdata, shapes, table)
        except StsrError:
            continue
        return table
    return None
