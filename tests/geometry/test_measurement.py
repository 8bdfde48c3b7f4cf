import numpy as np
import pytest
import scipy.sparse as sp

from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement, hexagonal_lattice

GRID = Grid(-20, 30, 10, 40, 50)


@pytest.fixture
def maps():
    return np.random.default_rng(0).poisson(2.0, (3, 40, 50)).astype(np.float32)


def test_squares_are_sums_of_their_bins(maps):
    measurement = Measurement.squares(GRID)
    expected = maps.reshape(3, 4, 10, 5, 10).sum((2, 4)).reshape(3, -1).T
    np.testing.assert_allclose(measurement.add_up(maps), expected)
    lr, mask = measurement.raster(expected)
    np.testing.assert_allclose(lr, expected.T.reshape(3, 4, 5), rtol=1e-6)
    assert (mask == 1).all()


def test_discs_have_the_area_of_discs():
    measurement = Measurement.discs(GRID, np.array([[100.0, 200.0], [203.3, 211.1]]), 55)
    np.testing.assert_allclose(measurement.bins_seen * 100, np.pi * 27.5**2, rtol=2e-3)
    assert measurement.matrix.max() <= 1


def test_squares_off_the_bin_edges_see_parts_of_bins():
    measurement = Measurement.squares(GRID, np.array([[104.0, 207.0]]), 30)
    assert measurement.bins_seen[0] == pytest.approx(9)
    assert len(np.unique(measurement.matrix.data.round(6))) > 2


def test_a_hexagonal_lattice_has_neighbours_at_its_pitch():
    centres = hexagonal_lattice((0, 0, 1000, 1000))
    measurement = Measurement.hexagonal(Grid(0, 0, 10, 100, 100))
    assert measurement.spots == len(centres)
    assert measurement.pitch_um == pytest.approx(100)
    assert centres.min() >= 27.5 and centres.max() <= 972.5
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    middle = np.argmin(np.linalg.norm(centres - 500, axis=1))
    assert (np.abs(distances[middle] - 100) < 1e-6).sum() == 6


@pytest.mark.parametrize("make", [Measurement.squares, Measurement.hexagonal])
def test_a_uniform_density_gives_a_uniform_raster(make):
    measurement = make(GRID)
    flat = np.full((1, 40, 50), 0.5, np.float32)
    lr, mask = measurement.raster(measurement.add_up(flat))
    np.testing.assert_allclose(lr[0][mask[0] > 0], 50, rtol=2e-3)


def test_raster_of_sparse_counts_equals_that_of_dense_ones(maps):
    measurement = Measurement.hexagonal(GRID)
    counts = measurement.add_up(maps)
    np.testing.assert_allclose(
        measurement.raster(sp.csr_matrix(counts))[0], measurement.raster(counts)[0], rtol=1e-5
    )


@pytest.mark.parametrize("make", [Measurement.squares, Measurement.hexagonal])
def test_corrected_maps_add_up_to_the_measured_counts(make, maps):
    measurement = make(GRID)
    counts = measurement.add_up(maps)
    guess = np.random.default_rng(1).gamma(1.0, 2.0, maps.shape).astype(np.float32)
    error = measurement.correct(guess, counts)
    assert error < 1e-3
    np.testing.assert_allclose(measurement.add_up(guess), counts, rtol=2e-3, atol=1e-3)


def test_bins_between_spots_take_the_root_of_what_the_spots_say():
    centres = np.array([[100.0, 150.0], [200.0, 150.0]])
    measurement = Measurement.discs(GRID, centres, 55)
    maps = np.ones((1, 40, 50), np.float32)
    counts = (
        1e6 * measurement.bins_seen[:, None] * np.array([[4.0], [16.0]])
    )  # so many that the added count is nothing
    maps *= 1e6
    measurement.correct(maps, counts)
    row = (150 - 30) // 10
    assert maps[0, row, (100 + 20) // 10] == pytest.approx(4e6, rel=0.05)
    assert maps[0, row, (150 + 20) // 10] == pytest.approx(
        np.sqrt(8) * 1e6, rel=0.15
    )  # between: root of the mean
    assert maps[0, 39, 49] == 1e6  # far from both


def test_correction_is_in_closed_form_for_one_spot():
    grid = Grid(0, 0, 50, 2, 2)
    measurement = Measurement.squares(grid)
    maps = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
    measurement.correct(maps, np.array([[20.0]]))
    np.testing.assert_allclose(maps, [[[2, 4], [6, 8]]], rtol=1e-3)


def test_counts_where_the_map_is_empty_are_spread_evenly():
    measurement = Measurement.squares(Grid(0, 0, 50, 2, 2))
    maps = np.zeros((1, 2, 2), np.float32)
    measurement.correct(maps, np.array([[8.0]]))
    np.testing.assert_allclose(maps, np.full((1, 2, 2), 2.0), rtol=1e-3)


def test_overlapping_spots_are_satisfied_together(maps):
    centres = np.array([[100.0, 150.0], [130.0, 150.0], [115.0, 180.0]])
    measurement = Measurement.discs(GRID, centres, 55)
    counts = measurement.add_up(maps)
    guess = np.ones_like(maps)
    assert measurement.correct(guess, counts) < 1e-3


def test_a_window_keeps_the_spots_that_lie_whole_in_it(maps):
    measurement = Measurement.hexagonal(GRID)
    window = GRID.window(10, 10, 20, 20)
    part, spots = measurement.window(window)
    x0, y0, x1, y1 = window.bounds_um
    centres = measurement.centres_um
    whole = ((centres - 27.5 >= [x0, y0]) & (centres + 27.5 <= [x1, y1])).all(1)
    np.testing.assert_array_equal(spots, np.flatnonzero(whole))
    np.testing.assert_allclose(part.add_up(maps[:, 10:30, 10:30]), measurement.add_up(maps)[spots], rtol=1e-5)


def test_a_window_that_sticks_out_is_cut():
    measurement = Measurement.squares(GRID)
    part, spots = measurement.window(GRID.window(30, 40, 20, 20))
    assert part.grid.shape == (10, 10)
    assert spots.tolist() == [19]
