import numpy as np
import pytest

from stsr.geometry.correction import SmoothCorrection
from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement

GRID = Grid(0.0, 0.0, 10.0, 120, 120)


@pytest.fixture(scope="module")
def measurement():
    return Measurement.hexagonal(GRID)


def spots_of(measurement, correction, maps):
    return measurement.add_up(maps)[correction.spots]


def test_a_map_that_agrees_is_left_as_it_is(measurement):
    maps = np.random.default_rng(0).random((2, *GRID.shape)).astype(np.float32)
    correction = SmoothCorrection(measurement)
    after = maps.copy()
    correction.apply(after, spots_of(measurement, correction, maps))
    np.testing.assert_allclose(after, maps, rtol=1e-5)


def test_a_level_that_is_wrong_everywhere_is_corrected_and_detail_is_kept(measurement):
    truth = np.random.default_rng(0).gamma(2, 5, (1, *GRID.shape)).astype(np.float32)
    correction = SmoothCorrection(measurement)
    after = truth / 2
    correction.apply(after, spots_of(measurement, correction, truth))
    np.testing.assert_allclose(after, truth, rtol=2e-3)


def test_noise_of_one_spot_is_shared_with_its_neighbours(measurement):
    maps = np.ones((1, *GRID.shape), np.float32)
    correction = SmoothCorrection(measurement)
    counts = spots_of(measurement, correction, maps)
    number = int(np.argmin(((measurement.centres_um[correction.spots] - 600) ** 2).sum(1)))
    counts[number] *= 3
    after = maps.copy()
    correction.apply(after, counts)
    x, y = (measurement.centres_um[correction.spots[number]] // 10).astype(int)
    assert 1.2 < after[0, y, x] < 2.6  # not 3
    assert 1.02 < after[0, y, x + 7] < after[0, y, x]  # between spots, too
    assert after[0, y, x + 40] == pytest.approx(1, abs=1e-6)


def test_a_window_is_corrected_as_the_whole(measurement):
    rng = np.random.default_rng(1)
    maps, truth = (rng.gamma(2, 1, (2, *GRID.shape)).astype(np.float32) for _ in range(2))
    whole = SmoothCorrection(measurement)
    expected = maps.copy()
    whole.apply(expected, spots_of(measurement, whole, truth))
    window = GRID.crop_um(400, 300, 700, 600)
    part = SmoothCorrection(measurement, window)
    row, column = GRID.offset_of(part.area)
    area = np.s_[:, row : row + part.area.height, column : column + part.area.width]
    cut = np.ascontiguousarray(maps[area])
    part.apply(cut, spots_of(measurement, part, truth))
    whole_map = maps.copy()
    whole_map[area] = cut
    row, column = GRID.offset_of(window)
    inside = np.s_[:, row : row + window.height, column : column + window.width]
    np.testing.assert_array_equal(whole_map[inside], expected[inside])
