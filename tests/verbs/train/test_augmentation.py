"""What augmentation does to the image of a tile."""

import numpy as np
import pytest

from stsr.geometry.grid import Grid
from stsr.histology.image import Image, scaling
from stsr.verbs.train.augmentation import Stain, coarsened, drawn_stain, stained


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


GREYS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)


def tissue(seed=0):
    """Pixels (3, 40, 40) of random amounts of haematoxylin and eosin."""
    amounts = np.random.default_rng(seed).gamma(2, 0.2, (2, 40, 40))
    density = np.einsum("sc,syx->cyx", [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], amounts)
    return np.rint(255 * np.exp(-density)).astype(np.uint8)


def hues(image):
    """Optical density (3,) of the mean pixel, with length 1."""
    density = -np.log(np.maximum(image, 1) / 255.0).mean((1, 2))
    return density / np.linalg.norm(density)


def test_a_stain_without_change_changes_nothing():
    same = Stain(np.eye(3), np.zeros(3))
    assert np.array_equal(stained(GREYS, same)[:, GREYS[0] > 0], GREYS[:, GREYS[0] > 0])
    assert np.array_equal(stained(tissue(), same), tissue()) and stained(GREYS, None) is GREYS


def test_optical_density_is_mixed():
    image = np.full((3, 2, 2), 255, np.uint8)
    image[0] = 128
    mixing = np.array([[2.0, 0, 0], [0.5, 1, 0], [0, 0, 1]])
    made = stained(image, Stain(mixing, np.array([0, 0, 0.1])))[:, 0, 0]
    part = 128 / 255
    assert made.tolist() == [round(255 * part**2), round(255 * part**0.5), round(255 * np.exp(-0.1))]


def test_drawn_stains_keep_white_but_for_the_background_and_change_hue_and_amount():
    rng = np.random.default_rng(0)
    white, image = np.full((3, 1, 1), 255, np.uint8), tissue()
    eosin = np.rint(255 * np.exp(-0.6 * np.array([0.07, 0.99, 0.11])))[:, None, None].astype(np.uint8)
    turns, depths, glass, hue = [], [], [], []
    for _ in range(60):
        stain = drawn_stain(0.25, rng)
        assert (stained(white, Stain(stain.mixing, np.zeros(3))) == 255).all()
        glass.append(stained(white, stain).min())
        made = stained(image, Stain(stain.mixing, np.zeros(3)))
        changed = stained(eosin, Stain(stain.mixing, np.zeros(3)))
        hue.append(np.degrees(np.arccos(min(1, hues(eosin) @ hues(changed)))))
        turns.append(np.degrees(np.arccos(min(1, hues(image) @ hues(made)))))
        depths.append(np.log(255 / made.mean()) / np.log(255 / image.mean()))
    assert 235 < min(glass) < 250
    assert 2 < np.median(hue) < 8 and max(hue) < 15
    assert 1 < np.median(turns) < 8 and max(turns) < 20  # degrees: another hue, but no false colour
    assert min(depths) < 0.8 and max(depths) > 1.25 and max(depths) < 2.5


def test_the_strength_scales_the_change():
    def change(strength):
        rng = np.random.default_rng(3)
        made = [stained(tissue(), drawn_stain(strength, rng)).astype(float) for _ in range(20)]
        return np.mean([np.abs(one - tissue()).mean() for one in made])

    assert change(0.05) < 0.3 * change(0.25) and change(1e-9) < 0.01
