"""Arrays of patch features: their place on the H&E, resampling in um, and refusals."""

import json

import numpy as np
import pytest
import zarr

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.histology.features import PatchArray, features_um_of, open_patches, resampled
from stsr.histology.image import Image


def affine(scale, degrees=0.0, x=0.0, y=0.0):
    turn = np.deg2rad(degrees)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    return np.array([[cos, -sin, x], [sin, cos, y], [0, 0, 1.0]])


def linear(height, width, patch_to_um):
    """(y, x, 2) values 3 x - y and x + 2 y of the patches' centres, um."""
    v, u = np.mgrid[:height, :width] + 0.5
    x, y = (row[0] * u + row[1] * v + row[2] for row in patch_to_um[:2])
    return np.stack([3 * x - y, x + 2 * y], -1)


@pytest.mark.parametrize("pixel_um", [10.0, 20.0, 50.0])
@pytest.mark.parametrize("degrees", [0.0, 90.0, 33.0])
def test_a_linear_field_is_exact(degrees, pixel_um):
    patch_to_um = affine(8.0, degrees, 400.0, 300.0)
    values = linear(60, 60, patch_to_um)
    x, y = (patch_to_um @ [30, 30, 1])[:2]
    grid = Grid(x - 71.0, y - 64.0, pixel_um, round(140 / pixel_um), round(120 / pixel_um))
    found = resampled(values.astype(np.float32), np.linalg.inv(patch_to_um), grid)
    own_x, own_y = grid.centres_um()
    wanted = np.stack([3 * own_x - own_y[:, None], own_x + 2 * own_y[:, None]], -1)
    assert np.allclose(found, wanted, atol=0.02)


def test_large_pixels_average_all_their_patches():
    values = np.zeros((8, 8, 1), np.float32)
    values[::2, ::2] = 4.0  # a checkered field with mean 1
    assert np.allclose(resampled(values, np.eye(3), Grid(0, 0, 4.0, 2, 2)), 1.0)


@pytest.mark.parametrize(
    ("spacing", "pixel"),
    [(7, 10), (8, 10), (10, 10), (16, 20), (20.06, 20), (32, 50), (100, 100), (112, 100)],
)
def test_pixels_are_the_nearest_size_that_is_not_finer(spacing, pixel):
    assert features_um_of(spacing) == pixel


@pytest.fixture
def image():
    """1200 x 800 px of 0.5 um, turned by 10 degrees."""
    return Image([np.zeros((3, 800, 1200), np.uint8)], affine(0.5, 10.0, 50.0, 20.0))


def written(folder, values, **attributes):
    path = folder / "a.npy"
    np.save(path, values)
    if attributes:
        path.with_suffix(".json").write_text(json.dumps(attributes))
    return path


def centre_um(patches, row, column):
    return (patches.patch_to_um @ [column + 0.5, row + 0.5, 1])[:2]


def test_an_array_covers_the_image_evenly(tmp_path, image):
    patches = open_patches(written(tmp_path, np.zeros((50, 75, 3), np.float16)), image)
    assert patches.spacing_um == pytest.approx(8.0) and patches.channels == 3
    assert np.allclose(centre_um(patches, 0, 0), (image.px_to_um @ [8, 8, 1])[:2])
    assert np.allclose(centre_um(patches, 49, 74), (image.px_to_um @ [1192, 792, 1])[:2])


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_attributes_place_an_array(tmp_path, image, kind):
    values, placed = np.zeros((10, 5, 4), np.float32), {"stride_px": [40, 100], "offset_px": [100, 250]}
    if kind == "npy":
        path = written(tmp_path, values, **placed)
    else:
        path = tmp_path / "a.zarr"
        array = zarr.create_array(path, data=values)
        array.attrs.update(placed)
    patches = open_patches(path, image)
    assert np.allclose(centre_um(patches, 0, 0), (image.px_to_um @ [250, 100, 1])[:2])
    assert np.allclose(centre_um(patches, 2, 3), (image.px_to_um @ [550, 180, 1])[:2])


