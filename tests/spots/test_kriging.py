import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stsr.geometry.grid import Grid
from stsr.geometry.lattice import hexagonal_lattice
from stsr.geometry.measurement import Measurement
from stsr.metrics import pearson
from stsr.platforms.source import Options
from stsr.platforms.visium import read
from stsr.spots import kriging as module
from stsr.spots.denoising import denoise
from stsr.spots.kriging import SPOT_AREA_UM2, Kriging, choose, krige

SIDE_UM = 1600.0
CENTRES = hexagonal_lattice((0, 0, SIDE_UM, SIDE_UM))  # 272 spots


def _field(points, length_um, genes=12, spread=0.8, seed=0):
    """Expected counts per spot (p, g) of smooth fields with waves about six lengths long."""
    rng = np.random.default_rng(seed)
    waves = rng.standard_normal((30, genes, 2)) / length_um
    phase = rng.uniform(0, 2 * np.pi, (30, genes))
    z = np.cos(np.einsum("pc,kgc->pkg", points, waves) + phase).sum(1) * np.sqrt(2 / 30)
    return 6 * np.exp(spread * z)


def _dense(centres, points, length, nugget):
    """Weights (p, n) of ordinary kriging, from the textbook's bordered system."""

    def covariance(a, b):
        d = np.sqrt(3) * np.linalg.norm(a[:, None] - b[None], axis=-1) / length
        return (1 + d) * np.exp(-d)

    n = len(centres)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = covariance(centres, centres) + nugget * np.eye(n)
    system[n, n] = 0
    right = np.vstack([covariance(centres, points), np.ones(len(points))])
    weights = np.linalg.solve(system, right)[:n].T
    missing = 1 - np.einsum("pi,ij,pj->p", weights, system[:n, :n], weights)
    return weights, missing


@pytest.fixture
def ten():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 400, (10, 2)), rng.uniform(0, 400, (7, 2))


@pytest.mark.parametrize(("length", "nugget"), [(150.0, 0.02), (60.0, 0.5)])
def test_weights_solve_the_bordered_system(ten, length, nugget):
    centres, points = ten
    made = Kriging(centres, length, nugget).weights(points)
    weights, missing = _dense(centres, points, length, nugget)
    np.testing.assert_allclose(made.matrix.toarray(), weights, atol=1e-6)
    np.testing.assert_allclose(made.missing[:, 0], np.maximum(missing, 0), atol=1e-6)


def test_left_out_spots_have_no_weight(ten):
    centres, _ = ten
    made = Kriging(centres, 150.0, 0.02).weights_left_out(np.array([4, 0])).matrix.toarray()
    for row, spot in enumerate([4, 0]):
        others = np.delete(np.arange(10), spot)
        weights, _ = _dense(centres[others], centres[[spot]], 150.0, 0.02)
        assert made[row, spot] == 0
        np.testing.assert_allclose(made[row, others], weights[0], atol=1e-6)


def test_local_neighbours_suffice(monkeypatch):
    centres = hexagonal_lattice((0, 0, 1000, 1000))
    points = np.random.default_rng(1).uniform(150, 850, (100, 2))
    expected = _field(centres, 200.0)
    local = krige(Kriging(centres, 150.0, 0.02), expected)
    local = local.predict(local.kriging.weights(points))
    monkeypatch.setattr(module, "_NEIGHBOURS", len(centres))
    whole = krige(Kriging(centres, 150.0, 0.02), expected)
    assert whole.kriging.weights(points).matrix.nnz == 100 * len(centres)
    np.testing.assert_allclose(local, whole.predict(whole.kriging.weights(points)), rtol=0.04)


def test_maps_are_continuous_where_neighbours_change():
    """Long lengths and large nuggets average over all neighbours, so that one of them more or less is seen."""
    x = np.arange(600.0, 900, 0.5)
    points = np.stack([x, np.full_like(x, 733.0)], -1)
    kriging = Kriging(CENTRES, 600.0, 0.5)
    steps = np.abs(np.diff(kriging.weights(points).matrix.toarray(), axis=0)).max(1)
    assert len(np.unique(kriging._tree.query(points, k=24)[1])) > 35  # they do change
    assert steps.max() < 0.002


