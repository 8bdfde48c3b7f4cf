"""All layers of a section lie on one raster, and its support is where a map may be believed."""

import gzip

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from stsr.geometry.lattice import grid_around
from stsr.histology.tissue import supported
from stsr.simulate import render_he, simulate_tissue, write_visium, write_xenium
from stsr.store import discovery
from stsr.store.parts import Mask
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare


@pytest.fixture(scope="module")
def tissue():
    return simulate_tissue(500, 400, seed=2)


@pytest.fixture(scope="module")
def sections(tissue, tmp_path_factory):
    """A section of each platform, by name."""
    folder = tmp_path_factory.mktemp("raster")
    write_visium(tissue, folder / "visium", image_um_per_px=1.0)
    _crop(folder / "visium")
    _legacy(folder / "legacy")
    write_xenium(tissue, folder / "xenium", image_um_per_px=2.0, labels=False)
    names = ("visium", "legacy", "xenium")
    return {name: open_section(prepare(folder / name, folder / f"{name}.zarr")) for name in names}


def _crop(folder):
    """Cut the image a little beyond the last spot's centre, so that half of the spot lies outside."""
    lines = (folder / "spatial" / "tissue_positions.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    last = max(int(row[5]) for row in rows if row[1] == "1")
    rgb = tifffile.imread(folder / "he_fullres.tif")
    tifffile.imwrite(folder / "he_fullres.tif", rgb[:, : last + 3], photometric="rgb")


def _legacy(folder):
    """First-generation ST: spots of 100 um every 200 um, at 5 um per pixel."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(2, 8), np.arange(3, 9)))
    spots = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    spots += [f"{i}\t{j}\t{i}\t{j}\t{40 * i + 3}\t{40 * j + 5}\t1" for i, j in zip(x, y, strict=True)]
    (folder / "spots.tsv").write_text("\n".join(spots))
    counts = ["\tA\tB\tC"]
    counts += ["\t".join([f"{i}x{j}", *map(str, rng.poisson(30, 3))]) for i, j in zip(x, y, strict=True)]
    with gzip.open(folder / "counts.tsv.gz", "wt") as file:
        file.write("\n".join(counts))
    pixels = rng.integers(0, 255, (500, 400, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(folder / "image.png")


def _stored_support(section):
    to_um = discovery.affine(section.sdata.labels["support"], "global")
    return Mask(section.arrays("labels", "support")[0], to_um)


@pytest.mark.parametrize("name", ["visium", "legacy", "xenium"])
def test_tissue_and_support_lie_on_the_raster_of_maps(sections, name):
    section = sections[name]
    assert section.tissue.grid == section.grid(10)
    assert _stored_support(section).grid == section.grid(10)
    if section.hr is None:
        assert section.grid(10) == grid_around(section.spots.centres_um, section.spots.size_um, 10)
    else:
        assert section.hr.grid == section.grid(10)


@pytest.mark.parametrize("name", ["visium", "legacy", "xenium"])
def test_support_is_what_the_sections_parts_say(sections, name):
    section = sections[name]
    grid, stored = section.grid(10), _stored_support(section).read(section.grid(10))
    centres_um = section.spots.centres_um
    assert np.array_equal(stored, supported(grid, section.image, section.tissue.read, centres_um))
    assert np.array_equal(stored, section.support(grid))
    assert stored.any() and not stored[~section.tissue.read(grid)].any()
    window = grid.window(3, 5, 20, 10)
    assert np.array_equal(section.support(window), stored[3:23, 5:15])
    blocks = stored.reshape(grid.height // 2, 2, grid.width // 2, 2).sum((1, 3))
    assert np.array_equal(section.support(section.grid(20)), blocks >= 2)
    made = section.provenance["support"]
    assert made["origin"] == "derived" and made["units"] == "1 where a map may be believed"
    assert made["command"] == "prepare" and made["platform"] == section.provenance["tissue"]["platform"]


def test_support_ends_with_the_image(sections):
    section = sections["visium"]
    grid = section.grid(10)
    covered, support = section.image.covered(grid), section.support(grid)
    assert section.tissue.read(grid)[~covered].any()
    assert not support[~covered].any()


def test_the_stored_support_is_read(sections, monkeypatch):
    section = sections["visium"]
    monkeypatch.setattr("stsr.store.section.supported", lambda grid, *_: np.zeros(grid.shape, bool))
    assert section.support(section.grid(10)).any()
    half = section.grid(10).window(0, 0, 4, 4).at(5)  # bins of another size are computed
    assert not section.support(half).any()


@pytest.mark.filterwarnings("ignore")
def test_an_image_alone_has_one_raster_too(tissue, tmp_path):
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    rgb = render_he(tissue, 2.0)[:, :-7]  # 243 px: not a multiple of the 100 um of the raster
    image = Image2DModel.parse(rgb, dims=("y", "x", "c"))
    SpatialData.init_from_elements({"slide": image}).write(tmp_path / "image.zarr")
    section = open_section(prepare(tmp_path / "image.zarr", tmp_path / "s.zarr", um_per_px=2.0))
    assert set(section.elements) == {"he", "tissue", "support"}
    grid = section.grid(10)
    assert section.tissue.grid == _stored_support(section).grid == grid and grid.shape == (40, 50)
    support = section.support(grid)
    assert support.any() and not support[~section.image.covered(grid)].any()
    assert np.array_equal(support, section.tissue.read(grid) & section.image.covered(grid))


def test_coarse_bins_have_a_support_too(tissue, tmp_path):
    write_visium(tissue, tmp_path / "run", image_um_per_px=2.0)
    section = open_section(prepare(tmp_path / "run", tmp_path / "s.zarr", bin_um=20))
    grid = section.grid(20)
    assert _stored_support(section).grid == section.tissue.grid == grid
    expected = supported(grid, section.image, section.tissue.read, section.spots.centres_um)
    assert np.array_equal(section.support(grid), expected)
