"""Outlines of cells: valid polygons from vertices, circles and label images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from stsr.errors import StsrError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

_DISC_SEGMENTS = 16  # per quarter of a circle
_STRIP = 1024  # rows of a label image traced together


def traced(labels: Any, px_to_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trace the labels of an image along pixel edges, so that areas are exactly those of the pixels.

    Parameters
    ----------
    labels
        (h, w) integers, numpy or zarr; 0 is background.
    px_to_um
        Affine (3, 3).

    Returns
    -------
    ids, outlines
        Labels (n,) in ascending order and their outlines (n,), um.

    Raises
    ------
    StsrError
        If it is not a plane of integers.
    """
    if len(labels.shape) != 2 or np.dtype(labels.dtype).kind not in "iu":
        raise StsrError("a label image must be one plane of integers; save cells as integers, 0 outside")
    values: list[np.ndarray] = []
    boxes: list[np.ndarray] = []
    for top in range(0, labels.shape[0], _STRIP):
        strip = np.asarray(labels[top : top + _STRIP])
        begins = np.ones(strip.shape, bool)
        begins[:, 1:] = strip[:, 1:] != strip[:, :-1]
        row, left = np.nonzero(begins)  # runs of one label in a row
        right = np.append(left[1:], 0)
        right[np.append(row[1:] != row[:-1], True)] = strip.shape[1]
        value = strip[row, left]
        inside = value > 0
        values.append(value[inside].astype(np.int64))
        boxes.append(shapely.box(left[inside], top + row[inside], right[inside], top + row[inside] + 1.0))
    value = np.concatenate(values)
    if not len(value):
        return value, np.zeros(0, dtype=object)
    ids, cell = np.unique(value, return_inverse=True)
    return ids, moved(united(np.concatenate(boxes), cell), px_to_um)


def rings(ids: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make outlines of cells from vertices.

    Consecutive vertices of one cell are a ring; a cell may have several.

    Parameters
    ----------
    ids
        Cell of each vertex (v,).
    xy
        Vertices (v, 2).

    Returns
    -------
    ids, outlines
        Cells and their outlines (n,).
    """
    owner, outlines = single_rings(ids, xy)
    unique, cell = np.unique(owner, return_inverse=True)
    if len(unique) < len(outlines):
        return unique, united(outlines, cell)
    return owner, outlines


def single_rings(ids: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cell and outline of each ring (n,) of consecutive vertices; parameters are those of `rings`."""
    ring = np.concatenate([[0], np.cumsum(ids[1:] != ids[:-1])])
    enough = np.bincount(ring)[ring] >= 3  # fewer vertices enclose nothing
    _, first, ring = np.unique(ring[enough], return_index=True, return_inverse=True)
    return ids[enough][first], shapely.polygons(shapely.linearrings(xy[enough], indices=ring))


def areas(geometry: GeoDataFrame) -> np.ndarray:
    """Outlines (n,): polygons unchanged, points with a radius as polygons with the area of the disc."""
    outlines = geometry.geometry.to_numpy()
    if "radius" not in geometry:
        return np.asarray(outlines, dtype=object)
    corners = 4 * _DISC_SEGMENTS
    radius = geometry["radius"].to_numpy(float) * np.sqrt(np.pi / (corners / 2 * np.sin(2 * np.pi / corners)))
    return shapely.buffer(outlines, radius, quad_segs=_DISC_SEGMENTS)


def moved(outlines: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Transform outlines (n,) by an affine (3, 3) on (x, y, 1)."""
    return shapely.transform(outlines, lambda xy: xy @ affine[:2, :2].T + affine[:2, 2])


def polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """The polygons of a geometry, without the lines and points that `shapely.make_valid` may leave."""
    parts = shapely.get_parts(shape)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def united(parts: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Unite the parts of each cell; ``cell`` is the index (0, 1, ...) of each part's cell."""
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order])) + 1
    valid = shapely.make_valid(parts[order])
    return np.array([shapely.union_all(group) for group in np.split(valid, starts)], dtype=object)
