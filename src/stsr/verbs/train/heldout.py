"""Separate training, validation and excluded areas of a section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.methods.batch import Requirements
from stsr.store.section import Section
from stsr.verbs.train.config import TrainConfig

_REGION_KEYS = ("exclude", "validation")
_SNAP = 1e-6  # bins; a coordinate this close to the edge of a bin is on the edge
_LEFT_OVER = 0.75  # fraction of the training tiles that an automatic gap must leave
_COVERED = 0.99  # fraction of a tile that must lie in the image


@dataclass(frozen=True)
class Rectangle:
    """Bins ``[top, bottom)`` x ``[left, right)`` of a section's grid."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def of_um(cls, bounds_um: Sequence[float], grid: Grid) -> Rectangle:
        """All bins that the rectangle ``(x0, y0, x1, y1)``, um, touches.

        Raises
        ------
        UsageError
            If these are not bounds of a rectangle.
        """
        try:
            x0, y0, x1, y1 = (float(value) for value in bounds_um)
        except (TypeError, ValueError):
            raise UsageError(f"a region must be [x0, y0, x1, y1] in um, not {bounds_um!r}") from None
        if not (x1 > x0 and y1 > y0):
            raise UsageError(
                f"the region {list(bounds_um)} is empty; give [x0, y0, x1, y1] in um with x1 > x0, y1 > y0"
            )
        return cls(
            int(np.floor((y0 - grid.y0_um) / grid.bin_um + _SNAP)),
            int(np.floor((x0 - grid.x0_um) / grid.bin_um + _SNAP)),
            int(np.ceil((y1 - grid.y0_um) / grid.bin_um - _SNAP)),
            int(np.ceil((x1 - grid.x0_um) / grid.bin_um - _SNAP)),
        )

    def meets(self, starts: np.ndarray, side: int, gap: int = 0) -> np.ndarray:
        """Whether windows (n, 2) of ``side`` bins are closer to the rectangle than ``gap`` bins: (n,) bool."""
        row, column = starts.T
        rows = (row < self.bottom + gap) & (row + side > self.top - gap)
        return rows & (column < self.right + gap) & (column + side > self.left - gap)

    def holds(self, starts: np.ndarray, side: int) -> np.ndarray:
        """Whether windows (n, 2) of ``side`` bins lie inside the rectangle: (n,) bool."""
        row, column = starts.T
        rows = (row >= self.top) & (row + side <= self.bottom)
        return rows & (column >= self.left) & (column + side <= self.right)

    def paint(self, mask: np.ndarray) -> None:
        """Set the bins of the rectangle in ``mask`` (height, width) to True."""
        mask[max(self.top, 0) : max(self.bottom, 0), max(self.left, 0) : max(self.right, 0)] = True


