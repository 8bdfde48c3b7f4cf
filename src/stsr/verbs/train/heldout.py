"""Which part of a section may be learned from: rectangles kept apart, and windows that do not come near them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stsr.errors import UsageError
from stsr.geometry.grid import Grid
from stsr.methods.batch import Requirements

_SNAP = 1e-6  # bins; closer than this to a bin's edge is on the edge
_LEFT_OVER = 0.75  # part of the training tiles that an automatic gap must leave
_COVERED = 0.99  # of a tile must lie in the image


@dataclass(frozen=True)
class Rectangle:
    """Bins ``[top, bottom)`` x ``[left, right)`` of a section's grid."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def of_um(cls, bounds_um: Sequence[float], grid: Grid) -> Rectangle:
        """All bins that ``(x0, y0, x1, y1)``, um, touches.

        Raises
        ------
        UsageError
            If these are not the bounds of an area.
        """
        try:
            x0, y0, x1, y1 = (float(value) for value in bounds_um)
        except (TypeError, ValueError):
            raise UsageError(f"a region is [x0, y0, x1, y1] in um, not {bounds_um!r}") from None
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
        """Whether windows (n, 2) of ``side`` bins come nearer to it than ``gap`` bins: (n,) bool."""
        row, column = starts.T
        rows = (row < self.bottom + gap) & (row + side > self.top - gap)
        return rows & (column < self.right + gap) & (column + side > self.left - gap)

    def holds(self, starts: np.ndarray, side: int) -> np.ndarray:
        """Whether windows (n, 2) of ``side`` bins lie in it whole: (n,) bool."""
        row, column = starts.T
        rows = (row >= self.top) & (row + side <= self.bottom)
        return rows & (column >= self.left) & (column + side <= self.right)

    def paint(self, mask: np.ndarray) -> None:
        """Set its bins of ``mask`` (height, width) to True."""
        mask[max(self.top, 0) : max(self.bottom, 0), max(self.left, 0) : max(self.right, 0)] = True


def window_shares(mask: np.ndarray, starts: np.ndarray, side: int) -> np.ndarray:
    """Part of each window (n, 2) of ``side`` bins that is True in ``mask`` (height, width): (n,)."""
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
    """Whether windows (n, 2) of ``side`` bins keep ``gap`` bins from all rectangles: (n,) bool."""
    far = np.ones(len(starts), bool)
    for rectangle in apart:
        far &= ~rectangle.meets(starts, side, gap)
    return far


def widest_gap(starts: np.ndarray, side: int, apart: Sequence[Rectangle], per_lr: int) -> int:
    """A gap, bins: a whole tile, or on small sections as much as leaves three quarters of the windows.

    A gap of a tile around a corner takes most of a section of 2 mm. It is never less than 100 um, and no spot reaches
    further.
    """
    without = far_from(starts, side, apart, 0).sum()
    for gap in range(side, per_lr, -per_lr):
        if far_from(starts, side, apart, gap).sum() >= _LEFT_OVER * without:
            return gap
    return per_lr


