"""What augmentation does to the image of a tile."""

import numpy as np
import pytest

from stsr.geometry.grid import Grid
from stsr.histology.image import Image, scaling
from stsr.verbs.train.augmentation import coarsened


@pytest.fixture
def fine() -> Image:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 200, 200)).astype(np.uint8)
    return Image([pixels], scaling(2.0))  # 400 x 400 um


def test_a_coarsened_tile_is_what_a_coarser_scan_gives(fine):
    whole = Grid(0.0, 0.0, 10.0, 40, 40)
    scan = Image([fine.read(whole)], scaling(10.0))
    window = Grid(100.0, 0.0, 2.0, 100, 150)
    inner = (slice(None), slice(5, -5), slice(5, -5))  # the scan of a tile ends with it
    assert np.array_equal(coarsened(fine, window, 10.0)[inner], scan.read(window)[inner])


def test_coarsening_removes_what_is_finer_than_a_pixel_of_the_scan(fine):
    window = Grid(0.0, 0.0, 2.0, 200, 200)
    sharp, blurred = fine.read(window).astype(float), coarsened(fine, window, 10.0).astype(float)
    assert blurred.mean() == pytest.approx(sharp.mean(), abs=1)
    steps = [np.abs(np.diff(image)).mean() for image in (sharp, blurred)]
    assert steps[1] < 0.1 * steps[0]