def window_shares(mask: np.ndarray, starts: np.ndarray, side: int) -> np.ndarray:
    """Fraction of each window (n, 2) of ``side`` bins that is True in ``mask`` (height, width): (n,)."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    row, column = starts.T
    inside = (
        total[row + side, column + side]
        - total[row, column + side]
        - total[row + side, column]
        + total[row, column]
    )
    return inside / side**2


def far_from(starts: np.ndarray, side: int, apart: Sequence[Rectangle], gap: int) -> np.ndarray:
    """Whether windows (n, 2) of ``side`` bins are at least ``gap`` bins from all rectangles: (n,) bool."""
    far = np.ones(len(starts), bool)
    for rectangle in apart:
        far &= ~rectangle.meets(starts, side, gap)
    return far


def widest_gap(starts: np.ndarray, side: int, apart: Sequence[Rectangle], per_lr: int) -> int:
    """Choose a gap, bins: one tile, or on small sections the largest that leaves three quarters of the windows.

    A gap of one tile would take most of a section of 2 mm. The gap is at least 100 um, and no spot is larger.
    """
    without = far_from(starts, side, apart, 0).sum()
    for gap in range(side, per_lr, -per_lr):
        if far_from(starts, side, apart, gap).sum() >= _LEFT_OVER * without:
            return gap
    return per_lr


def choose_block(
    tissue: np.ndarray, starts: np.ndarray, side: int, part: float, excluded: Sequence[Rectangle], per_lr: int
) -> Rectangle | None:
    """Choose a block at a corner or an end of the section that contains the fraction ``part`` of its tissue.

    It is the one that leaves the most training windows at a gap of 100 um; the choice is not random.

    Parameters
    ----------
    tissue
        (height, width) bool.
    starts
        Windows (n, 2) that could be used for training.
    side
        Side of the windows, bins; a block is at least as large.
    part
        Fraction of the tissue, 0..1.
    excluded
        Excluded rectangles; a block must contain a window outside them.

    Returns
    -------
    Rectangle or None
        None if no block leaves a training window.
    """
    height, width = tissue.shape
    wanted = part * tissue.sum()
    best, most = None, 0
    for corner in range(8):
        for size in range(side, max(height, width) + 1, per_lr):
            block = _block(corner, size, height, width)
            if tissue[block.top : block.bottom, block.left : block.right].sum() >= wanted:
                break
        else:
            continue
        inside = block.holds(starts, side)
        if not (inside & far_from(starts, side, excluded, 0)).any():
            continue
        left = int(far_from(starts, side, [block, *excluded], per_lr).sum())
        if left > most:
            best, most = block, left
    return best


@dataclass(frozen=True)
class Plan:
    """Positions of a section's tiles."""

    section: Section
    grid: Grid
    tissue: np.ndarray
    """(height, width) bool."""
    excluded: list[Rectangle]
    """Rectangles that are not used at all."""
    blocks: list[Rectangle]
    """Rectangles that are only used for validation."""
    starts: np.ndarray
    """First bins (n, 2) of the training tiles."""
    held_out: np.ndarray
    """First bins (n, 2) of the validation tiles, whole low-resolution pixels apart."""
    gap_lr: int
    """Gap between training tiles and the other areas, low-resolution pixels."""

    @cached_property
    def usable(self) -> np.ndarray:
        """Measured bins that are not excluded: (height, width) bool."""
        return _measured(self.section, self.grid) & ~_painted(self.excluded, self.grid)

    @cached_property
    def trainable(self) -> np.ndarray:
        """Measured bins that are neither excluded nor used for validation: (height, width) bool."""
        return self.usable & ~_painted(self.blocks, self.grid)

    def training_area(self, side: int) -> np.ndarray:
        """Tissue covered by training tiles of ``side`` bins: (height, width) bool."""
        edges = np.zeros((self.grid.height + 1, self.grid.width + 1), np.int32)
        row, column = self.starts.T
        for down, right, sign in ((0, 0, 1), (side, 0, -1), (0, side, -1), (side, side, 1)):
            np.add.at(edges, (row + down, column + right), sign)
        tiles = edges.cumsum(0).cumsum(1)[:-1, :-1]  # number of tiles over each bin
        return (tiles > 0) & self.tissue


