"""Refine a vendor's alignment of the H&E, which is accurate to 10-40 um, by the positions of transcripts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from stsr.geometry.grid import Grid
from stsr.histology.image import Image

_BLOCK_UM = 450.0  # side of the blocks whose shifts are measured: a few hundred nuclei
_REACH_UM = 70.0  # largest shift searched; beyond it the alignment is wrong, not coarse
_DETAIL_UM = 60.0  # larger structure does not resolve shifts of 10 um
_SMOOTH_UM = 8.0  # transcripts lie around nuclei, not on them
_LEAST_BLOCKS = 8  # an affine has six numbers
_LEAST_CORRELATION = 0.15  # of a block at its best shift; blocks below it are ignored
_ROUNDS = 3
_OUTLIER_UM = 7.0
_GAIN = 0.01  # in correlation; with less the vendor's alignment is kept


@dataclass(frozen=True)
class Refinement:
    """The result of the refinement."""

    px_to_um: np.ndarray
    """The alignment to use (3, 3): the refined one, or the given one if that is no worse."""
    applied: bool
    """Whether the alignment was changed."""
    shift_um: float
    """Root mean square displacement of the section."""
    correlation_before: float
    """Correlation of fine structure in staining and counts with the given alignment."""
    correlation_after: float
    """The same with the refined alignment."""
    blocks: int
    """Number of blocks that the refined alignment was fitted to."""


def refine(image: Image, density: np.ndarray, grid: Grid) -> Refinement:
    """Correct an alignment by a small affine, so that dark nuclei and transcripts coincide.

    Local shifts are the peaks of the cross-correlation of blocks. An affine is fitted to them robustly, and both steps
    are repeated. Only the density of all counts is used, not the expression of single genes.

    Parameters
    ----------
    image
        The H&E under the given alignment.
    density
        Counts of all genes per bin (height, width).
    grid
        The bins, 20 um or finer.
    """
    target, tissue = _target(density, grid)
    stain = _stain(image.read(grid), grid)
    before = correlation = _agreement(stain, target, tissue)
    given = current = best = image.px_to_um
    used = 0
    for _ in range(_ROUNDS):
        shifts = _block_shifts(stain, target, tissue, grid)
        if len(shifts) < _LEAST_BLOCKS:
            break
        current = _affine_of(shifts) @ current
        stain = _stain(image.moved(current).read(grid), grid)
        now = _agreement(stain, target, tissue)
        if now > correlation:
            best, correlation, used = current, now, len(shifts)
    if correlation < before + _GAIN:
        return Refinement(given, False, 0.0, before, before, used)
    return Refinement(best, True, _distance(given, best, grid), before, correlation, used)


def agreement(image: Image, density: np.ndarray, grid: Grid) -> float:
    """Correlation of fine structure in staining and counts; arguments as for `refine`.

    About 0.2 where an alignment is right, even if tissue fills the slide, and below 0.04 where it is not.
    """
    target, tissue = _target(density, grid)
    return _agreement(_stain(image.read(grid), grid), target, tissue)


def _target(density: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Fine structure of the counts, and the tissue; (height, width) each."""
    counts = density.astype(np.float64)
    tissue = ndimage.gaussian_filter(counts, _DETAIL_UM / grid.bin_um) > 0.05 * counts.mean()
    return _detail(ndimage.gaussian_filter(np.sqrt(counts), _SMOOTH_UM / grid.bin_um), grid), tissue


def _stain(rgb: np.ndarray, grid: Grid) -> np.ndarray:
    """Fine structure (height, width) of the optical density in red, where mainly haematoxylin absorbs."""
    return _detail(-np.log(np.clip(rgb[0].astype(np.float64), 5, 255) / 255), grid)