def test_without_a_nugget_maps_pass_through_the_spots():
    expected = _field(CENTRES, 150.0)
    made = krige(Kriging(CENTRES, 150.0, 0.0), expected)
    log = made.kriging.weights(CENTRES).matrix @ made.log_density
    np.testing.assert_allclose(log, made.log_density, atol=1e-4)
    smooth = krige(Kriging(CENTRES, 150.0, 0.5), expected)
    log = smooth.kriging.weights(CENTRES).matrix @ smooth.log_density
    assert np.abs(log - smooth.log_density).mean() > 0.05


def _errors(counts_of, length=220.0):
    """Mean squared errors of a window's maps: of kriging, of the nearest spot, of bilinear interpolation."""
    import torch

    grid = Grid(400, 400, 20.0, 40, 40)
    x, y = grid.centres_um()
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    truth = _field(points, length).T.reshape(-1, *grid.shape) * grid.bin_um**2 / SPOT_AREA_UM2
    expected = counts_of(_field(CENTRES, length))
    kriged = krige(Kriging(CENTRES, 300.0, 0.02), expected).maps(grid)
    measurement = Measurement.discs(grid, CENTRES)
    nearest = expected[measurement.nearest].transpose(2, 0, 1) * grid.bin_um**2 / SPOT_AREA_UM2
    lr, _ = measurement.raster(expected)
    bilinear = torch.nn.functional.interpolate(torch.from_numpy(lr)[None], scale_factor=5, mode="bilinear")
    inner = (slice(None), slice(10, 30), slice(10, 30))
    maps = (kriged, nearest, bilinear[0].numpy() / 25)
    return [np.square(values[inner] / truth.mean() - truth[inner] / truth.mean()).mean() for values in maps]


def test_kriging_is_nearer_the_truth_than_the_nearest_spot_and_bilinear():
    kriged, nearest, bilinear = _errors(lambda rates: rates)
    assert 2 * kriged < bilinear < nearest
    noise = np.random.default_rng(0)
    kriged, nearest, bilinear = _errors(lambda rates: rates * noise.lognormal(0, 0.1, rates.shape))
    assert 1.2 * kriged < bilinear < nearest


def test_maps_add_up_to_the_spots_and_between_them():
    """Rough fields, of which averages of logarithms fall short."""
    grid = Grid(0, 0, 10.0, 160, 160)
    x, y = grid.centres_um()
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    expected, truth = _field(CENTRES, 60.0, spread=1.2), _field(points, 60.0, spread=1.2)
    made = krige(Kriging(CENTRES, 100.0, 0.1), expected)
    maps = made.maps(grid)
    seen = Measurement.discs(grid, CENTRES).add_up(maps)  # (spots, g)
    np.testing.assert_allclose(seen.sum(0), expected.sum(0), rtol=0.01)
    np.testing.assert_allclose(made.left_out().sum(0), expected.sum(0), rtol=0.03)
    ratio = maps.reshape(len(maps), -1).sum(1) * SPOT_AREA_UM2 / 100 / truth.sum(0)
    assert abs(np.log(ratio)).mean() < 0.08 and abs(np.log(ratio).mean()) < 0.03
    plain = np.exp(made.kriging.weights_left_out().matrix @ made.log_density).sum(0)
    assert (plain < 0.95 * expected.sum(0)).mean() > 0.7  # what the sill puts right


def test_windows_and_blocks_of_genes_agree(monkeypatch):
    made = krige(Kriging(CENTRES, 150.0, 0.02), _field(CENTRES, 150.0))
    grid = Grid(0, 0, 20.0, 80, 80)
    whole = made.maps(grid)
    assert whole.dtype == np.float32 and whole.shape == (12, 80, 80)
    window = grid.window(30, 10, 20, 25)
    monkeypatch.setattr(module, "_VALUES", 3 * 500)
    monkeypatch.setattr(module, "_POINTS", 77)
    part = made.maps(window, np.array([7, 2, 1, 0]), made.kriging.weights_on(window))
    np.testing.assert_allclose(part, whole[[7, 2, 1, 0], 30:50, 10:35], rtol=1e-4)
    blocks = krige(Kriging(CENTRES, 150.0, 0.02), _field(CENTRES, 150.0))
    np.testing.assert_allclose(blocks.scale, made.scale, rtol=1e-4)
    np.testing.assert_allclose(blocks.sill, made.sill, rtol=1e-3)


