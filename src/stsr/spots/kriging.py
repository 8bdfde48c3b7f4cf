"""Kriging: expected counts between spots, from the logarithms of the densities around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree
from scipy.special import xlogy

from stsr.geometry.grid import LR_UM, Grid
from stsr.geometry.lattice import VISIUM_SPOT_UM, median_pitch

LENGTHS, NUGGETS = (0.75, 1.5, 3.0, 6.0), (0.005, 0.02, 0.1, 0.5)
"""Candidate lengths, in distances between neighbouring spots, and nuggets."""

PLAIN = (1.5, 0.02)
"""Length, in distances between spots, and nugget where there are too few spots to choose from."""

SPOT_AREA_UM2 = np.pi / 4 * VISIUM_SPOT_UM**2
"""Area of a Visium spot, um2."""

_NEIGHBOURS = 24  # spots that a point is predicted from; they screen those farther away
_FADING = 0.7  # of the distance of the first spot that is left out: from there on, spots fade
_FLOOR = 0.02  # of a gene's mean, added to its densities: spots without counts have a logarithm, too
_SHARE = 0.05  # of a gene's mean in its map: a transcript may be anywhere
_MOST_SPREAD = 4.0  # largest sill, in variances of a gene's log densities
_JITTER = 1e-8  # smallest nugget; spots at the same place are singular without
_POINTS = 2**10  # points whose weights are solved for at once, for bounded memory
_VALUES = 2**22  # values of genes x points held at once, likewise
_LEAST_SPOTS = 10  # that choose length and nugget
_CHOICE_GENES, _CHOICE_SPOTS = 300, 1500  # most genes and spots of the choice
_CHOICE_COUNTS = 100  # fewest counts of a gene there, if any gene has as many
_TRIANGLE = np.exp(2j * np.pi / 3 * np.arange(3)) / np.sqrt(2)
"""Points x + iy whose mean is that over a unit disc, for polynomials of the second degree."""


@dataclass(frozen=True)
class Weights:
    """Weights of spots for some points.

    Parameters
    ----------
    matrix
        (points, spots) float32; rows sum to 1.
    missing
        (points, 1) float32: variance that the prediction lacks, relative to the sill. The mean of an exponential grows
        with it.
    """

    matrix: sp.csr_matrix
    missing: np.ndarray


@dataclass(frozen=True)
class Kriging:
    """Ordinary kriging with a Matern covariance of order 3/2 and local neighbours (Cressie 1993, chapter 3).

    The mean is unknown and constant among the neighbours of a point. Spots are points at their centres: within the
    length of the covariance the difference from a spot of 55 um is small. Weights depend on places only, so all genes
    share them.

    Parameters
    ----------
    centres_um
        Spot centres (n, 2), um.
    length_um
        Length of the covariance ``(1 + d) exp(-d)``, ``d = sqrt(3) distance / length``.
    nugget
        Variance of a spot about the smooth field, relative to the variance of the field (the sill).

    Raises
    ------
    ValueError
        If there are no spots, or length or nugget are out of range.
    """

    centres_um: np.ndarray
    length_um: float
    nugget: float

    def __post_init__(self) -> None:
        if not len(self.centres_um):
            raise ValueError("kriging needs at least one spot")
        if not self.length_um > 0 or not self.nugget >= 0:
            raise ValueError(
                f"kriging needs a length above 0 and a nugget of 0 or more, not {self.length_um} and {self.nugget}"
            )

    def weights(self, points_um: np.ndarray) -> Weights:
        """Weights of the spots for points (p, 2), um."""
        count = min(_NEIGHBOURS + 1, len(self.centres_um))
        return self._stacked(
            points_um, lambda part: self._tree.query(points_um[part], k=range(1, count + 1))[1]
        )

    def weights_on(self, grid: Grid) -> Weights:
        """Weights of the spots for the bins of a grid, in row-major order."""
        x, y = grid.centres_um()
        return self.weights(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))

    def weights_left_out(self, spots: np.ndarray | None = None) -> Weights:
        """Weights of the other spots for each spot, or for some by index; needs two spots.

        Only the spot itself is left out: one at the same place still counts.
        """
        chosen = np.arange(len(self.centres_um)) if spots is None else np.asarray(spots)
        count = min(_NEIGHBOURS + 2, len(self.centres_um))

        def others(part: slice) -> np.ndarray:
            own = chosen[part, None]
            found = self._tree.query(self.centres_um[own[:, 0]], k=range(1, count + 1))[1]
            last = np.argsort(found == own, axis=1, kind="stable")  # itself, or the farthest, goes last
            return np.take_along_axis(found, last, axis=1)[:, :-1]

        return self._stacked(self.centres_um[chosen], others)

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.centres_um)

    def _stacked(self, points: np.ndarray, neighbours: Callable[[slice], np.ndarray]) -> Weights:
        """Weights for points (p, 2), of the spots (part, k) that a function gives for a slice of them."""
        parts = [self._solved(points[part], neighbours(part)) for part in _slices(len(points), _POINTS)]
        spot, weight, missing = (np.concatenate(values) for values in zip(*parts, strict=True))
        start = np.arange(0, weight.size + 1, weight.shape[1])
        matrix = sp.csr_matrix(
            (weight.ravel(), spot.ravel(), start), shape=(len(points), len(self.centres_um))
        )
        return Weights(matrix, missing[:, None])

    def _solved(self, points: np.ndarray, spot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solve ``K w + m = r, sum(w) = 1`` for each point (p, 2) and its spots (p, k).

        A spot fades, by a growing nugget, before it leaves the neighbours of a point: weights are continuous.
        """
        x, y = self.centres_um[:, 0][spot], self.centres_um[:, 1][spot]  # (p, k)
        distance = np.hypot(x - points[:, :1], y - points[:, 1:])
        noise = np.full(spot.shape, self.nugget + _JITTER)
        if spot.shape[1] > _NEIGHBOURS:  # the last one is the first that is left out
            spot, x, y, noise = (values[:, :-1] for values in (spot, x, y, noise))
            reach = np.maximum(distance[:, -1:], _JITTER)
            distance = distance[:, :-1]
            faded = np.maximum(distance / reach - _FADING, 0) / (1 - _FADING)
            noise += faded**2 / (1 - faded + _JITTER)
        among = np.hypot(x[:, :, None] - x[:, None], y[:, :, None] - y[:, None])
        among = self._covariance(among) + noise[:, None] * np.eye(spot.shape[1])  # (p, k, k)
        to = self._covariance(distance)
        simple, one = np.moveaxis(np.linalg.solve(among, np.stack([to, np.ones_like(to)], -1)), -1, 0)
        lagrange = (1 - simple.sum(1)) / one.sum(1)
        weight = simple + one * lagrange[:, None]
        missing = 1 - (weight * to).sum(1) - lagrange  # of 1, what w' K w lacks
        return spot.astype(np.int32), weight.astype(np.float32), np.maximum(missing, 0).astype(np.float32)

    def _covariance(self, distance: np.ndarray) -> np.ndarray:
        scaled = np.sqrt(3) / self.length_um * distance
        return (1 + scaled) * np.exp(-scaled)


