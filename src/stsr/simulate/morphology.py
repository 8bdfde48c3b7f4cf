"""Morphology of the tissue: ducts, tumour, stroma, fat, vessels, immune clusters, and their cells."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stsr.simulate.genes import CELL_TYPES, PROGRAMMES

#: Pixel of the region map: fine enough for a layer of single cells, coarse enough for speed.
MAP_UM = 2.0

#: Corners of a cell's outline, about as many as in the instrument's boundaries.
CORNERS = 16


class Region(IntEnum):
    """Kinds of tissue in the region map."""

    BACKGROUND = 0
    STROMA = 1
    TUMOUR = 2
    EPITHELIUM = 3
    MYOEPITHELIUM = 4
    IMMUNE = 5
    VESSEL_WALL = 6
    VESSEL_MURAL = 7
    FAT = 8
    LUMEN = 9
    NECROSIS = 10
    BLOOD = 11


#: Cells of a region: (share of the densest packing, priority, mixture of cell types). Regions with a lower priority
#: number are filled first, so that layers of single cells stay closed.
_FILL: dict[Region, tuple[float, float, dict[str, float]]] = {
    Region.STROMA: (
        0.42,
        3,
        {"Fibroblast": 0.75, "Macrophage": 0.09, "T_cell": 0.08, "Endothelial": 0.05, "Plasmablast": 0.03},
    ),
    Region.TUMOUR: (1.0, 2, {"Malignant": 0.93, "Macrophage": 0.03, "T_cell": 0.03, "Epithelial": 0.01}),
    Region.EPITHELIUM: (1.0, 1, {"Epithelial": 0.98, "T_cell": 0.02}),
    Region.MYOEPITHELIUM: (1.0, 0, {"Myoepithelial": 1.0}),
    Region.IMMUNE: (
        1.0,
        2,
        {"T_cell": 0.5, "B_cell": 0.33, "Plasmablast": 0.07, "Macrophage": 0.07, "Fibroblast": 0.03},
    ),
    Region.VESSEL_WALL: (1.0, 0, {"Endothelial": 1.0}),
    Region.VESSEL_MURAL: (1.0, 1, {"Pericyte": 1.0}),
    Region.FAT: (0.3, 3, {"Fibroblast": 0.45, "Macrophage": 0.3, "Endothelial": 0.25}),
}

#: Per cell type: radius of the cell (um), of its nucleus (um), mean elongation (long axis / short axis).
_SHAPE = {
    "Malignant": (6.8, 4.3, 1.15),
    "Epithelial": (5.8, 3.4, 1.3),
    "Myoepithelial": (5.0, 2.7, 2.0),
    "Fibroblast": (6.5, 2.6, 2.8),
    "Endothelial": (5.2, 2.4, 2.6),
    "Pericyte": (5.2, 2.4, 2.4),
    "T_cell": (3.9, 2.6, 1.05),
    "B_cell": (4.0, 2.7, 1.05),
    "Plasmablast": (5.0, 2.7, 1.15),
    "Macrophage": (6.8, 3.1, 1.3),
}
CELL_RADIUS_UM, NUCLEUS_RADIUS_UM, ELONGATION = np.array([_SHAPE[name] for name in CELL_TYPES]).T

#: Distance from its centre within which a duct bends the fibres, and a vessel is drawn.
_DUCT_REACH_UM, _VESSEL_REACH_UM = 500.0, 100.0


@dataclass(frozen=True)
class Morphology:
    """Maps (y, x) of the tissue on pixels of `MAP_UM`."""

    region: np.ndarray
    """(y, x) uint8: values of `Region`."""
    fibre_rad: np.ndarray
    """(y, x) float: direction of fibres and of elongated cells."""
    programmes: np.ndarray
    """(programme, y, x) float: standardised smooth fields, in the order of `genes.PROGRAMMES`."""

    def at(self, field: np.ndarray, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Value of a map (y, x) at points, um; outside the map, the value at its nearest edge."""
        row = np.clip((np.asarray(y_um) / MAP_UM).astype(int), 0, field.shape[0] - 1)
        column = np.clip((np.asarray(x_um) / MAP_UM).astype(int), 0, field.shape[1] - 1)
        return field[row, column]


