"""Spots over a section, and the counts of what lies in each: discs on Visium's lattice, or squares side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import scipy.sparse as sp

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.geometry.lattice import VISIUM_SPOT_UM, hexagonal_lattice
from stsr.geometry.measurement import IN_TISSUE, nearest_spot
from stsr.platforms.source import Chunk, Spots
from stsr.verbs.prepare.binning import Counter

_LOCATE_UM = 10.0  # so fine that transcripts of a bin can only lie in the disc nearest to the bin


class Lattice(ABC):
    """Spots of one shape and size, and the counts in each.

    Parameters
    ----------
    centres_um
        (n, 2) x and y, um.
    size_um
        Diameter or side, um.
    genes
        Number of genes.
    """

    shape: ClassVar[str]

    def __init__(self, centres_um: np.ndarray, size_um: float, genes: int):
        self.centres_um, self.size_um = centres_um, size_um
        self.counter = Counter(genes, len(centres_um))

    @abstractmethod
    def at(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Index (n,) of the spot that each point lies in, -1 for none."""

    def add(self, chunk: Chunk) -> None:
        """Count the transcripts of a chunk."""
        spot = self.at(chunk.x_um, chunk.y_um)
        self.counter.add(chunk.gene[spot >= 0], spot[spot >= 0])

    def in_tissue(self, grid: Grid, mask: np.ndarray) -> np.ndarray:
        """Indices of the spots with enough tissue, according to a mask (height, width) of bins."""
        x, y = grid.centres_um()
        spot = self.at(*(axis.ravel() for axis in np.meshgrid(x, y)))
        return in_tissue(spot, mask, len(self.centres_um))

    def spots(
        self,
        keep: np.ndarray,
        genes: list[str],
        *,
        origin: str = "simulated",
        names: Sequence[str] | None = None,
    ) -> Spots:
        """The spots at the indices ``keep`` with their counts."""
        blocks = (self.counter.block(number)[:, keep] for number in range(self.counter.blocks))
        return spots_of(
            self.centres_um[keep], self.shape, self.size_um, gather(blocks), genes, origin=origin, names=names
        )


class Discs(Lattice):
    """Visium's lattice over a grid: discs of 55 um, 100 um apart.

    Raises
    ------
    StsrError
        If the grid is smaller than a disc.
    """

    shape = "disc"

    def __init__(self, grid: Grid, genes: int):
        centres_um = hexagonal_lattice(grid.bounds_um)
        if not len(centres_um):
            raise StsrError("the section is smaller than a Visium spot; use --spots square")
        super().__init__(centres_um, VISIUM_SPOT_UM, genes)
        self.grid = Grid.covering(grid.bounds_um, _LOCATE_UM)
        self.nearest = nearest_spot(self.grid, centres_um).ravel().astype(np.int32)

    def at(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """As `Lattice.at`."""
        rows, columns, _ = self.grid.rows_columns(x_um, y_um)
        spot = self.nearest[rows * self.grid.width + columns]
        centres = self.centres_um[spot]  # (n, 2); of the last spot where there is none
        inside = (x_um - centres[:, 0]) ** 2 + (y_um - centres[:, 1]) ** 2 <= (self.size_um / 2) ** 2
        return np.where(inside, spot, -1)


class Squares(Lattice):
    """The bins of a grid as spots."""

    shape = "square"

    def __init__(self, grid: Grid, genes: int):
        centres_um = np.stack(np.meshgrid(*grid.centres_um()), axis=-1).reshape(-1, 2)
        super().__init__(centres_um, grid.bin_um, genes)
        self.grid = grid

    def at(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """As `Lattice.at`."""
        rows, columns, inside = self.grid.rows_columns(x_um, y_um)
        return np.where(inside, rows * self.grid.width + columns, -1)


def in_tissue(spot: np.ndarray, mask: np.ndarray, spots: int) -> np.ndarray:
    """Indices of the spots with enough tissue, from the spot of each bin (bins,), -1 for none.

    Raises
    ------
    StsrError
        If there are none.
    """
    seen = spot >= 0
    area = np.bincount(spot[seen], minlength=spots)
    covered = np.bincount(spot[seen & mask.ravel()], minlength=spots)
    keep = np.flatnonzero((covered >= IN_TISSUE * area) & (covered > 0))
    if not len(keep):
        raise StsrError("no simulated spot lies in tissue; the section is too small, use --spots square")
    return keep


def gather(blocks: Iterable[np.ndarray]) -> sp.csr_matrix:
    """Counts (spots, genes) from blocks (genes in block, spots)."""
    data, indices, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    spots = 0
    for block in blocks:
        part = sp.csc_matrix(block.T, dtype=np.int32)  # (spots, genes in block)
        data.append(part.data)
        indices.append(part.indices)
        ends.append(ends[-1][-1] + part.indptr[1:].astype(np.int64))
        spots = part.shape[0]
    pointers = np.concatenate(ends)
    # Each list of pieces is freed before the next is joined: the bins of a whole slide are 2 GB.
    whole = sp.csc_matrix((_joined(data), _joined(indices), pointers), shape=(spots, len(pointers) - 1))
    return whole.tocsr()


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    """One array of the pieces, whose list is emptied."""
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole


def spots_of(
    centres_um: np.ndarray,
    shape: str,
    size_um: float,
    counts: sp.csr_matrix,
    genes: list[str],
    *,
    origin: str = "simulated",
    names: Sequence[str] | None = None,
) -> Spots:
    """Spots with their counts (spots, genes), named by number if no names are given."""
    import anndata
    import pandas as pd

    index = [f"spot_{number}" for number in range(len(centres_um))] if names is None else list(names)
    table = anndata.AnnData(counts, obs=pd.DataFrame(index=index), var=pd.DataFrame(index=genes))
    return Spots(centres_um, shape, size_um, table, origin)