def _detail(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Values without their structure above `_DETAIL_UM`."""
    return values - ndimage.gaussian_filter(values, _DETAIL_UM / grid.bin_um)


def _agreement(stain: np.ndarray, target: np.ndarray, tissue: np.ndarray) -> float:
    return float(np.corrcoef(stain[tissue], target[tissue])[0, 1])


def _block_shifts(stain: np.ndarray, target: np.ndarray, tissue: np.ndarray, grid: Grid) -> np.ndarray:
    """Blocks (n, 5): x, y, the shift in x and y that moves the stain onto the counts, all um, and its correlation."""
    side, reach = round(_BLOCK_UM / grid.bin_um), round(_REACH_UM / grid.bin_um)
    found = []
    for row in range(0, grid.height - side + 1, max(1, side // 2)):
        for column in range(0, grid.width - side + 1, max(1, side // 2)):
            window = slice(row, row + side), slice(column, column + side)
            if tissue[window].mean() < 0.7:
                continue
            peak = _peak(stain[window], target[window], reach)
            if peak is None or peak[2] < _LEAST_CORRELATION:
                continue
            x = grid.x0_um + (column + side / 2) * grid.bin_um
            y = grid.y0_um + (row + side / 2) * grid.bin_um
            found.append((x, y, peak[0] * grid.bin_um, peak[1] * grid.bin_um, peak[2]))
    return np.array(found).reshape(-1, 5)


def _peak(stain: np.ndarray, target: np.ndarray, reach: int) -> tuple[float, float, float] | None:
    """Shift (x, y) in bins, to sub-bin precision, at which two blocks correlate best, and that correlation."""
    ramp = np.hanning(len(stain) + 2)[1:-1]
    weight = ramp[:, None] * ramp[None, :]
    a, b = ((block - np.average(block, weights=weight)) * weight for block in (stain, target))
    size = 2 * len(stain)
    cross = fft.irfft2(np.conj(fft.rfft2(a, (size, size))) * fft.rfft2(b, (size, size)), (size, size))
    cross = np.roll(cross, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    cross /= np.linalg.norm(a) * np.linalg.norm(b) + 1e-12
    row, column = np.unravel_index(cross.argmax(), cross.shape)
    if not (0 < row < 2 * reach and 0 < column < 2 * reach):
        return None  # the maximum lies on the border and is not a peak
    dy = row - reach + _vertex(*cross[row - 1 : row + 2, column])
    dx = column - reach + _vertex(*cross[row, column - 1 : column + 2])
    return float(dx), float(dy), float(cross[row, column])


def _vertex(left: float, middle: float, right: float) -> float:
    """Position of the maximum of the parabola through three neighbours, relative to the middle one."""
    return 0.5 * (left - right) / (left - 2 * middle + right - 1e-12)


def _affine_of(shifts: np.ndarray) -> np.ndarray:
    """Affine um -> um (3, 3) fitted to shifts by iteratively reweighted least squares (Cauchy weights)."""
    x, y, dx, dy, correlation = shifts.T
    centre = np.array([x.mean(), y.mean()])
    terms = np.stack([x - centre[0], y - centre[1], np.ones_like(x)], 1)  # (n, 3)
    weight = start = correlation**2
    for _ in range(20):
        root = np.sqrt(weight)[:, None]
        fitted = np.linalg.lstsq(terms * root, np.stack([dx, dy], 1) * root, rcond=None)[0]  # (3, 2)
        residual = np.linalg.norm(terms @ fitted - np.stack([dx, dy], 1), axis=1)
        weight = start / (1 + (residual / _OUTLIER_UM) ** 2)
    move = np.eye(3)
    move[:2, :2] += fitted[:2].T
    move[:2, 2] = fitted[2] - fitted[:2].T @ centre
    return move


def _distance(old: np.ndarray, new: np.ndarray, grid: Grid) -> float:
    """Root mean square distance, um, between positions in the section under two alignments."""
    x, y = grid.at(grid.bin_um).centres_um()
    points = np.stack(
        [*(axis.ravel() for axis in np.meshgrid(x[::10], y[::10])), np.ones(len(x[::10]) * len(y[::10]))]
    )
    moved = new @ np.linalg.inv(old) @ points
    return float(np.sqrt(((moved - points)[:2] ** 2).sum(0).mean()))