def plan_section(
    section: Section,
    requirements: Requirements,
    config: TrainConfig,
    *,
    val: float,
    regions: dict,
) -> Plan:
    """Place the tiles of a section, reading only its masks. Parameters are those of `TrainingTiles`."""
    assert section.image is not None, "check_section comes first"
    grid = section.grid(requirements.bin_um)
    per_lr = requirements.per_lr
    side = config.train_tile_lr * per_lr
    mask = _tissue_of(section, grid)
    covered = section.image.covered(grid)
    excluded = [Rectangle.of_um(bounds, grid) for bounds in regions.get("exclude", ())]

    def usable(starts: np.ndarray) -> np.ndarray:
        if not len(starts):
            return starts
        enough = window_shares(mask, starts, side) >= config.tissue
        return starts[enough & (window_shares(covered, starts, side) >= _COVERED)]

    first = usable(window_starts(grid, (0, 0), config.train_tile_lr, per_lr))
    shifted = [
        window_starts(grid, shift, config.train_tile_lr, per_lr)
        for shift in shifts_of(grid, config.phases, per_lr)
    ]
    starts = usable(np.concatenate(shifted))
    if "validation" in regions:
        blocks = [Rectangle.of_um(bounds, grid) for bounds in regions["validation"]]
    elif val and len(first):
        block = choose_block(mask, first, side, val, excluded, per_lr)
        blocks = [] if block is None else [block]
    else:
        blocks = []
    inside = np.zeros(len(first), bool)
    for block in blocks:
        inside |= block.holds(first, side)
    held_out = first[inside & far_from(first, side, excluded, 0)]
    apart = excluded + blocks
    gap = config.gap_lr * per_lr or widest_gap(first, side, apart, per_lr)
    starts = starts[far_from(starts, side, apart, gap)]
    return Plan(section, grid, mask, excluded, blocks, starts, held_out, gap // per_lr)


def _tissue_of(section: Section, grid: Grid) -> np.ndarray:
    """Tissue mask of the section, or everything that was measured if it has none: (height, width) bool."""
    measured = _measured(section, grid)
    return measured if section.tissue is None else measured & section.tissue.read(grid)


def _painted(rectangles: Sequence[Rectangle], grid: Grid) -> np.ndarray:
    """Bins inside any of the rectangles: (height, width) bool."""
    mask = np.zeros(grid.shape, bool)
    for each in rectangles:
        each.paint(mask)
    return mask


def _measured(section: Section, grid: Grid) -> np.ndarray:
    """Bins of the grid with counts: (height, width) bool."""
    assert section.hr is not None, "check_section comes first"
    return _painted([Rectangle.of_um(section.hr.grid.bounds_um, grid)], grid)


def _block(corner: int, size: int, height: int, width: int) -> Rectangle:
    """Blocks 0 to 3 are squares at the corners, 4 to 7 bands at the ends."""
    tall = height if corner >= 6 else min(size, height)
    wide = width if corner in (4, 5) else min(size, width)
    top = 0 if corner in (0, 1, 4) else height - tall
    left = 0 if corner in (0, 2, 6) else width - wide
    return Rectangle(top, left, top + tall, left + wide)


def shifts_of(grid: Grid, per_axis: int, per_lr: int) -> list[tuple[int, int]]:
    """First bins (row, column) of rasters of low-resolution pixels: ``per_axis`` shifts in y and in x."""
    starts = sorted({number * per_lr // per_axis for number in range(per_axis)})
    rows, columns = ([start for start in starts if size - start >= per_lr] for size in grid.shape)
    return [(row, column) for row in rows for column in columns]


def window_starts(grid: Grid, shift: tuple[int, int], side_lr: int, per_lr: int) -> np.ndarray:
    """First bins (n, 2) of all windows of ``side_lr`` low-resolution pixels on a raster that starts at ``shift``."""
    height, width = ((size - start) // per_lr for size, start in zip(grid.shape, shift, strict=True))
    rows, columns = np.arange(height - side_lr + 1), np.arange(width - side_lr + 1)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2) * per_lr + np.array(shift)


def check_plans(plans: Sequence[Plan], tile_um: float, validation: bool) -> None:
    """Check that training tiles are left, and validation tiles if they are wanted."""
    if not any(len(plan.starts) for plan in plans):
        raise StsrError(
            f"no tile of {tile_um:g} um with tissue is left for training; "
            "give larger sections, a smaller train_tile_lr or --val 0"
        )
    if validation and not any(len(plan.held_out) for plan in plans):
        raise StsrError(
            "no section is large enough for a validation area; give larger sections, or --val 0 for none"
        )


def checked_regions(regions: dict | None, sections: Sequence[Section]) -> dict[str, dict]:
    """Check regions and index them by section name."""
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise UsageError("two of the sections have the same name; rename one of the stores")
    named = {Path(str(key)).name.removesuffix(".zarr"): own for key, own in (regions or {}).items()}
    for name, own in named.items():
        if name not in names:
            raise UsageError(
                f"there are regions for {name!r}, which is not one of the sections: {', '.join(names)}"
            )
        wrong = set(own) - set(_REGION_KEYS) if isinstance(own, dict) else {str(own)}
        if wrong:
            raise UsageError(f"regions must be {' or '.join(_REGION_KEYS)}, not {wrong.pop()!r}")
    return named
