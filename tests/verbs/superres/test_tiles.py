from itertools import pairwise

import numpy as np
import pytest

from stsr.geometry.grid import Grid
from stsr.verbs.superres.tiles import Canvas, Tile, needed, plan, taper


@pytest.mark.parametrize(("height", "width"), [(60, 60), (30, 50), (130, 170), (70, 250), (400, 60)])
def test_tiles_cover_the_grid_with_the_overlap(height, width):
    grid = Grid(0, 0, 10, height, width)
    bands = plan(grid, tile_lr=6, overlap_lr=2)
    seen = np.zeros((height, width), int)
    for band in bands:
        for tile in band:
            assert tile.row % 10 == 0 and tile.column % 10 == 0
            seen[tile.row : tile.row + tile.height, tile.column : tile.column + tile.width] += 1
    assert seen.min() >= 1 and seen.sum() == sum(t.height * t.width for band in bands for t in band)
    rows = [band[0].row for band in bands]
    assert all(b - a <= 40 for a, b in pairwise(rows))


@pytest.mark.parametrize(("height", "width"), [(60, 60), (30, 50), (130, 170), (400, 60)])
def test_tiles_of_one_map_blend_to_that_map(height, width):
    grid = Grid(0, 0, 10, height, width)
    truth = np.random.default_rng(0).random((3, height, width), np.float32)
    bands = plan(grid, 6, 2)
    canvas = Canvas(3, bands, ramp=20)
    out = np.full_like(truth, np.nan)
    for number, band in enumerate(bands):
        for tile in band:
            maps = truth[:, tile.row : tile.row + tile.height, tile.column : tile.column + tile.width]
            canvas.add(tile, maps[:2], slice(0, 2))
            canvas.add(tile, maps[2:], slice(2, 3))
        for first, block in canvas.finished(number):
            out[:, first : first + block.shape[1]] = block
    np.testing.assert_allclose(out, truth, rtol=1e-5)


def test_seams_are_smooth():
    grid = Grid(0, 0, 10, 60, 100)
    bands = plan(grid, 6, 2)
    canvas = Canvas(1, bands, ramp=20)
    for value, tile in enumerate(bands[0]):
        canvas.add(tile, np.full((1, 60, 60), float(value)))
    (_, block), *_ = canvas.finished(0)
    assert np.abs(np.diff(block[0, 30])).max() < 0.1
    assert taper(60, 50, 20).min() > 0


def test_overlap_must_be_smaller_than_the_tile():
    with pytest.raises(ValueError, match="cannot overlap"):
        plan(Grid(0, 0, 10, 60, 60), 2, 2)


@pytest.mark.parametrize("area", [Tile(0, 0, 10, 10), Tile(60, 80, 20, 30), Tile(120, 160, 10, 10)])
def test_tiles_of_an_area_blend_to_the_same_bits(area):
    grid = Grid(0, 0, 10, 130, 170)
    bands = plan(grid, 6, 2)
    chosen = needed(bands, area)
    assert sum(map(len, chosen)) < sum(map(len, bands))
    rng = np.random.default_rng(0)
    maps = {tile: rng.random((2, 60, 60), np.float32) for band in bands for tile in band}
    whole, part = np.zeros((2, 130, 170), np.float32), np.zeros((2, 130, 170), np.float32)
    for out, some in ((whole, bands), (part, chosen)):
        canvas = Canvas(2, some, ramp=20)
        for number, band in enumerate(some):
            for tile in band:
                canvas.add(tile, maps[tile])
            for first, block in canvas.finished(number):
                columns = slice(canvas.left, canvas.left + block.shape[2])
                out[:, first : first + block.shape[1], columns] = block
    rows, columns = area.within(Tile(0, 0, 130, 170))
    np.testing.assert_array_equal(part[:, rows, columns], whole[:, rows, columns])
