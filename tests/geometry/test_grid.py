import numpy as np
import pytest

from stsr.geometry.grid import Grid, add_up, bins_per_lr, raster_um


def test_points_fall_into_the_bin_whose_edges_hold_them():
    grid = Grid(100, -50, 10, 20, 30)
    rows, columns, inside = grid.rows_columns([100, 109.99, 110, 99.99, 400], [-50, -40.01, -40, 0, 0])
    assert columns[:3].tolist() == [0, 0, 1]
    assert rows[:3].tolist() == [0, 0, 1]
    assert inside.tolist() == [True, True, True, False, False]


def test_centres_map_back_to_their_bins():
    grid = Grid(3, 7, 10, 4, 5)
    x, y = grid.centres_um()
    rows, columns, inside = grid.rows_columns(*np.meshgrid(x, y))
    assert inside.all()
    assert (rows == np.arange(4)[:, None]).all() and (columns == np.arange(5)).all()
    np.testing.assert_allclose(grid.bin_to_um @ [0.5, 0.5, 1], [x[0], y[0], 1])


def test_covering_takes_whole_low_resolution_pixels():
    grid = Grid.covering((10, 20, 1911, 1020), 10)
    assert grid.shape == (100, 200)
    assert grid.bounds_um == (10, 20, 2010, 1020)
    assert Grid.covering((0, 0, 5, 5), 20).shape == (5, 5)


def test_changing_the_bin_keeps_the_area():
    grid = Grid(0, 0, 10, 20, 30)
    assert grid.at(20).shape == (10, 15)
    assert grid.at(20).bounds_um == grid.bounds_um
    with pytest.raises(ValueError, match="do not divide"):
        grid.at(30)


def test_windows_know_where_they_are():
    grid = Grid(5, 5, 10, 50, 60)
    assert grid.offset_of(grid.window(-3, 12, 10, 10)) == (-3, 12)
    with pytest.raises(ValueError, match="coincide"):
        grid.offset_of(Grid(6, 5, 10, 5, 5))


def test_a_region_becomes_whole_pixels_inside_the_grid():
    grid = Grid(0, 0, 10, 50, 60)
    assert grid.crop_um(120, 0, 290, 1000).bounds_um == (100, 0, 300, 500)
    with pytest.raises(ValueError, match="outside"):
        grid.crop_um(700, 0, 800, 100)


def test_adding_up_keeps_the_total():
    values = np.arange(2 * 4 * 6.0).reshape(2, 4, 6)
    assert add_up(values, 2).shape == (2, 2, 3)
    assert add_up(values, 2)[0, 0, 0] == 0 + 1 + 6 + 7
    assert add_up(values, 2).sum() == values.sum()
    assert bins_per_lr(10) == 10
    with pytest.raises(ValueError, match="nest"):
        bins_per_lr(40)


@pytest.mark.parametrize(
    ("bin_um", "lr_um"),
    [(10, 100), (25, 100), (100, 100), (8, 96), (16, 96), (24, 96), (96, 96), (12, 96), (7, 98)],
)
def test_the_raster_is_near_100_um(bin_um, lr_um):
    assert raster_um(bin_um) == lr_um
    assert bins_per_lr(bin_um) * bin_um == lr_um
    grid = Grid.covering((0, 0, 950, 200), bin_um)
    assert grid.bounds_um[2] == np.ceil(950 / lr_um) * lr_um
    assert grid.crop_um(lr_um + 1, 0, 2 * lr_um - 1, 5).bounds_um == (lr_um, 0, 2 * lr_um, lr_um)


@pytest.mark.parametrize("bin_um", [40, 70, 200])
def test_bins_without_a_raster_are_refused(bin_um):
    with pytest.raises(ValueError, match="nest"):
        raster_um(bin_um)