def smooth_field(shape: tuple[int, int], length_um: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian random field (y, x) with mean 0 and standard deviation 1, correlated over about `length_um`."""
    sigma = length_um / MAP_UM
    coarse = max(1, int(sigma / 4))  # smooth a coarse raster and upsample it, which is much faster
    small = [int(np.ceil((side + 8 * sigma) / coarse)) + 1 for side in shape]
    field = ndimage.gaussian_filter(rng.standard_normal(small), sigma / coarse, mode="wrap")
    margin = 4 * sigma / coarse  # smoothing wraps around; the margin keeps opposite edges independent
    rows, columns = (margin + (np.arange(side) + 0.5) / coarse for side in shape)
    field = ndimage.map_coordinates(field, np.meshgrid(rows, columns, indexing="ij"), order=3, mode="nearest")
    return (field - field.mean()) / max(field.std(), 1e-9)


def build_morphology(width_um: float, height_um: float, rng: np.random.Generator) -> Morphology:
    """Lay out the regions, fibre directions and programme fields of a breast-like tissue.

    Parameters
    ----------
    width_um, height_um : float
        Extent in x and y.
    rng : numpy.random.Generator
    """
    shape = (int(np.ceil(height_um / MAP_UM)), int(np.ceil(width_um / MAP_UM)))
    y, x = ((np.indices(shape) + 0.5) * MAP_UM).astype(np.float32)
    wobble = smooth_field(shape, 25, rng)
    region = np.full(shape, Region.STROMA, np.uint8)

    fat = smooth_field(shape, 180, rng) + 0.08 * wobble
    region[fat > np.quantile(fat, 0.9)] = Region.FAT
    nests = smooth_field(shape, 70, rng) + 0.35 * smooth_field(shape, 20, rng)
    invaded = smooth_field(shape, 350, rng)
    nest_level = nests + 0.9 * invaded - 0.8 * (region == Region.FAT)
    region[nest_level > np.quantile(nest_level, 0.84)] = Region.TUMOUR
    clusters = smooth_field(shape, 45, rng) + 0.8 * smooth_field(shape, 200, rng) + 0.15 * wobble
    region[(clusters > np.quantile(clusters, 0.95)) & (region == Region.STROMA)] = Region.IMMUNE

    duct_um = np.full(shape, 1e3, np.float32)  # distance to the rim of the nearest duct, negative inside
    area_mm2 = width_um * height_um / 1e6
    for _ in range(rng.poisson(7 * area_mm2) + 1):
        _add_duct(region, duct_um, x, y, wobble, rng)
    for _ in range(rng.poisson(16 * area_mm2) + 1):
        _add_vessel(region, x, y, wobble, rng)
    edge_um = np.minimum.reduce([x, width_um - x, y, height_um - y]) + 14 * smooth_field(shape, 90, rng)
    region[edge_um < 12] = Region.BACKGROUND

    bend = smooth_field(shape, 160, rng) * 60 + np.clip(duct_um, -50, 250) + 8 * wobble
    slope_y, slope_x = np.gradient(ndimage.gaussian_filter(bend, 6))
    fibre = np.arctan2(slope_x, -slope_y)  # along contour lines: fibres wrap around ducts
    return Morphology(region, fibre.astype(np.float32), _programme_fields(region, nest_level, clusters, rng))


def _programme_fields(region, nest_level, clusters, rng) -> np.ndarray:
    """Standardised fields of `PROGRAMMES`; stroma follows the tumour, inflammation the immune clusters."""
    near_tumour = ndimage.gaussian_filter((region == Region.TUMOUR).astype(np.float32), 40 / MAP_UM)
    fields = {
        "luminal": smooth_field(region.shape, 220, rng),
        "cycling": smooth_field(region.shape, 90, rng) + 0.4 * nest_level,
        "activated_stroma": smooth_field(region.shape, 150, rng) * 0.5 + 4 * near_tumour,
        "inflamed": 0.7 * clusters + 0.5 * smooth_field(region.shape, 120, rng),
    }
    stack = np.stack([fields[name] for name in PROGRAMMES])
    mean, spread = stack.mean((1, 2), keepdims=True), stack.std((1, 2), keepdims=True)
    return np.clip((stack - mean) / spread, -2.5, 2.5).astype(np.float32)


def _window(centre_x_um: float, centre_y_um: float, reach_um: float) -> tuple[slice, slice]:
    """Rows and columns of the maps near a point, so that the cost of a duct does not grow with the tissue."""

    def around(at_um: float) -> slice:
        return slice(max(0, int((at_um - reach_um) / MAP_UM)), int((at_um + reach_um) / MAP_UM) + 1)

    return around(centre_y_um), around(centre_x_um)


def _add_duct(region, duct_um, x, y, wobble, rng) -> None:
    """Add a duct: normal (layers around a lumen) or filled with carcinoma in situ, with or without necrosis."""
    centre_x, centre_y = rng.uniform(0, x.max()), rng.uniform(0, y.max())
    window = _window(centre_x, centre_y, _DUCT_REACH_UM)
    region, duct_um, x, y, wobble = (a[window] for a in (region, duct_um, x, y, wobble))
    stretch, turn = rng.uniform(1, 1.8), rng.uniform(0, np.pi)
    along = (x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)
    across = (y - centre_y) * np.cos(turn) - (x - centre_x) * np.sin(turn)
    filled = rng.random() < 0.5
    radius_um = rng.uniform(60, 130) if filled else rng.uniform(28, 60)
    rim_um = np.hypot(along / stretch, across * stretch**0.3) - radius_um + 6 * wobble
    np.minimum(duct_um, rim_um, out=duct_um)
    region[rim_um < 12] = Region.STROMA  # a sheath separates it from its surroundings
    region[rim_um < 0] = Region.MYOEPITHELIUM
    if filled:
        region[rim_um < -8] = Region.TUMOUR
        if radius_um > 90:
            region[rim_um < -radius_um * 0.62] = Region.NECROSIS
    else:
        region[rim_um < -8] = Region.EPITHELIUM
        region[rim_um < -24] = Region.LUMEN


def _add_vessel(region, x, y, wobble, rng) -> None:
    """Add a vessel in the stroma: blood or an empty lumen, endothelium, and mural cells if it is wide."""
    centre_x, centre_y = rng.uniform(0, x.max()), rng.uniform(0, y.max())
    row, column = int(centre_y / MAP_UM), int(centre_x / MAP_UM)
    if region[row, column] not in (Region.STROMA, Region.FAT):
        return
    window = _window(centre_x, centre_y, _VESSEL_REACH_UM)
    region, x, y, wobble = (a[window] for a in (region, x, y, wobble))
    lumen_um, stretch, turn = rng.uniform(4, 16), rng.uniform(1, 2.2), rng.uniform(0, np.pi)
    along = (x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)
    across = (y - centre_y) * np.cos(turn) - (x - centre_x) * np.sin(turn)
    rim_um = np.hypot(along / stretch, across) - lumen_um + wobble
    if lumen_um > 10:
        region[rim_um < 16] = Region.VESSEL_MURAL
    region[rim_um < 7] = Region.VESSEL_WALL
    region[rim_um < 0] = Region.BLOOD if rng.random() < 0.6 else Region.LUMEN


@dataclass(frozen=True)
class Cells:
    """The n cells; all positions are in um."""

    x_um: np.ndarray
    y_um: np.ndarray
    type_index: np.ndarray
    """(n,) int: index into `genes.CELL_TYPES`."""
    outline_um: np.ndarray
    """(n, CORNERS, 2) float64: convex outlines (x, y), which do not overlap."""
    nucleus_um: np.ndarray
    """(n, CORNERS, 2) float64: likewise; a nucleus lies inside its cell."""

    def __len__(self) -> int:
        return len(self.x_um)


def place_cells(tissue: Morphology, width_um: float, height_um: float, rng: np.random.Generator) -> Cells:
    """Place cells at random with a minimal distance, by region, and cut their outlines where they meet."""
    darts = int(width_um * height_um * 0.06)  # several times the capacity of the densest region
    x_um, y_um = rng.uniform(1, width_um - 1, darts), rng.uniform(1, height_um - 1, darts)
    region = tissue.at(tissue.region, x_um, y_um)
    kind = np.full(darts, -1)
    priority = rng.random(darts)
    for place, (fill, order, mixture) in _FILL.items():
        here = np.flatnonzero(region == place)
        here = here[rng.random(len(here)) < fill**2]
        types = [CELL_TYPES.index(name) for name in mixture]
        kind[here] = rng.choice(types, size=len(here), p=list(mixture.values()))
        priority[here] += order
    kept = np.flatnonzero(kind >= 0)
    x_um, y_um, kind, region, priority = (a[kept] for a in (x_um, y_um, kind, region, priority))
    loose, tight = np.isin(region, (Region.STROMA, Region.FAT)), region == Region.IMMUNE
    claim_um = CELL_RADIUS_UM[kind] * np.select([loose, tight], [1.35, 0.76], 0.85)
    won = _first_come(np.column_stack([x_um, y_um]), claim_um, priority)
    x_um, y_um, kind = x_um[won], y_um[won], kind[won]
    turn = tissue.at(tissue.fibre_rad, x_um, y_um) + rng.normal(0, 0.2, len(x_um))
    free = np.isin(kind, [CELL_TYPES.index(name) for name in ("Malignant", "T_cell", "B_cell", "Macrophage")])
    turn = np.where(free, rng.uniform(0, np.pi, len(x_um)), turn)
    return _outlined(x_um, y_um, kind, turn, (width_um, height_um), rng)


def _first_come(xy_um, claim_um, priority) -> np.ndarray:
    """Indices of the candidates kept: one is dropped if another of lower priority number is too near."""
    pairs = cKDTree(xy_um).query_pairs(2 * claim_um.max(), output_type="ndarray")
    gap = np.hypot(*(xy_um[pairs[:, 0]] - xy_um[pairs[:, 1]]).T)
    pairs = pairs[gap < claim_um[pairs].sum(1)]
    first = np.where(priority[pairs[:, 0]] < priority[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    second = pairs.sum(1) - first
    undecided, stands = np.ones(len(xy_um), bool), np.zeros(len(xy_um), bool)
    while undecided.any():
        open_pair = undecided[first] & undecided[second]
        first, second = first[open_pair], second[open_pair]
        blocked = np.zeros(len(xy_um), bool)
        blocked[second] = True
        new = undecided & ~blocked
        stands |= new
        undecided &= ~new
        undecided[second[new[first]]] = False
    return np.flatnonzero(stands)


def _outlined(x_um, y_um, kind, turn, extent_um, rng) -> Cells:
    """Give cells elliptic outlines and nuclei, cut along straight lines where neighbours meet."""
    n = len(x_um)
    grown = rng.lognormal(0, 0.12, n)
    long = np.sqrt(1 + (ELONGATION[kind] - 1) * rng.lognormal(0, 0.25, n))
    angle = np.arange(CORNERS) * 2 * np.pi / CORNERS
    # polar form of an ellipse of unit mean radius with its long axis along `turn`
    bearing = angle[None] - turn[:, None]
    ellipse = 1 / np.hypot(np.cos(bearing) / long[:, None], np.sin(bearing) * long[:, None])  # (n, corners)
    reach = (CELL_RADIUS_UM[kind] * grown)[:, None] * np.sqrt(ellipse)  # a cell is rounder than its nucleus
    reach = _cut_by_neighbours(x_um, y_um, reach, angle)
    for limit, wall in (
        (x_um, np.pi),
        (extent_um[0] - x_um, 0),
        (y_um, -np.pi / 2),
        (extent_um[1] - y_um, np.pi / 2),
    ):
        facing = np.cos(angle - wall)[None]
        reach = np.minimum(reach, np.where(facing > 1e-3, limit[:, None] / np.maximum(facing, 1e-3), np.inf))
    wavy = 1 + rng.normal(0, 0.03, (n, CORNERS))
    nucleus = (NUCLEUS_RADIUS_UM[kind] * grown)[:, None] * ellipse * wavy
    nucleus = np.minimum(nucleus, 0.92 * reach)
    spokes = np.stack([np.cos(angle), np.sin(angle)], -1)[None]
    centre = np.stack([x_um, y_um], -1)[:, None]
    return Cells(
        x_um,
        y_um,
        kind,
        centre + reach[..., None] * spokes,
        centre + nucleus[..., None] * spokes,
    )


def _cut_by_neighbours(x_um, y_um, reach, angle) -> np.ndarray:
    """Shorten radii (n, corners) so that each cell stays on its side of a line between it and each neighbour.

    The half-planes of a pair do not overlap, and a convex set contains its chords, so outlines do not overlap.
    """
    xy = np.column_stack([x_um, y_um])
    pairs = cKDTree(xy).query_pairs(2 * reach.max(), output_type="ndarray")
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    mine, other = pairs.T
    way = xy[other] - xy[mine]
    gap = np.hypot(*way.T)
    size = reach.mean(1)
    share = gap * size[mine] / (size[mine] + size[other])  # distance from the cell to the line
    facing = np.cos(angle[None] - np.arctan2(way[:, 1], way[:, 0])[:, None])  # (pair, corners)
    limit = np.where(facing > 1e-3, share[:, None] / np.maximum(facing, 1e-3), np.inf)
    reach = reach.copy()
    np.minimum.at(reach, mine, limit)
    return reach
