"""Render the H&E image of a simulated tissue by optical densities of haematoxylin and eosin."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from stsr.simulate.genes import CELL_TYPES
from stsr.simulate.morphology import MAP_UM, Region
from stsr.simulate.tissue import Tissue

#: Optical density of the stains (rows: H, E) in red, green and blue: H from Ruifrok and Johnston (2001), E between
#: theirs and that of Macenko et al. (2009), which gives the pink of scanned slides.
STAIN_OD = np.array([[0.650, 0.704, 0.286], [0.110, 0.915, 0.390]])

#: Amount of (H, E) between the nuclei of each region.
_GROUND = {
    Region.BACKGROUND: (0.015, 0.01),
    Region.STROMA: (0.05, 0.34),
    Region.TUMOUR: (0.13, 0.33),
    Region.EPITHELIUM: (0.12, 0.36),
    Region.MYOEPITHELIUM: (0.07, 0.40),
    Region.IMMUNE: (0.13, 0.20),
    Region.VESSEL_WALL: (0.06, 0.42),
    Region.VESSEL_MURAL: (0.07, 0.52),
    Region.FAT: (0.015, 0.02),
    Region.LUMEN: (0.015, 0.03),
    Region.NECROSIS: (0.16, 0.52),
    Region.BLOOD: (0.03, 0.70),
}

#: Per cell type: H of the nucleus, H and E added by the cell body, and paleness of the nucleus' centre (0..1).
_LOOK = {
    "Malignant": (0.72, 0.07, 0.07, 0.38),
    "Epithelial": (0.80, 0.05, 0.08, 0.20),
    "Myoepithelial": (0.85, 0.00, 0.06, 0.05),
    "Fibroblast": (0.80, 0.01, 0.03, 0.05),
    "Endothelial": (0.88, 0.01, 0.04, 0.05),
    "Pericyte": (0.85, 0.01, 0.08, 0.05),
    "T_cell": (1.20, 0.04, 0.00, 0.00),
    "B_cell": (1.15, 0.05, 0.00, 0.00),
    "Plasmablast": (1.10, 0.17, 0.05, 0.10),
    "Macrophage": (0.68, -0.01, -0.04, 0.20),
}

_BAND_PX = 512
_HALO_PX = 8


def image_frame(
    tissue: Tissue, um_per_px: float, mirror: bool = False, turn_deg: float = 0.0
) -> tuple[np.ndarray, tuple[int, int]]:
    """Frame of an image of the whole tissue, mirrored or rotated.

    Parameters
    ----------
    tissue : Tissue
    um_per_px : float
    mirror : bool
        Whether to invert the image's y axis.
    turn_deg : float
        Rotation of the image's x axis in the tissue's plane, from x towards y.

    Returns
    -------
    px_to_um : (3, 3) array
        Affine from image (x, y, 1), in pixels with pixel i spanning [i, i + 1), to the tissue's um.
    shape : (int, int)
        Rows and columns of the smallest image that contains the tissue.

    Raises
    ------
    ValueError
        If `um_per_px` is not positive.
    """
    if not um_per_px > 0:
        raise ValueError(f"the size of an image pixel must be positive, not {um_per_px} um")
    turn = np.deg2rad(turn_deg)
    linear = um_per_px * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    if mirror:
        linear[:, 1] *= -1
    corners_um = np.array(
        [[0, 0], [tissue.width_um, 0], [0, tissue.height_um], [tissue.width_um, tissue.height_um]]
    )
    corners_px = np.linalg.solve(linear, corners_um.T)  # (2, 4)
    low, high = corners_px.min(1), corners_px.max(1)
    px_to_um = np.eye(3)
    px_to_um[:2, :2] = linear
    px_to_um[:2, 2] = linear @ low
    columns, rows = np.ceil(np.round(high - low, 6)).astype(int)
    return px_to_um, (int(rows), int(columns))


def render_he(
    tissue: Tissue,
    um_per_px: float = 1.0,
    px_to_um: np.ndarray | None = None,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Render the section as a bright-field H&E image.

    Amounts of the two stains are drawn (ground by region, fibres, cell bodies, nuclei by type), blurred by the optics,
    and converted to light by the Beer-Lambert law, `I = exp(-(H od_H + E od_E))`, on pixels of 1 um or finer that are
    then averaged. Rendering a tissue twice gives the same image.

    Parameters
    ----------
    tissue : Tissue
    um_per_px : float
        Pixel size; ignored if `px_to_um` is given.
    px_to_um, shape
        Frame from `image_frame`, both or neither. By default that of the tissue, upright.

    Returns
    -------
    (y, x, 3) uint8 array
    """
    if px_to_um is None or shape is None:
        px_to_um, shape = image_frame(tissue, um_per_px)
    pixel_um = np.sqrt(abs(np.linalg.det(px_to_um[:2, :2])))
    fine = max(1, int(np.ceil(pixel_um - 1e-6)))  # finer pixels per pixel
    fine_to_um = px_to_um @ np.diag([1 / fine, 1 / fine, 1])
    ground = _ground(tissue)
    rows, columns = shape[0] * fine, shape[1] * fine
    shapes = _in_pixels(tissue, fine_to_um)
    image = np.empty((shape[0], shape[1], 3), np.uint8)
    step = max(1, _BAND_PX // fine) * fine
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        rng = np.random.default_rng([tissue.texture_seed, top])
        span = (top - _HALO_PX, bottom + _HALO_PX)
        stains = _stain_band(tissue, ground, shapes, fine_to_um, span, columns, rng)
        blur_px = 0.5 * fine / pixel_um
        stains = [ndimage.gaussian_filter(s, blur_px, mode="nearest")[_HALO_PX:-_HALO_PX] for s in stains]
        light = np.exp(-np.tensordot(np.stack(stains, -1), STAIN_OD.astype(np.float32), 1))  # (y, x, 3)
        light = light.reshape((bottom - top) // fine, fine, shape[1], fine, 3).mean((1, 3))
        light += rng.normal(0, 0.008, light.shape).astype(np.float32)
        image[top // fine : bottom // fine] = np.clip(light * 247, 0, 255).astype(np.uint8)
    return image


def _ground(tissue: Tissue) -> np.ndarray:
    """Amounts of H and E (2, y, x) between cells, on the pixels of the region map."""
    rng = np.random.default_rng(tissue.texture_seed)
    region = tissue.morphology.region
    amounts = np.zeros((2, len(Region)), np.float32)
    for place, amount in _GROUND.items():
        amounts[:, place] = amount
    stains = amounts[:, region]
    fibres = _smear(rng.standard_normal(region.shape).astype(np.float32), tissue.morphology.fibre_rad, 14)
    coarse = _smear(
        ndimage.gaussian_filter(rng.standard_normal(region.shape), 2), tissue.morphology.fibre_rad, 18
    )
    weave = 0.55 * fibres / fibres.std() + 0.65 * coarse / coarse.std()
    stroma = region == Region.STROMA
    stains[1][stroma] *= np.clip(1 + 0.28 * weave[stroma], 0.25, 1.9)
    stains[:, stroma & (weave < -1.75)] *= 0.25  # clefts between bundles
    grain = ndimage.gaussian_filter(rng.standard_normal(region.shape), 0.8)
    dead = region == Region.NECROSIS
    stains[0][dead] += np.clip(grain[dead] - 0.25, 0, 1) * 1.6
    blood = region == Region.BLOOD
    stains[1][blood] *= np.clip(1 + 1.2 * grain[blood], 0.1, 1.6)
    fat = region == Region.FAT
    stains[:, fat] += np.outer([0.06, 0.34], _fat_walls(fat, rng))
    uneven = 1 + 0.06 * ndimage.zoom(rng.standard_normal((4, 4)), np.array(region.shape) / 4, order=3)[None]
    return ndimage.gaussian_filter(stains * uneven, (0, 0.6, 0.6)).astype(np.float32)


def _smear(noise: np.ndarray, direction_rad: np.ndarray, steps: int) -> np.ndarray:
    """Average noise (y, x) along the direction field, both ways (line integral convolution)."""
    total = noise.copy()
    for way in (-1, 1):
        row, column = np.indices(noise.shape, dtype=np.float32)
        for _ in range(steps):
            nearest = [
                np.clip(c, 0, side - 1).astype(np.int32)
                for c, side in zip((row, column), noise.shape, strict=True)
            ]
            angle = direction_rad[tuple(nearest)]
            row += way * np.sin(angle)
            column += way * np.cos(angle)
            total += ndimage.map_coordinates(noise, (row, column), order=1, mode="nearest")
    return total / (2 * steps + 1)


def _fat_walls(fat: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share of membrane (0..1) in each pixel of fat, where adipocytes of about 50 um touch."""
    where = np.argwhere(fat)
    if not len(where):
        return np.zeros(0)
    count = max(2, int(len(where) * MAP_UM**2 / 2200))
    centres = where[rng.choice(len(where), count, replace=False)] + 0.01 * rng.random((count, 2))
    near = cKDTree(centres).query(where, k=2)[0] * MAP_UM
    return np.exp(-(((near[:, 1] - near[:, 0]) / 4.5) ** 2))


def _in_pixels(tissue: Tissue, px_to_um: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Outlines and nuclei (n, corner, 2) in pixels (x, y), each with its first and last row (n, 2)."""
    um_to_px = np.linalg.inv(px_to_um)
    shapes = []
    for outline in (tissue.cells.outline_um, tissue.cells.nucleus_um):
        px = outline @ um_to_px[:2, :2].T + um_to_px[:2, 2]
        shapes.append((px, np.stack([px[..., 1].min(1), px[..., 1].max(1)], -1)))
    return shapes


def _stain_band(tissue, ground, shapes, px_to_um, span, columns, rng) -> list[np.ndarray]:
    """Amounts of H and E on the image rows `span` (first, last + 1): ground, cell bodies, then nuclei."""
    from skimage.draw import polygon

    rows = span[1] - span[0]
    y_px, x_px = np.mgrid[span[0] : span[1], 0:columns].astype(np.float32) + np.float32(0.5)
    x_um = px_to_um[0, 0] * x_px + px_to_um[0, 1] * y_px + px_to_um[0, 2]
    y_um = px_to_um[1, 0] * x_px + px_to_um[1, 1] * y_px + px_to_um[1, 2]
    at = (y_um / MAP_UM - 0.5, x_um / MAP_UM - 0.5)
    bare = _GROUND[Region.BACKGROUND]
    framed = (x_um >= 0) & (y_um >= 0) & (x_um < tissue.width_um) & (y_um < tissue.height_um)
    stains = [
        np.where(framed, ndimage.map_coordinates(ground[i], at, order=1, mode="nearest"), np.float32(bare[i]))
        for i in (0, 1)
    ]
    look = np.array([_LOOK[name] for name in CELL_TYPES])[tissue.cells.type_index]
    darker = np.random.default_rng(tissue.texture_seed + 1).lognormal(0, 0.18, len(tissue.cells))
    chromatin = (
        1
        + 0.22 * ndimage.gaussian_filter(rng.standard_normal((rows, columns)), 0.9).astype(np.float32) / 0.31
    )
    for (outline, extent), nucleus in zip(shapes, (False, True), strict=True):
        for i in np.flatnonzero((extent[:, 1] >= span[0]) & (extent[:, 0] < span[1])):
            corner = outline[i] - (0.5, span[0] + 0.5)  # polygon() has pixel centres at integers
            inside = polygon(corner[:, 1], corner[:, 0], (rows, columns))
            if not nucleus:
                stains[0][inside] = np.maximum(stains[0][inside] + look[i, 1], 0.01)
                stains[1][inside] = np.maximum(stains[1][inside] + look[i, 2], 0.03)
                continue
            amount = look[i, 0] * darker[i]
            stains[0][inside] = amount * chromatin[inside]
            stains[1][inside] = 0.8 * stains[1][inside] + 0.02
            if look[i, 3] > 0.15:
                middle = corner.mean(0) + 0.68 * (corner - corner.mean(0))
                stains[0][polygon(middle[:, 1], middle[:, 0], (rows, columns))] *= 1 - look[i, 3]
    return stains