def test_smoother_fields_take_longer_lengths_and_noise_a_larger_nugget():
    rng = np.random.default_rng(0)
    centres = hexagonal_lattice((0, 0, 1100, 1100))
    chosen = []
    for length, noise in ((60.0, 0.0), (500.0, 0.0), (150.0, 0.6)):
        rates = 5 * _field(centres, length, genes=40)
        counts = rng.poisson(rates).astype(float)
        expected = rates * rng.lognormal(0, noise, rates.shape) if noise else rates
        chosen.append(choose(sp.csr_matrix(counts), expected, centres))
    rough, smooth, noisy = chosen
    assert rough.length_um < smooth.length_um
    assert noisy.nugget > max(rough.nugget, smooth.nugget)
    double = choose(counts, expected, 2 * centres)  # a coarser lattice, and dense counts
    assert double.length_um == pytest.approx(2 * noisy.length_um) and double.nugget == noisy.nugget


def test_the_choice_can_be_made_on_some_spots(monkeypatch):
    rates = 5 * _field(CENTRES, 500.0, genes=40)
    counts = np.random.default_rng(0).poisson(rates).astype(float)
    monkeypatch.setattr(module, "_CHOICE_SPOTS", 60)
    monkeypatch.setattr(module, "_CHOICE_GENES", 15)
    assert choose(counts, rates, CENTRES).length_um > 200


def test_too_little_to_choose_from_gives_the_defaults():
    counts = np.ones((9, 3))
    assert choose(counts, counts, CENTRES[:9]).length_um == pytest.approx(150)
    none = np.zeros((50, 3))
    assert choose(none, none, CENTRES[:50]).nugget == 0.02
    assert choose(np.ones((40, 1)), np.ones((40, 1)), CENTRES[:40]).length_um > 0


@pytest.mark.parametrize("count", [1, 2, 10])
def test_few_spots_make_finite_maps(count):
    rng = np.random.default_rng(0)
    centres = CENTRES[:count].copy()
    expected = rng.gamma(0.5, 4, (count, 3))
    expected[:, 1] = 0  # a gene without counts
    expected[count // 2] = 0  # a spot without counts; the only one, if there is one
    if count == 10:
        centres[3:6] = centres[3]  # three spots at one place
    made = krige(Kriging(centres, 150.0, 0.0 if count == 10 else 0.02), expected)
    maps = made.maps(Grid(-500, -500, 50.0, 40, 40))
    assert np.isfinite(maps).all() and (maps >= 0).all() and not maps[1].any()
    assert np.isfinite(made.left_out()).all() and made.left_out().shape == (count, 3)
    if count > 1:
        assert maps[0].any()


def test_a_single_spot_is_everywhere():
    made = krige(Kriging(np.array([[10.0, 20.0]]), 150.0, 0.02), np.array([[8.0]]), area_um2=200.0)
    np.testing.assert_allclose(made.maps(Grid(0, 0, 10.0, 3, 4)), np.full((1, 3, 4), 4.0), rtol=1e-5)
    assert made.left_out() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("centres", "length", "nugget"), [(CENTRES[:0], 150, 0.1), (CENTRES, 0, 0.1), (CENTRES, 9, -1)]
)
def test_what_cannot_be_kriged_is_refused(centres, length, nugget):
    with pytest.raises(ValueError, match=r"one spot|length above 0"):
        Kriging(centres, length, nugget)


def test_left_out_spots_are_predicted():
    expected = _field(CENTRES, 150.0)
    made = krige(Kriging(CENTRES, 300.0, 0.02), expected).left_out()
    assert pearson(made.T, expected.T).min() > 0.9
    assert pearson(np.roll(made, 1, 0).T, expected.T).mean() < 0.8


@pytest.mark.real
def test_hidden_spots_of_a_real_slide_are_predicted(real_data):
    spots = read(real_data / "breast/visium", Options()).spots
    counts = sp.csr_matrix(spots.counts.X)
    common = np.sort(np.argsort(-np.asarray(counts.sum(0)).ravel())[500:800])
    hidden = np.arange(len(spots.centres_um)) % 5 == 2
    visible = spots.centres_um[~hidden]
    denoised = denoise(counts[~hidden], genes=common, components=20).expected()
    raw, truth = (counts[rows][:, common].toarray() for rows in (~hidden, hidden))
    kriging = choose(raw, denoised, visible)
    assert 70 < kriging.length_um < 650
    found = krige(kriging, denoised).predict(kriging.weights(spots.centres_um[hidden]))
    nearest = denoised[cKDTree(visible).query(spots.centres_um[hidden])[1]]
    scores = [pearson(values.T, truth.T).mean() for values in (found, nearest)]
    assert scores[0] > 0.55 and scores[0] > scores[1] + 0.05
    assert found.sum() == pytest.approx(truth.sum(), rel=0.05)
