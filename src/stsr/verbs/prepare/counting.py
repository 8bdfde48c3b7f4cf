"""Count a stream of transcripts per bin, find the tissue, and simulate spots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM, Grid, bins_per_lr
from stsr.geometry.lattice import VISIUM_SPOT_UM, hexagonal_lattice
from stsr.geometry.measurement import IN_TISSUE, nearest_spot
from stsr.histology import tissue
from stsr.platforms.source import Chunk, Spots, Transcripts
from stsr.progress import Progress, silent
from stsr.verbs.prepare.binning import Counter

_LOCATE_UM = 10.0  # so fine that transcripts of a bin can only lie in the disc nearest to the bin
_TOUCH_UM = 1e-3  # added to the bounds so that the last transcript lies inside


@dataclass(frozen=True)
class Counted:
    """The result of one pass over the transcripts."""

    grid: Grid
    counter: Counter
    """Counts of genes per bin."""
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
    discs = _Discs(grid, len(genes)) if spots == "visium" else None
    low, other = _count_all(transcripts, grid, counter, discs, progress)
    kept = int(counter.per_gene.sum())
    if not kept:
        raise StsrError(
            f"none of {low + other} transcripts passes the filters; lower --min-qv or choose other genes"
        )
    mask = tissue.from_density(counter.per_place.reshape(grid.shape), grid, transcripts.apart_um)
    if not mask.any():
        raise StsrError(
            f"no tissue found: {kept} transcripts are too sparse over {grid.width * bin_um:g} x "
            f"{grid.height * bin_um:g} um; check that the file of transcripts is complete"
        )
    simulated = None
    if spots is not None:
        simulated = discs.spots(grid, mask, genes) if discs else _squares(grid, counter, mask, genes)
    return Counted(grid, counter, mask, simulated, kept, low, other)


def _count_all(
    transcripts: Transcripts, grid: Grid, counter: Counter, discs: _Discs | None, progress: Progress
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


class _Discs:
    """Visium spots over a grid, and the counts of transcripts in each."""

    def __init__(self, grid: Grid, genes: int):
        self.centres_um = hexagonal_lattice(grid.bounds_um)
        if not len(self.centres_um):
            raise StsrError("the section is smaller than a Visium spot; use --spots square")
        self.grid = grid.at(_LOCATE_UM)
        self.nearest = nearest_spot(self.grid, self.centres_um).ravel().astype(np.int32)
        self.counter = Counter(genes, len(self.centres_um))

    def add(self, chunk: Chunk) -> None:
        """Count the transcripts of a chunk."""
        spot = self._spot_at(chunk.x_um, chunk.y_um)
        self.counter.add(chunk.gene[spot >= 0], spot[spot >= 0])

    def spots(self, grid: Grid, mask: np.ndarray, genes: list[str]) -> Spots:
        """The spots in tissue with their counts."""
        x, y = grid.centres_um()
        spot = self._spot_at(*(axis.ravel() for axis in np.meshgrid(x, y)))
        keep = _in_tissue(spot, mask, len(self.centres_um))
        counts = _gather(self.counter.block(number)[:, keep] for number in range(self.counter.blocks))
        return _spots(self.centres_um[keep], "disc", VISIUM_SPOT_UM, counts, genes)

    def _spot_at(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Index (n,) of the spot that each point lies in, -1 for none."""
        rows, columns, _ = self.grid.rows_columns(x_um, y_um)
        spot = self.nearest[rows * self.grid.width + columns]
        centres = self.centres_um[spot]  # (n, 2); of the last spot where there is none
        inside = (x_um - centres[:, 0]) ** 2 + (y_um - centres[:, 1]) ** 2 <= (VISIUM_SPOT_UM / 2) ** 2
        return np.where(inside, spot, -1)


def _squares(grid: Grid, counter: Counter, mask: np.ndarray, genes: list[str]) -> Spots:
    """Square spots of 100 um: sums of bins."""
    coarse, per_lr = grid.at(LR_UM), bins_per_lr(grid.bin_um)
    rows, columns = np.indices(grid.shape, dtype=np.int32)
    square = ((rows // per_lr) * coarse.width + columns // per_lr).ravel()
    number_of = coarse.height * coarse.width
    keep = _in_tissue(square, mask, number_of)
    blocks = (counter.grouped(number, square, number_of) for number in range(counter.blocks))
    centres_um = np.stack(np.meshgrid(*coarse.centres_um()), axis=-1).reshape(-1, 2)
    return _spots(centres_um[keep], "square", LR_UM, _gather(block[:, keep] for block in blocks), genes)


def _in_tissue(spot: np.ndarray, mask: np.ndarray, spots: int) -> np.ndarray:
    """Indices of the spots with enough tissue, from the spot of each bin (bins,), -1 for none."""
    seen = spot >= 0
    area = np.bincount(spot[seen], minlength=spots)
    covered = np.bincount(spot[seen & mask.ravel()], minlength=spots)
    keep = np.flatnonzero((covered >= IN_TISSUE * area) & (covered > 0))
    if not len(keep):
        raise StsrError("no simulated spot lies in tissue; the section is too small, use --spots square")
    return keep


def _gather(blocks: Iterable[np.ndarray]) -> sp.csr_matrix:
    """Counts (spots, genes) from blocks (genes in block, spots)."""
    return sp.hstack([sp.csc_matrix(block.T) for block in blocks], format="csr", dtype=np.int32)


def _spots(
    centres_um: np.ndarray, shape: str, size_um: float, counts: sp.csr_matrix, genes: list[str]
) -> Spots:
    import anndata
    import pandas as pd

    names = [f"spot_{number}" for number in range(len(centres_um))]
    table = anndata.AnnData(counts, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))
    return Spots(centres_um, shape, size_um, table, "simulated")
