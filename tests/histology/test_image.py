"""H&E in um: exact on ramps, grey on checkerboards, right to a hundredth of a pixel."""

import numpy as np
import pytest

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.histology.image import Image


def affine(angle: float, scale: float, mirrored: bool, shift=(0.0, 0.0), shear: float = 0.0) -> np.ndarray:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([-scale if mirrored else scale, scale])
    return np.block([[linear, np.array(shift)[:, None]], [np.zeros(2), np.ones(1)]])


def ramp(height: int, width: int, per_px: float) -> np.ndarray:
    """(3, y, x) float in 0..255: red rises with x, green with y, at pixel centres; blue is flat."""
    x = (np.arange(width) + 0.5) * per_px
    y = (np.arange(height) + 0.5) * per_px
    planes = [np.tile(x, (height, 1)), np.tile(y[:, None], (1, width)), np.full((height, width), 200.0)]
    return np.stack(planes)


def expected(image: Image, grid: Grid, per_px: float) -> np.ndarray:
    """(2, h, w): what a ramp is at the bin centres."""
    x, y = np.meshgrid(*grid.centres_um())
    points = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    return (np.linalg.inv(image.px_to_um) @ points)[:2].reshape(2, *grid.shape) * per_px


def inner(image: Image, grid: Grid, px: int) -> np.ndarray:
    """Bins whose surroundings of ``px`` pixels lie in the image."""
    u, v = expected(image, grid, 1.0)
    return (u > px) & (v > px) & (u < image.width - px) & (v < image.height - px)


@pytest.mark.parametrize("angle", [0.0, np.pi / 2, 0.3, -2.1])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("bin_um", [0.7, 2.0, 5.0, 7.3, 10.0])
def test_ramp_is_exact_under_any_affine(angle, mirrored, bin_um):
    per_px = 1.25
    image = Image([ramp(200, 160, per_px)], affine(angle, 2.0, mirrored, (1000.0, -300.0), shear=0.05))
    x0, y0, x1, y1 = image.bounds_um
    grid = Grid(x0 - 20, y0 - 20, bin_um, int((y1 - y0 + 40) / bin_um), int((x1 - x0 + 40) / bin_um))
    rgb = image.read(grid).astype(float)
    inside = inner(image, grid, px=8 + int(bin_um))
    assert inside.sum() > 50
    error = np.abs(rgb[:2] - expected(image, grid, per_px))[:, inside]
    assert error.max() <= 0.5 + 1e-3  # only rounding to 8 bits
    assert (rgb[2][image.covered(grid)] == 200).all()


def test_half_pixel_convention():
    """A steep ramp reveals a shift of a hundredth of a pixel: 16 levels of 8 bit per pixel, over many bins."""
    image = Image([ramp(12, 12, 16.0)], affine(0.4, 1.0, True, (50.0, 20.0)))
    x0, y0, x1, y1 = image.bounds_um
    grid = Grid(x0, y0, 0.05, int((y1 - y0) / 0.05), int((x1 - x0) / 0.05))
    rgb = image.read(grid).astype(float)
    inside = inner(image, grid, px=1)
    bias = (rgb[:2] - expected(image, grid, 16.0))[:, inside].mean(1)
    assert np.abs(bias).max() / 16.0 < 0.01


@pytest.mark.parametrize("angle", [0.0, 0.3])
@pytest.mark.parametrize("bin_um", [2.0, 5.0, 10.0])
def test_checkerboard_is_grey(angle, bin_um):
    board = (np.indices((800, 800)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image([np.stack([board] * 3)], affine(angle, 0.5, False, (100.0, 0.0)))
    centre = (image.px_to_um @ [400, 400, 1])[:2]
    grid = Grid(centre[0] - 100, centre[1] - 100, bin_um, int(200 / bin_um), int(200 / bin_um))
    assert np.abs(image.read(grid)[:, image.covered(grid)].astype(int) - 127.5).max() < 8


def test_whole_pixels_per_bin_are_plain_means():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 600, 500), dtype=np.uint8)
    image = Image([pixels], np.diag([0.5, 0.5, 1.0]))
    got = image.read(Grid(50, 100, 10, 12, 10))
    want = pixels[:, 200:440, 100:300].reshape(3, 12, 20, 10, 20).mean((2, 4))
    assert np.abs(got - want).max() <= 0.5 + 1e-3


def test_blocks_do_not_show(monkeypatch):
    from stsr.histology import image as module

    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (3, 300, 300), dtype=np.uint8)
    image = Image([pixels], affine(0.7, 1.3, True, (10.0, 10.0)))
    x0, y0, x1, y1 = image.bounds_um
    grid = Grid(x0, y0, 3.1, int((y1 - y0) / 3.1), int((x1 - x0) / 3.1))
    whole = image.read(grid)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 6000)
    assert np.array_equal(image.read(grid), whole)