def choose_block(
    tissue: np.ndarray, starts: np.ndarray, side: int, part: float, excluded: Sequence[Rectangle], per_lr: int
) -> Rectangle | None:
    """A block at a corner or an end of the section that holds ``part`` of its tissue.

    Of all corners and ends the one that leaves most training windows at a gap of 100 um, so the choice needs no
    random numbers.

    Parameters
    ----------
    tissue
        (height, width) bool; whole low-resolution pixels.
    starts
        Windows (n, 2) that could be learned from.
    side
        Of the windows, bins; a block is at least as large.
    part
        Of the tissue, 0..1.
    excluded
        Rectangles that the block must not meet.

    Returns
    -------
    Rectangle or None
        None if no block leaves anything to learn from.
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
    """Where a section's tiles lie.

    Attributes
    ----------
    section
        The `Section`.
    grid
        Its bins.
    tissue
        (height, width) bool.
    excluded
        What must never be seen.
    shifts
        First bins (row, column) of the low-resolution rasters.
    starts
        First bins (n, 2) of the training tiles on each raster.
    held_out
        First bins (n, 2) of the validation tiles, on the unshifted raster.
    gap_lr
        Between the two, low-resolution pixels.
    """

    section: Any
    grid: Grid
    tissue: np.ndarray
    excluded: list[Rectangle]
    shifts: list[tuple[int, int]]
    starts: list[np.ndarray]
    held_out: np.ndarray
    gap_lr: int

    def seen(self, margin: int) -> np.ndarray:
        """(height, width) bool: all bins but the excluded ones and ``margin`` bins around them."""
        hidden = np.zeros(self.grid.shape, bool)
        for each in self.excluded:
            wide = Rectangle(each.top - margin, each.left - margin, each.bottom + margin, each.right + margin)
            wide.paint(hidden)
        return ~hidden

    def training_area(self, side: int) -> np.ndarray:
        """Tissue (height, width) that training tiles of ``side`` bins show on the unshifted raster."""
        area = np.zeros(self.grid.shape, bool)
        for row, column in self.starts[0].tolist():
            area[row : row + side, column : column + side] = True
        return area & self.tissue


def plan_section(
    section,
    requirements: Requirements,
    regions: dict,
    tile_lr: int,
    val: float,
    gap_lr: int,
    least_tissue: float,
    phases: int,
) -> Plan:
    """Where a section's tiles lie; nothing but masks is read. Parameters are those of `TrainingTiles`."""
    grid = section.grid(requirements.bin_um)
    per_lr = requirements.per_lr
    side = tile_lr * per_lr
    tissue = _tissue_of(section, grid)
    covered = section.image.covered(grid)
    excluded = [Rectangle.of_um(bounds, grid) for bounds in regions.get("exclude", ())]

    def usable(starts: np.ndarray) -> np.ndarray:
        if not len(starts):
            return starts
        enough = window_shares(tissue, starts, side) >= least_tissue
        return starts[enough & (window_shares(covered, starts, side) >= _COVERED)]

    shifts = shifts_of(grid, phases, requirements)
    windows = [usable(window_starts(grid, shift, tile_lr, per_lr)) for shift in shifts]
    first = windows[0]
    if "validation" in regions:
        blocks = [Rectangle.of_um(bounds, grid) for bounds in regions["validation"]]
    elif val and len(first):
        block = choose_block(tissue, first, side, val, excluded, per_lr)
        blocks = [] if block is None else [block]
    else:
        blocks = []
    inside = np.zeros(len(first), bool)
    for block in blocks:
        inside |= block.holds(first, side)
    held_out = first[inside & far_from(first, side, excluded, 0)]
    apart = excluded + blocks
    gap = gap_lr * per_lr or widest_gap(first, side, apart, per_lr)
    starts = [window[far_from(window, side, apart, gap)] for window in windows]
    return Plan(section, grid, tissue, excluded, shifts, starts, held_out, gap // per_lr)


def _tissue_of(section, grid: Grid) -> np.ndarray:
    """Where tissue is (height, width): the section's mask, else everything that was measured."""
    measured = np.zeros(grid.shape, bool)
    Rectangle.of_um(section.hr.grid.bounds_um, grid).paint(measured)
    return measured if section.tissue is None else measured & section.tissue.read(grid)


def _block(corner: int, size: int, height: int, width: int) -> Rectangle:
    """0-3: squares in the corners; 4-7: bands at the ends."""
    tall, wide = min(size, height), min(size, width)
    if corner < 4:
        top = 0 if corner < 2 else height - tall
        left = 0 if corner % 2 == 0 else width - wide
        return Rectangle(top, left, top + tall, left + wide)
    if corner < 6:
        top = 0 if corner == 4 else height - tall
        return Rectangle(top, 0, top + tall, width)
    left = 0 if corner == 6 else width - wide
    return Rectangle(0, left, height, left + wide)


def shifts_of(grid: Grid, per_axis: int, requirements: Requirements) -> list[tuple[int, int]]:
    """Where low-resolution rasters start, bins: ``per_axis`` shifts in y and in x, on whole image pixels."""
    step = max(1, round(requirements.image_um / requirements.bin_um))
    starts = sorted({number * requirements.per_lr // per_axis // step * step for number in range(per_axis)})

    def fits(start: int, size: int) -> bool:
        return size - start >= requirements.per_lr

    return [
        (row, column)
        for row in starts
        for column in starts
        if fits(row, grid.height) and fits(column, grid.width)
    ]


def window_starts(grid: Grid, shift: tuple[int, int], side_lr: int, per_lr: int) -> np.ndarray:
    """First bins (n, 2) of all windows of ``side_lr`` low-resolution pixels of a raster that starts at ``shift``."""
    height, width = ((size - start) // per_lr for size, start in zip(grid.shape, shift, strict=True))
    rows, columns = np.arange(height - side_lr + 1), np.arange(width - side_lr + 1)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2) * per_lr + np.array(shift)