def test_a_distance_in_um_places_an_array(tmp_path, image):
    patches = open_patches(written(tmp_path, np.zeros((20, 30, 2)), um_per_px=20), image)
    assert patches.spacing_um == pytest.approx(20)
    assert np.allclose(centre_um(patches, 0, 0), (image.px_to_um @ [20, 20, 1])[:2])


def test_only_the_window_is_read_and_the_rest_is_zero(tmp_path):
    class Counted:
        shape, dtype, most = (1000, 1000, 8), np.dtype("f4"), 0

        def __getitem__(self, window):
            shape = [part.stop - part.start for part in window]
            self.most = max(self.most, shape[0] * shape[1])
            return np.ones((*shape, 8), np.float32)

    values = Counted()
    patches = PatchArray("a", values, affine(8.0))
    assert (patches.read(Grid(4000.0, 4000.0, 10.0, 32, 32)) == 1).all()
    assert 0 < values.most < 60**2
    edge = patches.read(Grid(-160.0, 100.0, 10.0, 4, 32))
    assert (edge[..., :16] == 0).all() and (edge[..., 16:] == 1).all()
    assert (patches.read(Grid(-1000.0, 0.0, 10.0, 4, 4)) == 0).all()


@pytest.mark.parametrize(
    ("values", "attributes", "words"),
    [
        (np.zeros((50, 75)), {}, "axes (y, x, channels)"),
        (np.zeros((0, 75, 2)), {}, "axes (y, x, channels)"),
        (np.zeros((3, 50, 75)), {}, "cannot cover"),
        (np.zeros((75, 50, 3)), {}, "cannot cover"),
        (np.zeros((50, 75, 3)), {"stride_px": 32}, "reaches beyond"),
        (np.zeros((50, 75, 3)), {"stride_px": "x"}, "must be a number"),
        (np.zeros((50, 75, 3)), {"stride_px": 0}, "must be a number"),
        (np.zeros((50, 75, 3)), {"offset_px": 8}, "give both"),
    ],
)
def test_arrays_that_cannot_be_placed_are_refused(tmp_path, image, values, attributes, words):
    with pytest.raises(StsrError) as refused:
        open_patches(written(tmp_path, values, **attributes), image)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_patch_more_or_less_is_accepted(tmp_path, image):
    x0, y0, x1, y1 = image.bounds_um
    middle = Grid((x0 + x1) / 2 - 20, (y0 + y1) / 2 - 20, 10.0, 4, 4)
    for shape in ((49, 74, 2), (50, 74, 2), (49, 75, 2), (51, 75, 2)):
        patches = open_patches(written(tmp_path, np.ones(shape)), image)
        assert (patches.read(middle) == 1).all()
        last = centre_um(patches, shape[0] - 1, shape[1] - 1)
        assert image.contains(*last)  # all patches lie on the image


def test_nan_is_refused_with_its_place(tmp_path, image):
    values = np.zeros((50, 75, 3), np.float32)
    values[20, 30, 1] = np.nan
    patches = open_patches(written(tmp_path, values), image)
    x, y = centre_um(patches, 20, 30)
    assert patches.read(Grid(x + 100, y, 10.0, 4, 4)).shape == (3, 4, 4)  # far from it
    with pytest.raises(StsrError, match=r"\(20, 30\); write 0"):
        patches.read(Grid(x - 20, y - 20, 10.0, 4, 4))


def test_files_that_are_no_arrays_are_refused(tmp_path, image):
    path = written(tmp_path, np.zeros((50, 75, 3)))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StsrError, match="damaged or cut short"):
        open_patches(path, image)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(StsrError, match="damaged"):
        open_patches(path, image)
    zarr.create_group(tmp_path / "g.zarr")
    with pytest.raises(UsageError, match="zarr group"):
        open_patches(tmp_path / "g.zarr", image)
