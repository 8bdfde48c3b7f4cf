import numpy as np
import pytest
import torch

import stsr
from stsr import checkpoint
from stsr.errors import UsageError
from stsr.methods import method_class
from stsr.spread.dispersion import Dispersion
from stsr.store.section import open_section

GENES = ["GATA3", "LUM", "POSTN"]
SMALL = {
    "unet": {"widths": (8, 8), "factors": 4, "lr_channels": 8},
    "c3diff": {"widths": (8, 8), "image_widths": (8, 8), "feature_channels": 8, "steps": 2},
    "corrdiff": {
        "widths": (8, 8),
        "factors": 4,
        "lr_channels": 8,
        "directions": 3,
        "denoiser_widths": (8, 8),
    },
}
DISPERSION = Dispersion((0.05, 0.1, 0.0, 0.0), (0.1, 0.2, 0.0, 0.0), {"LUM": 2.0})


@pytest.fixture(scope="module")
def models(tissue, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def made(name):
        torch.manual_seed(0)
        chosen = method_class(name)
        method = chosen(chosen.Config(tile_lr=4, overlap_lr=2, **SMALL[name]), tuple(tissue.genes), None)
        if name == "unet":
            method.set_dispersion(DISPERSION)
        if name == "corrdiff":
            method.turn.copy_(torch.eye(4)[:, :3])
        return checkpoint.save(folder / f"{name}.safetensors", method, name, {})

    return {name: made(name) for name in SMALL}


@pytest.fixture
def mapped(visium_section, fresh_copy, models):
    """A section with a map by the named model."""

    def make(name, **options):
        store = fresh_copy(visium_section, f"{name}.zarr")
        stsr.superres(store, model=models[name], genes=GENES, adapt="off", seed=3, **options)
        return store

    return make


def test_samples_scatter_around_the_map_as_its_spread_says(mapped):
    store = mapped("unet")
    section = open_section(store)
    mean, sd = section.map("superres_x10"), section.map("superres_x10_sd")
    drawn = stsr.samples(store, n=60, counts=False)
    assert drawn.dims == ("sample", "c", "y", "x")
    assert drawn.shape == (60, 3, *mean.grid.shape)
    assert list(drawn["c"].values) == GENES
    np.testing.assert_allclose(drawn["x"], mean.grid.centres_um()[0])
    inside = mean.read()[0] > 0
    ratio = (drawn.values.mean(0)[:, inside].mean(1)) / mean.read()[:, inside].mean(1)
    assert ratio == pytest.approx(np.ones(3), abs=0.05)
    found = np.sqrt(((drawn.values - mean.read()) ** 2).mean((0, 2, 3)) / (sd.read() ** 2).mean((1, 2)))
    assert found == pytest.approx(np.ones(3), abs=0.15)
    assert (drawn.values[:, :, ~inside] == 0).all()


def test_counts_add_counting_noise(mapped):
    store = mapped("unet")
    counts = stsr.samples(store, n=40)
    rates = stsr.samples(store, n=40, counts=False)
    assert (counts.values == np.rint(counts.values)).all()
    noise = ((counts - rates).values ** 2).mean()
    assert noise == pytest.approx(rates.values.mean(), rel=0.1)
    np.testing.assert_array_equal(counts.values, stsr.samples(store, n=40).values)


def test_a_region_is_cut_from_the_same_samples(mapped):
    store = mapped("unet")
    whole = stsr.samples(store, n=2, counts=False)
    part = stsr.samples(store, n=2, region=(100, 150, 300, 260), genes=["LUM"], counts=False)
    assert part["x"].min() - 5 <= 100 < part["x"].min() + 5
    assert part["y"].max() - 5 < 260 <= part["y"].max() + 5
    same = whole.sel(c=["LUM"], y=part["y"], x=part["x"])
    np.testing.assert_allclose(part.values, same.values, rtol=1e-4)


def test_kept_samples_are_those_that_are_drawn(mapped, models):
    store = mapped("unet", keep_samples=True, samples=3, scale=5)
    kept = [open_section(store).map(f"superres_x5_sample{number}").read(GENES) for number in (1, 2, 3)]
    assert not np.allclose(kept[0], kept[1])
    np.testing.assert_array_equal(stsr.samples(store, n=3, counts=False).values, kept)
    with pytest.raises(UsageError, match="keeps 3 samples, not 4"):
        stsr.samples(store, n=4)
    # The same map without kept samples draws the same ones.
    stsr.superres(store, model=models["unet"], genes=GENES, adapt="off",
                  seed=3, scale=5, overwrite=True)  # fmt: skip
    assert not [name for name in open_section(store).elements if "_sample" in name]
    np.testing.assert_allclose(stsr.samples(store, n=3, counts=False).values, kept, rtol=1e-4)


@pytest.mark.parametrize("name", ["c3diff", "corrdiff"])
def test_samples_of_a_diffusion_model_are_its_own(mapped, name):
    store = mapped(name, keep_samples=True, samples=4)
    section = open_section(store)
    kept = stsr.samples(store, "superres_x10", n=4, counts=False)
    spread = kept.values.std(0, ddof=1)
    np.testing.assert_allclose(section.map("superres_x10_sd").read(), spread, rtol=2e-2, atol=1e-4)
    if name == "c3diff":  # its map is the mean of its samples
        np.testing.assert_allclose(
            section.map("superres_x10").read(), kept.values.mean(0), rtol=1e-3, atol=1e-5
        )


def test_maps_without_a_spread_give_no_samples(mapped, visium_section, fresh_copy):
    store = fresh_copy(visium_section, "plain.zarr")
    stsr.superres(store, method="bilinear", genes=GENES)
    with pytest.raises(UsageError, match="has no spread"):
        stsr.samples(store)
    with pytest.raises(UsageError, match="leave out --keep-samples"):
        stsr.superres(store, method="bilinear", genes=GENES, keep_samples=True, overwrite=True)


def test_requests_that_do_not_fit_are_refused(mapped, models):
    store = mapped("unet")
    with pytest.raises(UsageError, match="at least 1"):
        stsr.samples(store, n=0)
    with pytest.raises(UsageError, match="no bin of the map"):
        stsr.samples(store, region=(9000, 0, 9100, 100))
    with pytest.raises(UsageError, match="ESR7"):
        stsr.samples(store, genes=["ESR7"])
    with pytest.raises(UsageError, match="add --keep-samples"):
        stsr.superres(store, model=models["unet"], genes=GENES, samples=4)
