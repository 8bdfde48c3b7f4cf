import numpy as np
import pytest
from scipy import ndimage

from stsr.geometry.grid import Grid
from stsr.histology.image import Image
from stsr.verbs.prepare.registration import refine

GRID = Grid(0, 0, 10, 200, 200)


@pytest.fixture(scope="module")
def tissue():
    """Nuclei as points: counts per bin, and an H&E of the same points at 5 um/px."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, 2000, (4000, 2))
    spread = np.repeat(centres, 40, 0) + rng.normal(0, 4, (160_000, 2))
    counts = np.histogram2d(spread[:, 1], spread[:, 0], bins=200, range=[[0, 2000]] * 2)[0]
    nuclei = np.histogram2d(centres[:, 1], centres[:, 0], bins=400, range=[[0, 2000]] * 2)[0]
    dark = np.clip(ndimage.gaussian_filter(nuclei, 1.0) * 4, 0, 1)
    image = (255 - 180 * dark + rng.normal(0, 8, dark.shape)).clip(0, 255).astype(np.uint8)
    return counts, np.repeat(image[None], 3, 0)


def corners_error(px_to_um):
    corners = np.array([[40, 360, 40, 360], [40, 40, 360, 360], [1, 1, 1, 1.0]])
    return np.linalg.norm(((px_to_um - np.diag([5, 5, 1.0])) @ corners)[:2], axis=0).max()


def test_a_slightly_wrong_alignment_is_put_right(tissue):
    counts, image = tissue
    wrong = np.array([[5.06, 0.05, -22.0], [-0.04, 4.96, 28.0], [0, 0, 1.0]])
    found = refine(Image([image], wrong), counts, GRID)
    assert found.applied and found.correlation_after > found.correlation_before + 0.2
    assert corners_error(wrong) > 20
    assert corners_error(found.px_to_um) < 2.5
    assert 15 < found.shift_um < 45


def test_a_right_alignment_stays(tissue):
    counts, image = tissue
    found = refine(Image([image], np.diag([5, 5, 1.0])), counts, GRID)
    assert not found.applied
    np.testing.assert_array_equal(found.px_to_um, np.diag([5, 5, 1.0]))


def test_an_image_of_something_else_moves_nothing(tissue):
    counts, image = tissue
    other = np.random.default_rng(1).permuted(image.reshape(3, -1), axis=1).reshape(image.shape)
    found = refine(Image([other], np.diag([5, 5, 1.0])), counts, GRID)
    assert not found.applied
