"""Outlines of cells: from vertices, circles and label images to valid polygons."""

from __future__ import annotations

import numpy as np
import shapely

from stsr.errors import StsrError

_DISC_SEGMENTS = 16  # per quarter of a circle
_STRIP = 1024  # rows of a label image traced together


def traced(labels, px_to_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outlines of a label image along the edges of its pixels, so that areas are exactly those of the pixels.

    Parameters
    ----------
    labels
        (h, w) whole numbers, numpy or zarr; 0 is outside.
    px_to_um
        Affine (3, 3).

    Returns
    -------
    ids, outlines
        Labels (n,) ascending and their outlines (n,), um.

    Raises
    ------
    StsrError
        If it is no image of whole numbers.
    """
    if len(labels.shape) != 2 or np.dtype(labels.dtype).kind not in "iu":
        raise StsrError("a label image is one plane of whole numbers; save cells as integers, 0 outside")
    values, boxes = [], []
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
    """Ids and outlines (n,) from vertices (v, 2) and the ids (v,) of their cells.

    A run of rows of one cell is a ring; a cell may have several.
    """
    ring = np.concatenate([[0], np.cumsum(ids[1:] != ids[:-1])])
    enough = np.bincount(ring)[ring] >= 3  # fewer vertices enclose nothing
    _, first, ring = np.unique(ring[enough], return_index=True, return_inverse=True)
    outlines = shapely.polygons(shapely.linearrings(xy[enough], indices=ring))
    unique, cell = np.unique(ids[enough][first], return_inverse=True)
    if len(unique) < len(outlines):
        return unique, united(outlines, cell)
    return ids[enough][first], outlines


def areas(geometry) -> np.ndarray:
    """Polygons as they are; points with a radius as polygons of the disc's area."""
    outlines = geometry.geometry.to_numpy()
    if "radius" not in geometry:
        return np.asarray(outlines, dtype=object)
    corners = 4 * _DISC_SEGMENTS
    radius = geometry["radius"].to_numpy(float) * np.sqrt(np.pi / (corners / 2 * np.sin(2 * np.pi / corners)))
    return shapely.buffer(outlines, radius, quad_segs=_DISC_SEGMENTS)


def moved(outlines: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Outlines (n,) after an affine (3, 3) on (x, y, 1)."""
    return shapely.transform(outlines, lambda xy: xy @ affine[:2, :2].T + affine[:2, 2])


def polygonal(shape):
    """The areas of a geometry: mended outlines may come with loose lines."""
    parts = shapely.get_parts(shape)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def united(parts: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """One geometry of each cell's parts; ``cell`` are indices 0, 1, ... of the parts."""
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order])) + 1
    valid = shapely.make_valid(parts[order])
    return np.array([shapely.union_all(group) for group in np.split(valid, starts)], dtype=object)