def test_pyramid_agrees_with_full_resolution():
    smooth = ramp(512, 512, 0.4)
    levels = [
        smooth,
        smooth.reshape(3, 256, 2, 256, 2).mean((2, 4)),
        smooth.reshape(3, 64, 8, 64, 8).mean((2, 4)),
    ]
    px_to_um = affine(0.2, 0.5, False, (5.0, 7.0))
    grid = Grid(20, 90, 4.0, 20, 20)
    a, b = Image(levels, px_to_um).read(grid), Image(levels[:1], px_to_um).read(grid)
    assert np.abs(a.astype(int) - b).max() <= 1


def test_only_the_window_is_read():
    class Spy:
        shape, dtype, biggest = (3, 100_000, 100_000), np.dtype(np.uint8), 0

        def __getitem__(self, index):
            sizes = [len(range(*part.indices(size))) for part, size in zip(index, self.shape, strict=True)]
            self.biggest = max(self.biggest, int(np.prod(sizes)))
            return np.zeros(sizes, np.uint8)

    spy = Spy()
    rgb = Image([spy], affine(0.6, 0.5, False)).read(Grid(3000, 20000, 10.0, 300, 300))
    assert rgb.shape == (3, 300, 300)
    assert spy.biggest < 64 * 2**20


def test_outside_is_fill_and_not_covered():
    image = Image([np.full((3, 10, 10), 7, np.uint8)], np.diag([10.0, 10.0, 1.0]))
    grid = Grid(-50, -50, 10, 20, 20)
    rgb, covered = image.read(grid), image.covered(grid)
    assert covered.sum() == 100 and covered[5:15, 5:15].all()
    assert (rgb[:, covered] == 7).all() and (rgb[:, ~covered] == 255).all()
    assert (image.read(Grid(5000, 5000, 10, 3, 3)) == 255).all()


@pytest.mark.parametrize("shape", [(4, 40, 30), (1, 40, 30)])
def test_other_numbers_of_channels(shape):
    image = Image([np.full(shape, 40, np.uint8)], np.eye(3))
    assert (image.height, image.width) == (40, 30)
    assert (image.read(Grid(0, 0, 1, 40, 30)) == 40).all()


def test_sixteen_bits_and_unit_floats_become_eight():
    grid = Grid(0, 0, 1, 4, 4)
    assert (Image([np.full((3, 4, 4), 65535, np.uint16)], np.eye(3)).read(grid) == 255).all()
    assert (Image([np.full((3, 4, 4), 0.5, np.float32)], np.eye(3)).read(grid) == 128).all()


def test_um_per_px_of_a_sheared_mirror():
    image = Image([np.zeros((3, 5, 5), np.uint8)], affine(1.0, 0.25, True, shear=0.4))
    assert image.um_per_px == pytest.approx(0.25)


def test_flat_affine_is_refused():
    with pytest.raises(StsrError, match="alignment"):
        Image([np.zeros((3, 5, 5), np.uint8)], np.diag([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("angle", [0.0, np.pi / 2, 0.02])
@pytest.mark.parametrize(
    ("um_per_px", "bin_um"), [(0.5, 0.5), (2.0, 0.5), (2.0, 2.0), (0.5, 4.0), (1.7, 10.0)]
)
def test_a_window_is_a_crop_of_the_whole(angle, um_per_px, bin_um):
    pixels = np.random.default_rng(2).integers(0, 256, (3, 450, 400), dtype=np.uint8)
    image = Image([pixels], affine(angle, um_per_px, True, (30.0, -20.0)))
    x0, y0, x1, y1 = image.bounds_um
    grid = Grid(x0, y0, bin_um, int((y1 - y0) / bin_um), int((x1 - x0) / bin_um))
    whole, (height, width) = image.read(grid), grid.shape
    for row, column in ((0, 0), (height // 3, width // 5), (height - 20, width - 30)):
        part = image.read(grid.window(row, column, 20, 30))
        assert np.array_equal(part, whole[:, row : row + 20, column : column + 30])


@pytest.mark.parametrize("turn", [0.0, np.pi / 2, np.pi, -np.pi / 2])
@pytest.mark.parametrize("mirrored", [False, True])
def test_straight_images_are_read_as_slightly_turned_ones(turn, mirrored):
    """The quick ways for straight images give what the general way gives."""
    pixels = np.random.default_rng(3).integers(0, 256, (3, 60, 50), dtype=np.uint8)
    straight = affine(turn, 2.0, mirrored, (7.0, 3.0))
    nearly = straight + np.array([[3e-5, 3e-5, 0], [3e-5, 3e-5, 0], [0, 0, 0]])
    x0, y0, *_ = Image([pixels], straight).bounds_um
    for bin_um, shift in ((2.0, 0.0), (2.0, 0.6), (0.7, 0.1)):
        grid = Grid(x0 + 20 + shift, y0 + 20, bin_um, int(60 / bin_um), int(40 / bin_um))
        a, b = (Image([pixels], px_to_um).read(grid).astype(int) for px_to_um in (straight, nearly))
        assert np.abs(a - b).max() <= 2 and a.std() > 20
