import numpy as np
import pytest
import scipy.sparse as sp

from stsr.geometry.correction import Correction
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
    error = Correction(measurement).apply(guess, counts)
    assert error < 1e-3
    np.testing.assert_allclose(measurement.add_up(guess), counts, rtol=2e-3, atol=1e-3)


def test_bins_between_spots_take_the_root_of_what_the_spots_say():
    centres = np.array([[100.0, 150.0], [200.0, 150.0]])
    measurement = Measurement.discs(GRID, centres, 55)
    maps = np.ones((1, 40, 50), np.float32)
    counts = (
        1e6 * measurement.bins_seen[:, None] * np.array([[4.0], [16.0]])
    )  # so many that the added count is negligible
    maps *= 1e6
    Correction(measurement).apply(maps, counts)
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
    Correction(measurement).apply(maps, np.array([[20.0]]))
    np.testing.assert_allclose(maps, [[[2, 4], [6, 8]]], rtol=1e-3)


def test_counts_where_the_map_is_empty_are_spread_evenly():
    measurement = Measurement.squares(Grid(0, 0, 50, 2, 2))
    maps = np.zeros((1, 2, 2), np.float32)
    Correction(measurement).apply(maps, np.array([[8.0]]))
    np.testing.assert_allclose(maps, np.full((1, 2, 2), 2.0), rtol=1e-3)


def test_overlapping_spots_are_satisfied_together(maps):
    centres = np.array([[100.0, 150.0], [130.0, 150.0], [115.0, 180.0]])
    measurement = Measurement.discs(GRID, centres, 55)
    counts = measurement.add_up(maps)
    guess = np.ones_like(maps)
    assert Correction(measurement).apply(guess, counts) < 1e-3


WIDE = Grid(-20.0, 30.0, 10.0, 90, 100)


def scattered(grid):
    """Discs of first-generation ST: 100 um, about 200 um apart."""
    x, y = np.meshgrid(np.arange(40.0, 960, 200), np.arange(90.0, 900, 200))
    centres = np.stack([x.ravel(), y.ravel()], 1)
    return Measurement.discs(grid, centres + np.random.default_rng(2).uniform(-5, 5, centres.shape), 100)


def slanted(grid):
    """Squares that do not lie on the edges of bins, so that neighbours share bins."""
    x, y = np.meshgrid(np.arange(53.7, 900, 100), np.arange(103.1, 850, 100))
    return Measurement.squares(grid, np.stack([x.ravel(), y.ravel()], 1))


@pytest.mark.parametrize("make", [Measurement.squares, Measurement.hexagonal, scattered, slanted])
@pytest.mark.parametrize("bin_um", [10, 20, 50])
def test_correction_of_a_window_equals_that_of_the_whole(make, bin_um):
    grid = WIDE.at(bin_um)
    measurement, window = make(grid), WIDE.window(30, 40, 20, 10).at(bin_um)
    rng = np.random.default_rng(0)
    guess = rng.gamma(1.0, 2.0, (3, *grid.shape)).astype(np.float32)
    guess[:, : grid.height // 2, : grid.width // 2] = 0  # spots with counts where the map is zero
    counts = rng.poisson(20, (measurement.spots, 3))
    whole = guess.copy()
    Correction(measurement).apply(whole, counts)
    correction = Correction(measurement, window)
    rows, columns = place(grid, correction.area)
    part = guess[:, rows, columns].copy()
    correction.apply(part, counts[correction.spots])
    inner = place(correction.area, window)
    np.testing.assert_array_equal(part[:, *inner], whole[:, *place(grid, window)])
    assert not np.array_equal(part[:, *inner], guess[:, *place(grid, window)])
    shares_bins = ((measurement.matrix > 1e-6).sum(0) > 1).any()
    assert (correction.area == grid) == shares_bins


def place(grid, window):
    row, column = grid.offset_of(window)
    return slice(row, row + window.height), slice(column, column + window.width)


def test_error_is_measured_over_spots_in_the_support(maps):
    measurement = Measurement.hexagonal(GRID)
    counts = measurement.add_up(maps)
    support = np.ones(GRID.shape, bool)
    support[:, 25:] = False
    correction = Correction(measurement, support=support)
    inside = measurement.matrix @ ~support.ravel() == 0
    assert correction.beyond == (~inside).sum() > 0
    guess = np.ones_like(maps)
    counts[~inside] *= 1e12  # unreachable in float32; not part of the error
    assert correction.apply(guess, counts) < 1e-3
    assert Correction(measurement, support=~support | support).beyond == 0
    assert Correction(measurement, support=np.zeros_like(support)).apply(guess, counts) is None


def test_spots_that_see_nothing_are_left_out():
    centres = np.array([[100.0, 150.0], [-500.0, 0.0], [300.0, 150.0]])
    measurement, spots = Measurement.discs(GRID, centres, 55).of_seeing_spots()
    assert spots.tolist() == [0, 2] and measurement.spots == 2
    np.testing.assert_array_equal(measurement.centres_um, centres[[0, 2]])


@pytest.mark.parametrize("make", [Measurement.discs, Measurement.squares])
def test_many_spots_are_computed_a_few_at_a_time(make, monkeypatch):
    grid = Grid(0, 0, 10, 60, 60)
    centres = np.random.default_rng(0).uniform(-20, 620, (50, 2))
    whole = make(grid, centres).matrix
    monkeypatch.setattr("stsr.geometry.measurement._SPOTS", 7)
    parts = make(grid, centres).matrix
    assert parts.shape == (50, 3600) and (parts != whole).nnz == 0
    assert make(grid, np.zeros((0, 2))).matrix.shape == (0, 3600)
