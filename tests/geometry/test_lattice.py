"""Lattices: pitch, fit and the raster around spots, on positions made by hand."""

import numpy as np
import pytest

from stsr.geometry import lattice, measurement
from stsr.geometry.grid import Grid


def array(rows=6, columns=9):
    """Array rows and columns of a hexagonal array, as of Visium."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    there = (row + column) % 2 == 0
    return row[there].astype(float), column[there].astype(float)


def test_a_fit_gives_scale_and_misfit():
    ideal = lattice.hexagonal_um(*array())
    turn = np.deg2rad(20)
    turned = 0.4 * ideal @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) + [7, -3]
    scale, misfit = lattice.fitted(lattice.with_shift(ideal), turned)
    assert scale == pytest.approx(0.4) and misfit < 1e-9
    turned[3] += [5, 0]
    assert lattice.fitted(lattice.with_shift(ideal), turned)[1] > 2


def test_um_per_unit_of_hexagons_and_not_of_squares():
    row, column = array()
    assert lattice.lattice_um(lattice.hexagonal_um(row, column) / 2.5 + 11, row, column) == pytest.approx(2.5)
    line = row == 0  # spots on one line have a length only
    positions = lattice.hexagonal_um(row, column)[line] / 2
    assert lattice.lattice_um(positions, row[line], column[line]) == pytest.approx(2.0)
    row, column = np.indices((4, 4)).reshape(2, -1).astype(float)
    assert lattice.lattice_um(np.stack([column, row], 1) * 200, row, column) is None


def test_hexagons_are_told_from_squares():
    hexagons = lattice.hexagonal_um(*array())
    squares = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 100.0
    assert lattice.is_hexagonal(hexagons) and not lattice.is_hexagonal(squares)
    assert not lattice.is_hexagonal(hexagons[:6])
    assert lattice.median_pitch(hexagons) == pytest.approx(100) and lattice.median_pitch(hexagons[:1]) is None
    assert lattice.is_visium_pitch(110.0) and not lattice.is_visium_pitch(120.0)
    assert not lattice.is_visium_pitch(None)


@pytest.mark.parametrize(
    ("pitch_um", "size_um", "around_um"),
    [(100, 55, 22.5), (200, 100, 50), (500, 100, 50), (100, 100, 0), (100, 120, 0)],
)
def test_the_raster_holds_spots_and_half_of_the_space_between(pitch_um, size_um, around_um):
    centres = np.array([[0.0, 0.0], [pitch_um, 0.0]])
    grid = lattice.grid_around(centres, size_um, 10)
    reach = size_um / 2 + around_um
    assert (grid.x0_um, grid.y0_um) == (-reach, -reach)
    x1, y1 = grid.bounds_um[2:]
    assert 0 <= x1 - (pitch_um + reach) < 100 and 0 <= y1 - reach < 100
    assert grid.bounds_um == lattice.grid_around(centres, size_um, 20).bounds_um


def test_one_spot_has_a_raster():
    grid = lattice.grid_around(np.array([[30.0, 40.0]]), 55.0, 10)
    assert (grid.x0_um, grid.y0_um, grid.shape) == (2.5, 12.5, (10, 10))


def test_nearest_spots_do_not_depend_on_the_rows_searched_at_once(monkeypatch):
    grid = Grid(-20, 30, 10, 40, 50)
    centres = lattice.hexagonal_lattice(grid.bounds_um)[:9]
    whole = measurement.nearest_spot(grid, centres)
    assert set(np.unique(whole)) == set(range(-1, 9))
    monkeypatch.setattr(measurement, "_POINTS", 3 * grid.width)
    assert np.array_equal(measurement.nearest_spot(grid, centres), whole)
    assert (measurement.nearest_spot(grid, centres[:0]) == -1).all()
