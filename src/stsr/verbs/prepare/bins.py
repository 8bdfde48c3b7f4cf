"""Count a stream of bins (Visium HD) per bin of the section and per spot, and what spots did not take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, raster_um
from stsr.histology import tissue
from stsr.platforms.source import BinChunk, Bins, Chunk, Spots
from stsr.progress import Progress, silent
from stsr.verbs.prepare.binning import Counter, Layer, Split
from stsr.verbs.prepare.counting import Counted
from stsr.verbs.prepare.lattices import Discs, Lattice, Squares

MEASURED_BINS = "bins"
"""Kind of spots that are the instrument's own bins."""
SPOT_BIN_UM = 16.0
"""Size of these."""
DEPTH = 0.5
"""Share of the counts that simulated spots take."""

_IN_TISSUE = 0.5  # least part of a bin's area in tissue


@dataclass(frozen=True)
class _Counts:
    """A part of the counts of a chunk: the bin and gene of each single count (n,)."""

    row: np.ndarray
    column: np.ndarray
    gene: np.ndarray

    @classmethod
    def of(cls, chunk: BinChunk, times: np.ndarray) -> _Counts:
        """``times`` (entries,) of the counts of each entry."""
        return cls(*(np.repeat(values, times) for values in (chunk.row, chunk.column, chunk.gene)))

    def positions_um(self, bin_um: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Random positions x and y (n,) in the bins, um."""
        within = rng.random((2, len(self.row)))
        return (self.column + within[0]) * bin_um, (self.row + within[1]) * bin_um


def _places(row: np.ndarray, column: np.ndarray, bin_um: float, grid: Grid) -> np.ndarray:
    """Index (n,) of the grid's bins in which the instrument's bins nest."""
    rows, columns, _ = grid.rows_columns((column + 0.5) * bin_um, (row + 0.5) * bin_um)
    return rows * grid.width + columns


def count_bins(
    bins: Bins, genes: list[str], bin_um: float, spots: str, seed: int = 0, progress: Progress = silent
) -> Counted:
    """Count binned counts in one pass and bounded memory.

    Simulated spots take a binomial half of each count, drawn in the instrument's own bins, so that the other half is
    independent of them. A count in a bin that a spot covers in part lies at a random position in its bin.

    Parameters
    ----------
    bins
        The stream.
    genes
        The panel, which the stream's gene indices refer to.
    bin_um
        Bin size, um. Where the instrument's bins do not nest in it, counts are divided by area.
    spots
        ``"visium"``, ``"square"``: simulated; ``"bins"``: the counts themselves in bins of 16 um.
    seed
        Of the halves and positions.
    progress
        Called with (done, total, label).

    Raises
    ------
    UsageError
        If the instrument's bins are larger than the wanted ones.
    StsrError
        If no count is left, or no tissue is found.
    """
    fine, grid = _grids(bins, bin_um)
    split = None if _nests(bins.bin_um, bin_um) else Split(fine, grid)
    places = grid if split is None else fine
    lattice = _lattice(spots, fine, grid, len(genes))
    taken, left = (_counter(len(genes), places) for _ in range(2))
    density = np.zeros(places.height * places.width)
    done = 0
    for number, chunk in enumerate(bins.chunks()):
        rng = np.random.default_rng((seed, number))
        half = chunk.number if spots == MEASURED_BINS else rng.binomial(chunk.number, DEPTH)
        of_spots, rest = _Counts.of(chunk, half), _Counts.of(chunk, chunk.number - half)
        x_um, y_um = of_spots.positions_um(bins.bin_um, rng)
        panel = of_spots.gene >= 0  # the draws are those of all genes, whichever are kept
        lattice.add(Chunk(x_um[panel], y_um[panel], of_spots.gene[panel]))
        for counter, part in ((taken, of_spots), (left, rest)):
            panel = part.gene >= 0
            counter.add(part.gene[panel], _places(part.row, part.column, bins.bin_um, places)[panel])
        np.add.at(density, _places(chunk.row, chunk.column, bins.bin_um, places), chunk.number)
        done += len(chunk.number)
        progress(done, bins.entries, "counting")
    whole = Layer([taken] if spots == MEASURED_BINS else [taken, left], split)
    if not (kept := int(whole.per_gene.sum())):
        raise StsrError(
            "the bins in tissue hold no counts of these genes; choose others, or check the matrix"
        )
    density = (density if split is None else split.divide(density)).reshape(grid.shape)
    mask = _tissue(bins, fine, grid, density)
    made = _spots(spots, lattice, bins, grid, mask, genes)
    unseen = None if spots == MEASURED_BINS else Layer([left], split)
    return Counted(grid, whole, density, mask, made, kept, 0, round(density.sum()) - kept, unseen)


def _nests(fine_um: float, bin_um: float) -> bool:
    return abs(bin_um / fine_um - round(bin_um / fine_um)) < 1e-6


def _grids(bins: Bins, bin_um: float) -> tuple[Grid, Grid]:
    """The instrument's bins around the tissue, and the section's grid over them.

    The corner of the grid is a multiple of its bins, so that the instrument's bins nest in it if their size does.
    """
    if bin_um < bins.bin_um - 1e-6:
        raise UsageError(
            f"the section holds counts in bins of {bins.bin_um:g} um, which cannot be divided into {bin_um:g} um; "
            f"choose --bin-um {bins.bin_um:g} or larger"
        )
    rows, columns = (np.flatnonzero(bins.in_tissue.any(axis)) for axis in (1, 0))
    size = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    fine = Grid(columns[0] * bins.bin_um, rows[0] * bins.bin_um, bins.bin_um, *size)
    x0, y0, x1, y1 = fine.bounds_um
    corner = (np.floor(start / bin_um + 1e-9) * bin_um for start in (x0, y0))
    return fine, Grid.covering((*corner, x1, y1), bin_um)


def _counter(genes: int, places: Grid) -> Counter:
    try:
        return Counter(genes, places.height * places.width)
    except ValueError:
        raise UsageError(
            f"bins of {places.bin_um:g} um are too many for this section; choose larger ones with --bin-um"
        ) from None


def _lattice(spots: str, fine: Grid, grid: Grid, genes: int) -> Lattice:
    if spots == "visium":
        return Discs(grid, genes)
    if spots == "square":
        return Squares(grid.at(raster_um(grid.bin_um)), genes)
    if not _nests(fine.bin_um, SPOT_BIN_UM):
        raise UsageError(
            f"bins of {fine.bin_um:g} um do not add up to spots of {SPOT_BIN_UM:g} um; use --spots visium"
        )
    return Squares(_spot_bins(fine), genes)


def _spot_bins(fine: Grid) -> Grid:
    """The bins of 16 um that cover the instrument's bins."""
    x0, y0, x1, y1 = fine.bounds_um
    column, row = (float(np.floor(at / SPOT_BIN_UM + 1e-9)) for at in (x0, y0))
    size = int(np.ceil(y1 / SPOT_BIN_UM - 1e-9) - row), int(np.ceil(x1 / SPOT_BIN_UM - 1e-9) - column)
    return Grid(column * SPOT_BIN_UM, row * SPOT_BIN_UM, SPOT_BIN_UM, *size)


def _spots(spots: str, lattice: Lattice, bins: Bins, grid: Grid, mask: np.ndarray, genes: list[str]) -> Spots:
    if spots != MEASURED_BINS:
        return lattice.spots(lattice.in_tissue(grid, mask), genes)
    row, column = np.nonzero(bins.in_tissue)
    spot = lattice.at((column + 0.5) * bins.bin_um, (row + 0.5) * bins.bin_um)
    keep = np.unique(spot)
    at = np.floor(lattice.centres_um[keep] / SPOT_BIN_UM).astype(int)
    barcodes = [f"s_{SPOT_BIN_UM:03.0f}um_{row:05d}_{column:05d}-1" for column, row in at]
    return lattice.spots(keep, genes, origin="measured", names=barcodes)


def _tissue(bins: Bins, fine: Grid, grid: Grid, density: np.ndarray) -> np.ndarray:
    """Bins in tissue (height, width) bool: at least half in the instrument's bins in tissue, and with counts nearby.

    Raises
    ------
    StsrError
        If there are none.
    """
    row, column = round(fine.y0_um / fine.bin_um), round(fine.x0_um / fine.bin_um)
    inside = bins.in_tissue[row : row + fine.height, column : column + fine.width]
    covered = Split(fine, grid).divide(inside.ravel().astype(float)) * (fine.bin_um / grid.bin_um) ** 2
    mask = tissue.from_density(density, grid) & (covered.reshape(grid.shape) >= _IN_TISSUE)
    if not mask.any():
        raise StsrError("no tissue found: the counts are too sparse; check that the folder is complete")
    return mask
