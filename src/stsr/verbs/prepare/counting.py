"""Count a stream of transcripts per bin, find the tissue, and simulate spots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, bins_per_lr, raster_um
from stsr.histology import tissue
from stsr.platforms.source import Spots, Transcripts
from stsr.progress import Progress, silent
from stsr.verbs.prepare.binning import Counter, Layer
from stsr.verbs.prepare.lattices import Discs, gather, in_tissue, spots_of

_TOUCH_UM = 1e-3  # added to the bounds so that the last transcript lies inside


@dataclass(frozen=True)
class Counted:
    """The result of one pass over the counts."""

    grid: Grid
    counter: Counter | Layer
    """Counts of genes per bin."""
    density: np.ndarray
    """Counts of all genes per bin (height, width), and of those that were not kept, if they are known."""
    mask: np.ndarray
    """Tissue mask (height, width) bool."""
    spots: Spots | None
    """Simulated spots in tissue with raw counts, or None."""
    kept: int
    """Number of transcripts that were counted."""
    low_quality: int
    """Number of transcripts dropped for low quality."""
    other: int
    """Number of transcripts dropped as controls or unwanted genes."""
    unseen: Layer | None = None
    """Counts that the simulated spots did not take; None if they took all."""


def grid_over(bounds_um: tuple[float, float, float, float], bin_um: float) -> Grid:
    """The smallest grid over the bounds (x0, y0, x1, y1), um, whose corner is a multiple of the bin size."""
    x0, y0, x1, y1 = bounds_um
    corner = float(np.floor(x0 / bin_um) * bin_um), float(np.floor(y0 / bin_um) * bin_um)
    return Grid.covering((*corner, x1 + _TOUCH_UM, y1 + _TOUCH_UM), bin_um)


def count(
    transcripts: Transcripts,
    genes: list[str],
    bin_um: float,
    spots: str | None = "square",
    progress: Progress = silent,
) -> Counted:
    """Count transcripts per bin and per simulated spot, in one pass and bounded memory.

    Parameters
    ----------
    transcripts
        The stream.
    genes
        The panel, which the stream's gene indices refer to.
    bin_um
        Bin size, um; must divide 100 um.
    spots
        ``"square"`` (100 um side by side), ``"visium"`` (55 um discs, hexagonal, 100 um apart) or None.
    progress
        Called with (done, total, label).

    Raises
    ------
    UsageError
        If the section has too many bins.
    StsrError
        If no transcript passes the filters or no tissue is found.
    """
    grid = _grid(transcripts, bin_um)
    try:
        counter = Counter(len(genes), grid.height * grid.width)
    except ValueError:
        raise UsageError(
            f"bins of {bin_um:g} um are too many for this section; choose larger ones with --bin-um"
        ) from None
    discs = Discs(grid, len(genes)) if spots == "visium" else None
    low, other = _count_all(transcripts, grid, counter, discs, progress)
    kept = int(counter.per_gene.sum())
    if not kept:
        raise StsrError(
            f"none of {low + other} transcripts passes the filters; lower --min-qv or choose other genes"
        )
    density = counter.per_place.reshape(grid.shape)
    mask = tissue.from_density(density, grid, transcripts.apart_um)
    if not mask.any():
        raise StsrError(
            f"no tissue found: {kept} transcripts are too sparse over {grid.width * bin_um:g} x "
            f"{grid.height * bin_um:g} um; check that the file of transcripts is complete"
        )
    simulated = None
    if spots is not None:
        simulated = (
            discs.spots(discs.in_tissue(grid, mask), genes) if discs else _squares(grid, counter, mask, genes)
        )
    return Counted(grid, counter, density, mask, simulated, kept, low, other)


def _count_all(
    transcripts: Transcripts, grid: Grid, counter: Counter, discs: Discs | None, progress: Progress
) -> tuple[int, int]:
    """Count every transcript; return the numbers of those dropped for quality and for other reasons."""
    read = low = other = 0
    for chunk in transcripts.chunks():
        rows, columns, inside = grid.rows_columns(chunk.x_um, chunk.y_um)
        bins = rows * grid.width + columns
        if not inside.all():
            raise StsrError(
                "transcripts lie outside the bounds in the file's statistics, which are wrong; write the file again"
            )
        counter.add(chunk.gene, bins)
        if discs is not None:
            discs.add(chunk)
        low, other = low + chunk.low_quality, other + chunk.other
        read += len(bins) + chunk.low_quality + chunk.other
        if transcripts.rows:
            progress(read, transcripts.rows, "counting transcripts")
    return low, other


def _grid(transcripts: Transcripts, bin_um: float) -> Grid:
    if transcripts.bin_um is None or transcripts.corner_um is None:
        return grid_over(transcripts.bounds_um, bin_um)
    if bin_um % transcripts.bin_um > 1e-6:
        raise StsrError(
            f"the section holds counts in bins of {transcripts.bin_um:g} um, which do not add up to {bin_um:g} um; "
            f"choose a multiple with --bin-um"
        )
    (x0, y0), (_, _, x1, y1) = transcripts.corner_um, transcripts.bounds_um
    return Grid.covering((x0, y0, x1, y1), bin_um)


def _squares(grid: Grid, counter: Counter, mask: np.ndarray, genes: list[str]) -> Spots:
    """Square spots of 100 um: sums of bins."""
    coarse, per_lr = grid.at(raster_um(grid.bin_um)), bins_per_lr(grid.bin_um)
    rows, columns = np.indices(grid.shape, dtype=np.int32)
    square = ((rows // per_lr) * coarse.width + columns // per_lr).ravel()
    number_of = coarse.height * coarse.width
    keep = in_tissue(square, mask, number_of)
    blocks = (counter.grouped(number, square, number_of) for number in range(counter.blocks))
    centres_um = np.stack(np.meshgrid(*coarse.centres_um()), axis=-1).reshape(-1, 2)
    return spots_of(
        centres_um[keep], "square", coarse.bin_um, gather(block[:, keep] for block in blocks), genes
    )
