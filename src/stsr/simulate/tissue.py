"""Tissue with known truth: cells, transcripts, and the observed and expected counts of bins and discs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from stsr.simulate.genes import CELL_TYPES, GeneTable, gene_table
from stsr.simulate.morphology import CORNERS, Cells, Morphology, Region, build_morphology, place_cells

#: The instrument's threshold on transcript quality.
MIN_QV = 20.0

#: Names and numbers of control codewords, as in a Xenium run of the human breast panel.
_CONTROLS = (
    ("NegControlProbe_{:05d}", 20),
    ("antisense_{}", 8),
    ("NegControlCodeword_{:05d}", 20),
    ("BLANK_{:04d}", 20),
)
CONTROL_NAMES = tuple(pattern.format(i) for pattern, count in _CONTROLS for i in range(count))

#: Approximate side of the instrument's field of view.
FOV_UM = 500.0

_IN_NUCLEUS = 0.4  # share of a cell's transcripts in its nucleus
_ADRIFT = 0.03  # share of transcripts that have left their cell
_DRIFT_UM = 6.0  # standard deviation of their displacement in x and y
_DISPERSION = 0.25  # of the negative binomial counts: variance = mean + dispersion * mean^2
_POINTS_PER_CELL = 512  # of the quadrature behind `Tissue.expected`


@dataclass(frozen=True)
class Transcripts:
    """All decoded transcripts, one entry (n,) each, ordered by field of view; positions and qv are float32."""

    x_um: np.ndarray
    y_um: np.ndarray
    z_um: np.ndarray
    qv: np.ndarray
    """Quality; transcripts below `MIN_QV` are not counted."""
    feature: np.ndarray
    """int16: index into `Tissue.features`, genes first, then controls."""
    cell: np.ndarray
    """int32: index of the cell, -1 outside every cell."""
    in_nucleus: np.ndarray
    """bool."""

    def __len__(self) -> int:
        return len(self.x_um)

    def take(self, chosen: np.ndarray) -> Transcripts:
        """A selection (indices or mask) of the transcripts."""
        return Transcripts(**{name: values[chosen] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Tissue:
    """A simulated section and its truth, in um from (0, 0), x to the right and y down."""

    width_um: float
    height_um: float
    table: GeneTable
    morphology: Morphology
    cells: Cells
    rates: np.ndarray = field(repr=False)
    """(cell, gene) float32: expected good-quality counts of every cell, including transcripts that drift out of it."""
    transcripts: Transcripts
    texture_seed: int
    """Seed of the image's texture (staining, fibres, sensor noise)."""

    @property
    def genes(self) -> tuple[str, ...]:
        """Ordered gene names."""
        return self.table.genes

    @property
    def features(self) -> tuple[str, ...]:
        """Gene names, then control names; `Transcripts.feature` is an index into them."""
        return self.table.genes + CONTROL_NAMES

    @property
    def cell_types(self) -> np.ndarray:
        """Cell type of each cell (cell,)."""
        return np.array(CELL_TYPES)[self.cells.type_index]

    @cached_property
    def good(self) -> Transcripts:
        """Transcripts of genes with quality `MIN_QV` or better."""
        all_of = self.transcripts
        return all_of.take((all_of.qv >= MIN_QV) & (all_of.feature < len(self.genes)))

    def counts(self, bin_um: float, x0_um: float, y0_um: float, nx: int, ny: int) -> np.ndarray:
        """Observed counts per bin.

        Parameters
        ----------
        bin_um : float
            Side of a bin.
        x0_um, y0_um : float
            Corner of bin (0, 0).
        nx, ny : int
            Number of bins.

        Returns
        -------
        (gene, ny, nx) int32 array

        Raises
        ------
        ValueError
            If the bin size is not positive or there is no bin.
        """
        cube = self._binned(self.good.x_um, self.good.y_um, bin_um, x0_um, y0_um, nx, ny)
        inside = cube >= 0
        flat = self.good.feature[inside].astype(np.int64) * (nx * ny) + cube[inside]
        counted = np.bincount(flat, minlength=len(self.genes) * nx * ny)
        return counted.astype(np.int32).reshape(len(self.genes), ny, nx)

    def expected(self, bin_um: float, x0_um: float, y0_um: float, nx: int, ny: int) -> np.ndarray:
        """Expected counts per bin: the mean of `counts` over tissues with these cells and rates.

        The integral over a cell is a sum over 512 evenly spread points, accurate to about 1 % for a bin of the size of
        a cell. Parameters and errors are those of `counts`.

        Returns
        -------
        (gene, ny, nx) float32 array
        """
        even = _even_numbers(_POINTS_PER_CELL)
        total = np.zeros((nx * ny, len(self.genes)), np.float32)
        for start in range(0, len(self.cells), 2048):  # in blocks, for bounded memory
            owner = np.repeat(np.arange(start, min(start + 2048, len(self.cells))), _POINTS_PER_CELL)
            u = np.tile(even, (len(owner) // _POINTS_PER_CELL, 1))
            x_um, y_um = _position(self.cells, owner, u, (self.width_um, self.height_um))
            where = self._binned(x_um, y_um, bin_um, x0_um, y0_um, nx, ny)
            inside = where >= 0
            share = np.full(inside.sum(), 1 / _POINTS_PER_CELL, np.float32)
            shape = (nx * ny, len(self.cells))
            total += sparse.csr_matrix((share, (where[inside], owner[inside])), shape=shape) @ self.rates
        return np.ascontiguousarray(total.T.reshape(len(self.genes), ny, nx))

    def counts_in_discs(self, centres_um: np.ndarray, radius_um: float) -> sparse.csr_matrix:
        """Observed counts (disc, gene), int32, of good transcripts within `radius_um` of each centre.

        Parameters
        ----------
        centres_um : (disc, 2) array
            x, y of the discs; they may overlap.
        radius_um : float
        """
        tree = cKDTree(np.column_stack([self.good.x_um, self.good.y_um]).astype(np.float64))
        members = tree.query_ball_point(np.asarray(centres_um, float), radius_um)
        disc = np.repeat(np.arange(len(members)), [len(m) for m in members])
        which = np.concatenate([np.asarray(m, np.int64) for m in members] or [np.empty(0, np.int64)])
        shape, ones = (len(members), len(self.genes)), np.ones(len(disc), np.int32)
        return sparse.coo_matrix((ones, (disc, self.good.feature[which])), shape=shape).tocsr()

    def is_tissue(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Whether points, um, lie on tissue instead of bare glass; False outside the section."""
        x_um, y_um = np.asarray(x_um, float), np.asarray(y_um, float)
        framed = (x_um >= 0) & (x_um < self.width_um) & (y_um >= 0) & (y_um < self.height_um)
        return framed & (self.morphology.at(self.morphology.region, x_um, y_um) != Region.BACKGROUND)

    def _binned(self, x_um, y_um, bin_um, x0_um, y0_um, nx, ny) -> np.ndarray:
        """Flat bin (row * nx + column) of points, -1 outside the bins."""
        if not bin_um > 0 or nx < 1 or ny < 1:
            raise ValueError(f"bins must have a positive size and number, not {bin_um} um and {nx} x {ny}")
        column = np.floor((np.asarray(x_um, np.float64) - x0_um) / bin_um).astype(np.int64)
        row = np.floor((np.asarray(y_um, np.float64) - y0_um) / bin_um).astype(np.int64)
        inside = (column >= 0) & (column < nx) & (row >= 0) & (row < ny)
        return np.where(inside, row * nx + column, -1)


def simulate_tissue(
    width_um: float = 1500.0,
    height_um: float = 1500.0,
    genes: Sequence[str] | int | None = None,
    seed: int | np.random.Generator = 0,
    counts_per_cell_scale: float = 1.0,
) -> Tissue:
    """Simulate a breast-like section with known truth.

    Ducts, tumour nests, stroma, fat, vessels and immune clusters are laid out from smooth random fields and filled
    with cells of ten types. The expected counts of a cell are the rates of its type (`genes.gene_table`) times its
    relative size, times smooth programmes across the tissue; counts are negative binomial. 40 % of the transcripts lie
    in the nucleus and 3 % drift out of their cell. 5 % of low quality and 1 % of controls are added.

    Parameters
    ----------
    width_um, height_um : float
        Extent of the section.
    genes : sequence of str, int or None
        See `genes.gene_table`. None: 78 genes, all on the 10x Xenium Human Breast panel.
    seed : int or numpy.random.Generator
        The same seed and arguments give the same tissue.
    counts_per_cell_scale : float
        Factor of all rates; 1 gives about 60 counts per cell for the default genes.

    Returns
    -------
    Tissue

    Raises
    ------
    ValueError
        If the extent is under 100 um, the scale is not positive, or the genes are invalid.
    """
    if min(width_um, height_um) < 100:
        raise ValueError(f"a tissue must be at least 100 um wide and high, not {width_um} x {height_um} um")
    if not counts_per_cell_scale > 0:
        raise ValueError(f"the scale of counts must be positive, not {counts_per_cell_scale}")
    rng = np.random.default_rng(seed)
    table = gene_table(genes, rng)
    morphology = build_morphology(width_um, height_um, rng)
    cells = place_cells(morphology, width_um, height_um, rng)
    rates = (_rates(table, morphology, cells, rng) * counts_per_cell_scale).astype(np.float32)
    transcripts = _draw_transcripts(table, cells, rates, (width_um, height_um), rng)
    return Tissue(
        float(width_um),
        float(height_um),
        table,
        morphology,
        cells,
        rates,
        transcripts,
        int(rng.integers(2**31)),
    )


def polygon_areas(outline_um: np.ndarray) -> np.ndarray:
    """Areas (n,) in um^2 of outlines (n, corner, 2), by the shoelace formula."""
    x, y = (outline_um - outline_um[:, :1]).transpose(2, 0, 1)
    return 0.5 * np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1))


def _rates(table: GeneTable, morphology: Morphology, cells: Cells, rng) -> np.ndarray:
    """Expected counts (cell, gene): rate of the type x relative area x smooth programmes."""
    fields = np.stack([morphology.at(f, cells.x_um, cells.y_um) for f in morphology.programmes], 1)
    area = polygon_areas(cells.outline_um)
    typical = np.array(
        [
            np.median(area[cells.type_index == t]) if (cells.type_index == t).any() else 1.0
            for t in range(len(CELL_TYPES))
        ]
    )
    size = (area / typical[cells.type_index]) ** 0.7 * rng.lognormal(-0.02, 0.2, len(cells))
    lift = np.exp(fields[:, table.programme] * table.strength)  # (cell, gene)
    return table.rates.T[cells.type_index] * lift * size[:, None]


def _draw_transcripts(table, cells, rates, extent_um, rng) -> Transcripts:
    """Draw the transcripts of all cells, then those of low quality and controls."""
    shape = 1 / _DISPERSION
    counts = rng.poisson(rates * rng.gamma(shape, 1 / shape, rates.shape))  # (cell, gene)
    cell, gene = np.nonzero(counts)
    times = counts[cell, gene]
    owner, feature = np.repeat(cell, times), np.repeat(gene, times)
    poor = rng.integers(0, max(len(owner), 1), int(0.05 * len(owner)))  # low-quality copies of good ones
    owner, feature = np.append(owner, owner[poor]), np.append(feature, feature[poor])
    x_um, y_um = _position(cells, owner, rng.random((len(owner), 5)), extent_um)
    qv = np.minimum(rng.gamma(9, 3.2, len(owner)) + MIN_QV, 40)
    qv[len(owner) - len(poor) :] = rng.uniform(1, 19.5, len(poor))

    controls = int(0.01 * len(owner))
    x_um = np.append(x_um, rng.uniform(0, extent_um[0], controls))
    y_um = np.append(y_um, rng.uniform(0, extent_um[1], controls))
    feature = np.append(feature, len(table.genes) + rng.integers(0, len(CONTROL_NAMES), controls))
    qv = np.append(qv, rng.uniform(1, 40, controls))
    x_um, y_um = (  # rounded to the instrument's precision before they are counted
        np.minimum(np.round(c * 64) / 64, e - 1 / 64).astype(np.float32)
        for c, e in ((x_um, extent_um[0]), (y_um, extent_um[1]))
    )
    inside, in_nucleus = _locate(cells, x_um, y_um)
    z_um = np.clip(rng.normal(16, 2.5, len(x_um)), 8, 30)
    order = np.lexsort((rng.random(len(x_um)), x_um // FOV_UM, y_um // FOV_UM))
    return Transcripts(
        x_um,
        y_um,
        z_um.astype(np.float32),
        qv.astype(np.float32),
        feature.astype(np.int16),
        inside,
        in_nucleus,
    ).take(order)


def _even_numbers(count: int) -> np.ndarray:
    """Evenly spread numbers (count, 5) for `_position`, the same for every tissue.

    The first column ascends, so each compartment that it selects gets consecutive members of the generalised golden
    ratio sequence in the plane (Roberts 2018), which are evenly spread.
    """
    golden = 1.3247179572447460
    order = np.arange(count)
    plane = (0.5 + np.outer(order, golden ** -np.arange(1, 3.0))) % 1
    return np.column_stack([(order + 0.5) / count, plane, plane])


def _position(cells: Cells, owner: np.ndarray, u: np.ndarray, extent_um) -> tuple[np.ndarray, np.ndarray]:
    """Turn five numbers in [0, 1) into a position in the owner's nucleus, in its outline, or adrift.

    It takes numbers instead of a generator, so that random draws (transcripts) and quadrature (expectation) share one
    distribution.
    """
    centre = np.stack([cells.x_um, cells.y_um], -1)
    xy = np.empty((len(owner), 2))
    in_nucleus = u[:, 0] < _IN_NUCLEUS
    for chosen, outline in ((in_nucleus, cells.nucleus_um), (~in_nucleus, cells.outline_um)):
        spoke = outline - centre[:, None]  # (cell, corner, 2)
        following = np.roll(spoke, -1, 1)
        wedge = np.abs(spoke[..., 0] * following[..., 1] - spoke[..., 1] * following[..., 0])
        upto = np.cumsum(wedge, 1) / wedge.sum(1, keepdims=True)
        mine, pick = owner[chosen], u[chosen, 1]
        corner = np.zeros(len(mine), np.int64)
        for k in range(CORNERS - 1):
            corner += pick >= upto[mine, k]
        start = np.where(corner > 0, upto[mine, corner - 1], 0)
        across = ((pick - start) / np.maximum(upto[mine, corner] - start, 1e-12)).clip(0, 1)[:, None]
        out = np.sqrt(u[chosen, 2])[:, None]
        xy[chosen] = centre[mine] + out * (
            (1 - across) * spoke[mine, corner] + across * following[mine, corner]
        )
    adrift = u[:, 0] >= 1 - _ADRIFT
    far = _DRIFT_UM * np.sqrt(-2 * np.log1p(-u[adrift, 3]))  # Box-Muller transform
    xy[adrift] += far[:, None] * np.stack(
        [np.cos(2 * np.pi * u[adrift, 4]), np.sin(2 * np.pi * u[adrift, 4])], -1
    )
    extent = np.asarray(extent_um, float)
    xy = extent - np.abs(extent - np.abs(xy))  # positions beyond the edge are reflected
    return xy[:, 0], xy[:, 1]


def _locate(
    cells: Cells, x_um: np.ndarray, y_um: np.ndarray, chunk: int = 200_000
) -> tuple[np.ndarray, np.ndarray]:
    """Cell whose outline contains each point (int32, -1 for none), and whether its nucleus does."""
    centre = np.column_stack([cells.x_um, cells.y_um])
    tree = cKDTree(centre)
    near = min(6, len(cells))
    owner, in_nucleus = np.full(len(x_um), -1, np.int32), np.zeros(len(x_um), bool)
    for start in range(0, len(x_um) if near else 0, chunk):
        part = slice(start, start + chunk)
        xy = np.column_stack([x_um[part], y_um[part]]).astype(np.float64)
        candidates = tree.query(xy, k=near)[1].reshape(len(xy), near)
        found = np.full(len(xy), -1, np.int32)
        for column in candidates.T:
            hit = (found < 0) & _within(cells.outline_um, centre, column, xy)
            found[hit] = column[hit]
        owner[part] = found
        in_nucleus[part] = (found >= 0) & _within(cells.nucleus_um, centre, np.maximum(found, 0), xy)
    return owner, in_nucleus


def _within(outline, centre, cell, xy) -> np.ndarray:
    """Whether each point lies in the outline of its candidate cell: inside of the chord that it faces."""
    way = xy - centre[cell]
    corner = (
        np.floor(np.arctan2(way[:, 1], way[:, 0]) % (2 * np.pi) / (2 * np.pi / CORNERS)).astype(int) % CORNERS
    )
    a = outline[cell, corner] - centre[cell]
    side = outline[cell, (corner + 1) % CORNERS] - centre[cell] - a
    return side[:, 0] * (way[:, 1] - a[:, 1]) - side[:, 1] * (way[:, 0] - a[:, 0]) >= 0
