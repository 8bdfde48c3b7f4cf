"""Figures: one scale, dark where a gene is absent, and a file that shows it."""

import numpy as np
import pytest
import scipy.sparse as sp
import shapely
from PIL import Image as Pillow

from stsr import figures
from stsr.errors import UsageError
from stsr.geometry.grid import Grid


class _Map:
    def __init__(self, grid, genes, values):
        self.grid, self.genes, self._values = grid, genes, values

    def read(self, genes):
        return self._values[[self.genes.index(gene) for gene in genes]]


class Histology:
    um_per_px = 2.0

    def read(self, grid):
        return np.full((3, *grid.shape), 200, np.uint8)


class _Spots:
    shape, size_um = "disc", 55.0

    def __init__(self, centres_um, counts):
        self.centres_um, self._counts = centres_um, sp.csr_matrix(counts)

    def select(self, genes):
        return self._counts


class _Section:
    name, provenance = "sample", {"superres_x10": {"method": "bicubic", "samples": 1}}

    def __init__(self, values, spots=None, genes=("GATA3",)):
        grid = Grid(0, 0, 10, *values.shape[1:])
        self.image, self.spots, self.hr = Histology(), spots, None
        self._map = _Map(grid, list(genes), values)

    def map(self, element):
        return self._map


@pytest.fixture
def spots():
    x, y = np.meshgrid([50.0, 150.0], [50.0, 150.0])
    return _Spots(np.column_stack([x.ravel(), y.ravel()]), np.array([[0.0], [0], [24], [48]]))


def test_a_figure_is_written_without_global_state(tmp_path, spots):
    import matplotlib

    before = matplotlib.rcParams["font.size"]
    path = figures.superres_figure(
        _Section(np.ones((1, 20, 20)), spots), "superres_x10", ["GATA3"], tmp_path / "f.png"
    )
    pixels = np.asarray(Pillow.open(path).convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.shape[1] > 900
    assert matplotlib.rcParams["font.size"] == before
    import sys

    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_spots_and_bins_share_one_unit(spots):
    """A uniform density of 2 counts per bin of 10 um is the same colour in a spot of 55 um."""
    density = 2.0
    spots._counts = sp.csr_matrix(np.full((4, 1), density * np.pi * 55**2 / 4 / 100))
    section = _Section(np.full((1, 20, 20), density), spots)
    panels = figures._panels(section, section.map(""), "superres_x10", truth=False)
    of_spots, of_bins = panels[1].values("GATA3"), panels[2].values("GATA3")
    assert of_spots == pytest.approx(np.full(4, density))
    assert of_bins == pytest.approx(np.full((20, 20), density))


def test_an_absent_gene_stays_dark():
    noise = np.random.default_rng(0).random((1, 20, 20)) * 1e-3
    assert figures.scale_top([noise], 0.05) == 0.05
    assert figures.scale_top([noise * 1e4, np.zeros(0)], 0.05) == pytest.approx(10, rel=0.02)


def test_a_dark_panel_is_dark_on_the_page(tmp_path, spots):
    spots._counts = sp.csr_matrix(np.zeros((4, 1)))
    section = _Section(np.full((1, 20, 20), 1e-3), spots)
    section.image = None
    path = figures.superres_figure(section, "superres_x10", ["GATA3"], tmp_path / "f.png")
    pixels = np.asarray(Pillow.open(path).convert("L")).astype(int)
    height, width = pixels.shape
    middle_of_map = pixels[height // 2 - 20 : height // 2 + 20, int(width * 0.62) : int(width * 0.7)]
    assert middle_of_map.max() < 20


def test_fine_maps_are_added_up_not_thinned_out(spots):
    values = np.random.default_rng(0).poisson(1.0, (1, 2500, 30)).astype(float)
    section = _Section(values, None)
    panel = figures._panels(section, section.map(""), "superres_x10", truth=False)[-1]
    drawn = panel.values("GATA3")
    assert max(drawn.shape) <= 1200
    assert drawn.sum() * panel._factor**2 == pytest.approx(values.sum())


@pytest.mark.parametrize(("about", "length"), [(280, 200), (560, 500), (100, 100), (99, 50), (1.3, 1)])
def test_scale_bars_have_round_lengths(about, length):
    assert figures.round_length(about) == length


def test_polygons_are_drawn_ring_by_ring():
    pieces = shapely.union_all([shapely.box(0, 0, 1, 1), shapely.box(5, 0, 6, 2)])
    ring = shapely.box(0, 0, 9, 9).difference(shapely.box(1, 1, 2, 2))
    rings, owner = figures.rings_of(np.array([ring, pieces]))
    assert owner.tolist() == [0, 1, 1]
    assert [shapely.Polygon(each).area for each in rings] == [81, *(part.area for part in pieces.geoms)]
    assert figures.rings_of(np.zeros(0, object))[0] == []


def test_a_colour_bar_tells_its_unit():
    from matplotlib.cm import ScalarMappable

    grid = Grid(100, 50, 10, 20, 30)
    with figures.style():
        figure, axes = figures.canvas(1, 2, grid)
        figures.frame(axes[0][1], grid)
        figures.colour_bar(axes[0][1], ScalarMappable())
    assert axes[0][1].get_xlim() == (100, 400) and axes[0][1].get_ylim() == (250, 50)
    assert figure.axes[-1].get_ylabel() == "counts / 100 µm²"


def test_what_cannot_be_drawn_is_refused(tmp_path):
    section = _Section(np.ones((1, 20, 20)))
    with pytest.raises(UsageError, match=r"\.png"):
        figures.superres_figure(section, "superres_x10", ["GATA3"], tmp_path / "figure.bmp3")
    with pytest.raises(UsageError, match="at least one gene"):
        figures.superres_figure(section, "superres_x10", [], tmp_path / "f.png")
