"""Simulated spots of a tile are those of the whole section."""

import numpy as np
import pytest
import scipy.sparse as sp

from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement
from stsr.methods.batch import lr_mean
from stsr.verbs.train.spots import SPOT_KINDS, lattices_of, mean_weights

BINS, LR = 50, 3  # a tile of 3 x 3 low-resolution pixels and its margin


def maps(seed=0, genes=4, side=BINS):
    return np.random.default_rng(seed).poisson(2.0, (genes, side, side)).astype(np.float32)


def simulate(lattice, counts, tissue=None, usable=None):
    everywhere = np.ones((BINS, BINS), bool)
    matrix = sp.csr_matrix(counts.reshape(len(counts), -1).T)
    return lattice.simulate(
        matrix, everywhere if tissue is None else tissue, everywhere if usable is None else usable
    )


def test_squares_are_sums():
    counts = maps()
    (lattice,) = lattices_of("square", LR, 10.0, 100.0)
    lr, mask = simulate(lattice, counts)
    assert np.array_equal(lr, counts[:, 10:40, 10:40].reshape(4, 3, 10, 3, 10).sum((2, 4)))
    assert lr.shape == (4, 3, 3) and (mask == 1).all()


def test_discs_are_those_of_a_wide_lattice():
    """Spots beyond the margin make no difference, so tiles see what a whole section would."""
    wide = Grid(-500.0, -500.0, 10.0, BINS + 100, BINS + 100)
    counts = maps(side=BINS + 100)
    for lattice in lattices_of("visium", LR, 10.0, 100.0)[::5]:
        x, y = lattice.measurement.centres_um[0]
        row = np.sqrt(3) * 50
        centres = [(x + 100 * i + 50 * (j % 2), y + row * j) for j in range(-8, 16) for i in range(-9, 16)]
        whole = Measurement.discs(wide, np.array(centres))
        expected, expected_mask = whole.raster(whole.add_up(counts))
        lr, mask = simulate(lattice, counts[:, 50:-50, 50:-50])
        # Bins that are equally far from two spots go to either.
        np.testing.assert_allclose(lr, expected[:, 6:9, 6:9], rtol=0.03)
        assert lr.mean() == pytest.approx(expected[:, 6:9, 6:9].mean(), rel=3e-3)
        np.testing.assert_allclose(mask, expected_mask[:, 6:9, 6:9], atol=0.011)


def test_lattices_differ_and_are_the_same_each_time():
    first, again = (lattices_of("visium", LR, 10.0, 100.0) for _ in range(2))
    assert len({simulate(lattice, maps())[0].tobytes() for lattice in first}) == len(first) == 16
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.measurement.centres_um, b.measurement.centres_um)


@pytest.mark.parametrize("kind", SPOT_KINDS)
def test_spots_outside_tissue_or_partly_excluded_are_not_measured(kind):
    tissue = np.zeros((BINS, BINS), bool)
    tissue[:, :22] = True
    counts = maps()
    lattice = lattices_of(kind, LR, 10.0, 100.0)[0]
    lr, mask = simulate(lattice, counts, tissue)
    kept = lattice.measurement.of_spots(lattice.measurement.in_tissue(tissue))
    expected, expected_mask = kept.raster(kept.add_up(counts))
    np.testing.assert_allclose(lr, expected[:, 1:4, 1:4], rtol=1e-5)
    assert np.array_equal(mask, expected_mask[:, 1:4, 1:4]) and mask.min() == 0
    assert (lr[:, mask[0] == 0] == 0).all()
    usable = np.ones((BINS, BINS), bool)
    usable[:, 25:] = False
    other = counts.copy()
    other[:, :, 25:] += 100
    assert np.array_equal(
        simulate(lattice, counts, None, usable)[0], simulate(lattice, other, None, usable)[0]
    )


@pytest.mark.parametrize("kind", SPOT_KINDS)
def test_mean_counts_are_those_of_the_whole_raster(kind):
    grid = Grid(0.0, 0.0, 10.0, 120, 110)
    tissue = np.zeros(grid.shape, bool)
    tissue[15:90, 20:101] = True
    counts = np.random.default_rng(0).poisson(np.linspace(0.1, 4, 110), (3, *grid.shape)).astype(float)
    weights = mean_weights(kind, grid, tissue, np.ones(grid.shape, bool), 100.0)
    whole = Measurement.squares(grid) if kind == "square" else Measurement.hexagonal(grid)
    kept = whole.of_spots(whole.in_tissue(tissue))
    expected = lr_mean(*kept.raster(kept.add_up(counts)))
    # Discs lie elsewhere on the section than those of `hexagonal`.
    tolerance = 1e-5 if kind == "square" else 0.05
    np.testing.assert_allclose(np.einsum("yx,gyx->g", weights, counts), expected, rtol=tolerance)
    hidden = np.ones(grid.shape, bool)
    hidden[:40] = False
    assert not mean_weights(kind, grid, tissue, hidden, 100.0)[:40].any()