@dataclass(frozen=True)
class Kriged:
    """Kriged densities of some genes.

    Parameters
    ----------
    kriging
        Places and covariance.
    log_density
        z (n, g) float32: log of the expected counts of spots plus 0.02 of the gene's mean.
    mean
        (g,) expected counts per spot.
    sill
        (g,) variance of the field of z between spots; see `krige`.
    scale
        (g,) counts per exponential of the kriged z; see `krige`.
    area_um2
        Of a spot.
    """

    kriging: Kriging
    log_density: np.ndarray
    mean: np.ndarray
    sill: np.ndarray
    scale: np.ndarray
    area_um2: float

    def predict(self, weights: Weights, which: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Counts (points, w) float32 of some genes that a spot would have at each point."""
        made = _exponentials(weights, self.log_density[:, which], self.sill[which])
        made *= ((1 - _SHARE) * self.scale[which]).astype(np.float32)
        made += (_SHARE * self.mean[which]).astype(np.float32)
        return made

    def left_out(self, spots: np.ndarray | None = None) -> np.ndarray:
        """Counts (n, g) float32 of each spot, or of some by index, predicted from the others."""
        if len(self.log_density) == 1:
            return np.repeat(self.mean[None], 1, axis=0).astype(np.float32)
        return self.predict(self.kriging.weights_left_out(spots))

    def maps(
        self, window: Grid, which: np.ndarray | slice = slice(None), weights: Weights | None = None
    ) -> np.ndarray:
        """Expected counts per bin (w, H, W) float32.

        Parameters
        ----------
        window
            The bins; a whole slide goes tile by tile.
        which
            Genes; all by default.
        weights
            `Kriging.weights_on` of this window, if several blocks of genes share it.
        """
        weights = weights or self.kriging.weights_on(window)
        genes = np.arange(len(self.mean))[which]
        made = np.empty((len(genes), *window.shape), np.float32)
        for part in _slices(len(genes), max(1, _VALUES // weights.matrix.shape[0])):
            made[part] = self.predict(weights, genes[part]).T.reshape(-1, *window.shape)
        made *= window.bin_um**2 / self.area_um2
        return made


def krige(
    kriging: Kriging,
    expected: np.ndarray,
    area_um2: float = SPOT_AREA_UM2,
    spots: np.ndarray | None = None,
) -> Kriged:
    """Krige the log densities of denoised spots.

    The map at a point is ``0.95 scale exp(z + sill missing / 2) + 0.05 mean``, z being kriged. An average of
    logarithms falls short of the average: the more, the farther a point is from spots. The sill is the one that lets
    spots predicted from the others have the same total as spots predicted from all, to first order; then the scale
    makes the map, integrated over the discs of the spots, add up to the total of the spots.

    Parameters
    ----------
    kriging
        Places and covariance.
    expected
        Expected counts (n, g), as `stsr.spots.denoising.Denoised.expected` gives them, not negative.
    area_um2
        Of a spot; Visium's by default.
    spots
        Indices of spots that sill and scale are taken from; all by default.
    """
    mean = expected.mean(0, dtype=np.float64)
    counted = np.where(mean > 0, mean, 1.0)  # a gene without counts has a scale of 0
    log_density = np.add(expected, _FLOOR * counted, dtype=np.float32)
    np.log(log_density, out=log_density)
    chosen = np.arange(len(log_density)) if spots is None else spots
    radius = np.sqrt(area_um2 / np.pi)
    triangle = radius * np.stack([_TRIANGLE.real, _TRIANGLE.imag], axis=-1)
    at = kriging.weights((kriging.centres_um[chosen, None] + triangle).reshape(-1, 2))
    between = kriging.weights_left_out(chosen) if len(log_density) > 1 else at
    sill, level = np.zeros(len(mean)), np.ones(len(mean))
    for part in _slices(len(mean), max(1, _VALUES // len(at.missing))):
        z = log_density[:, part]
        here, there = (_level(weights, z) for weights in (at, between))
        ratio = np.log(here[0] / there[0]) / np.maximum(there[1] - here[1], 1e-3)
        sill[part] = np.clip(2 * ratio, 0, _MOST_SPREAD * z.var(0))
        level[part] = _exponentials(at, z, sill[part]).mean(0, dtype=np.float64)
    return Kriged(kriging, log_density, mean, sill, mean / level, float(area_um2))


def choose(
    counts: np.ndarray | sp.spmatrix,
    expected: np.ndarray,
    centres_um: np.ndarray,
    area_um2: float = SPOT_AREA_UM2,
) -> Kriging:
    """Choose length and nugget by leaving out each spot and predicting its raw counts from the other spots.

    The loss is the Poisson deviance relative to that of the gene's mean, over genes from rare to common. Of the
    candidates whose loss is within a standard error of the smallest (paired over spots), the nearest to `PLAIN` is
    taken: long lengths with small nuggets are often as good as short lengths with large ones.

    Parameters
    ----------
    counts, expected
        Raw and expected counts (n, g) of the same genes.
    centres_um
        (n, 2), um.
    area_um2
        Of a spot.
    """
    pitch = median_pitch(centres_um) or LR_UM
    total = np.asarray(counts.sum(0)).ravel()
    order = np.argsort(-total, kind="stable")[: max(1, int((total >= _CHOICE_COUNTS).sum()))]
    genes = np.sort(order[np.unique(np.linspace(0, len(order) - 1, _CHOICE_GENES).astype(int))])
    plain = Kriging(centres_um, PLAIN[0] * pitch, PLAIN[1])
    if len(centres_um) < _LEAST_SPOTS or not total.any():
        return plain
    spots = np.unique(np.linspace(0, len(centres_um) - 1, _CHOICE_SPOTS).astype(int))
    raw = counts[spots][:, genes]
    raw = np.asarray(raw.todense() if sp.issparse(raw) else raw, float)
    candidates = [
        Kriging(centres_um, length * pitch, nugget)
        for length, nugget in sorted(product(LENGTHS, NUGGETS), key=_from_plain)
    ]
    losses = np.stack(
        [
            _losses(krige(kriging, expected[:, genes], area_um2, spots).left_out(spots), raw)
            for kriging in candidates
        ]
    )  # (candidates, spots)
    excess = losses - losses[losses.sum(1).argmin()]
    good = excess.mean(1) <= excess.std(1) / np.sqrt(len(spots))
    return candidates[int(np.argmax(good))]


def _from_plain(candidate: tuple[float, float]) -> float:
    """Distance of length and nugget from `PLAIN`, on logarithmic scales."""
    return float(np.linalg.norm(np.log(np.divide(candidate, PLAIN))))


def _exponentials(weights: Weights, z: np.ndarray, sill: np.ndarray) -> np.ndarray:
    """Mean densities (points, g) up to a factor per gene, from logarithms z (n, g) of the spots."""
    made = weights.matrix @ z
    if sill.any():
        made += weights.missing * (sill / 2).astype(np.float32)
    return np.exp(made, out=made)


def _level(weights: Weights, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (g,) of the exponentials over points, and of the missing variance, weighted by them."""
    made = _exponentials(weights, z, np.zeros(z.shape[1]))
    total = made.sum(0, dtype=np.float64)
    return total / len(made), (made * weights.missing).sum(0, dtype=np.float64) / total


def _losses(predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Poisson deviance (n,) of counts (n, g), each gene's relative to the total deviance from its mean."""
    left, whole = (
        xlogy(counts, counts / made) - counts + made for made in (predicted.astype(float), counts.mean(0))
    )
    varying = whole.sum(0) > 0
    return (left[:, varying] / whole[:, varying].sum(0)).sum(1)


def _slices(total: int, step: int) -> Iterator[slice]:
    """Slices of ``step``, at least one."""
    for first in range(0, max(total, 1), step):
        yield slice(first, min(first + step, total))
