"""Patch features: computed or read once, cached in the section, and read by training and prediction."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.features.cache import Caller, section_features
from stsr.features.files import FeatureFile, feature_files
from stsr.features.makers import EncoderMaker
from stsr.geometry.grid import Grid
from stsr.methods.batch import Requirements
from stsr.nn.frozen import load_encoder
from stsr.signals import Interrupted, Interruption
from stsr.simulate import simulate_tissue, write_xenium
from stsr.store import catalogue, discovery
from stsr.store.parts import FeatureMap, Map
from stsr.store.section import Section, open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.field import Field
from stsr.verbs.superres.verb import superres
from stsr.verbs.train.augmentation import turned
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.tiles import TrainingTiles
from stsr.verbs.train.verb import train

CPU = torch.device("cpu")


class Colours(nn.Module):
    """Mean colours of 8 x 8 px and their brightness, (b, 4, y, x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = F.avg_pool2d(x, 8)
        return torch.cat([means, means.mean(1, keepdim=True)], 1)


class Dice(nn.Module):
    """Other features at every call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape[0], 4, x.shape[2] // 8, x.shape[3] // 8)


class Whole(nn.Module):
    """The mean colour of the middle of a window, one vector each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 16:48, 16:48].mean((2, 3))


PLAIN = {"um_per_px": 2.0, "image_px": 64, "mean": [0, 0, 0], "std": [1, 1, 1]}


def encoder_file(path, module, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
    path.with_suffix(".json").write_text(json.dumps({**PLAIN, **settings}))
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    made = {"colours": Colours(), "dice": Dice()}
    found = {name: encoder_file(folder / f"{name}.pt", module) for name, module in made.items()}
    found["whole"] = encoder_file(folder / "whole.pt", Whole(), stride_um=20)
    return found


@pytest.fixture(scope="module", params=[{}, {"mirror": True, "turn_deg": 7}], ids=["straight", "turned"])
def any_section(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    write_xenium(simulate_tissue(620, 540, seed=3), folder / "xenium", labels=False, **request.param)
    return prepare(folder / "xenium", folder / "any.zarr")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """900 x 800 um with 8 genes. Tests work on copies."""
    folder = tmp_path_factory.mktemp("plain")
    tissue = simulate_tissue(900, 800, genes=8, seed=1)
    return prepare(write_xenium(tissue, folder / "xenium", image_um_per_px=2.0), folder / "one.zarr")


def features_of(store, path, **options):
    return section_features(open_section(store), FeatureFile(path), device=CPU, **options)


def inner(found, section):
    """Features (c, h, w) and colours of the H&E in 0..1, at pixels in the tissue and away from the image's edge."""
    grid = found.stored.grid
    wide = Grid(grid.x0_um - 40, grid.y0_um - 40, grid.bin_um, grid.height, grid.width)
    far = Grid(grid.x0_um + 40, grid.y0_um + 40, grid.bin_um, grid.height, grid.width)
    safe = section.measured(grid) & section.image.covered(wide) & section.image.covered(far)
    colours = section.image.read(grid).astype(np.float32) / 255
    return found.read(grid)[:3, safe], colours[:, safe]


# ------------------------------------------------------------------------------------------------- computing


def test_encoded_colours_lie_on_the_image(any_section, encoders, fresh_copy):
    store = fresh_copy(any_section)
    found = features_of(store, encoders["colours"])
    assert found.element == "features_colours" and found.channels == 4 and found.pixel_um == 20
    encoded, colours = inner(found, open_section(store))
    assert encoded.shape[1] > 300 and colours.std() > 0.05
    apart = np.abs(encoded - colours).mean()
    assert apart < 0.02 < 3 * np.abs(np.roll(colours, 2, 1) - colours).mean()


def test_windows_of_one_vector_are_centred_on_the_pixels(any_section, encoders, fresh_copy):
    store = fresh_copy(any_section)
    found = features_of(store, encoders["whole"])
    assert found.channels == 3 and found.pixel_um == 20
    section, grid = open_section(store), found.stored.grid
    shifts = [(x, y) for x in (-22, 0, 22) for y in (-22, 0, 22)]  # 64 um around each centre
    moved = [Grid(grid.x0_um + x, grid.y0_um + y, 20.0, *grid.shape) for x, y in shifts]
    smooth = np.mean([section.image.read(each) for each in moved], axis=0) / 255
    safe = section.measured(grid)
    apart = np.abs(found.read(grid) - smooth)[:, safe]
    assert np.median(apart) < 0.01


def test_an_array_gives_what_the_encoder_gives(any_section, encoders, fresh_copy, tmp_path):
    store = fresh_copy(any_section)
    section = open_section(store)
    image = section.image
    stride = round(10 / image.um_per_px)
    level = np.asarray(image.levels[0][:])  # (3, y, x)
    size = [side // stride * stride for side in level.shape[1:]]
    patches = level[:, : size[0], : size[1]].reshape(3, size[0] // stride, stride, size[1] // stride, stride)
    np.save(tmp_path / "a.npy", patches.mean((2, 4)).transpose(1, 2, 0).astype(np.float32) / 255)
    (tmp_path / "a.json").write_text(json.dumps({"stride_px": stride}))
    found = features_of(store, tmp_path / "a.npy", pixel_um=20.0)
    from_array, colours = inner(found, section)
    assert np.abs(from_array - colours).mean() < 0.02
    made = open_section(store).catalogue.feature_elements["features_a"]
    assert made["kind"] == "array" and made["origin"] == "derived" and made["channels"] == 3


def test_places_without_tissue_are_not_encoded(plain, encoders, fresh_copy):
    section = open_section(fresh_copy(plain))
    maker = EncoderMaker(load_encoder(encoders["colours"], CPU), section.image, None)
    grid = section.grid(20.0).window(0, 0, maker.side, maker.side)
    wanted = np.zeros(grid.shape, bool)
    wanted[0, 0] = True
    values = maker.make(grid, wanted, maker.prepare(grid, wanted))
    assert (values[:, : maker.core, : maker.core] != 0).all()
    assert (values[:, maker.core :] == 0).all() and (values[:, :, maker.core :] == 0).all()


# --------------------------------------------------------------------------------------------------- caching


def test_a_second_run_reads_the_cache(plain, encoders, fresh_copy):
    store = fresh_copy(plain)
    first = features_of(store, encoders["dice"])
    grid = first.stored.grid
    again = features_of(store, encoders["dice"])
    assert np.array_equal(first.read(grid), again.read(grid)) and first.read(grid).std() > 0.1
    shutil.copytree(plain, store.with_name("two.zarr"))
    other = features_of(
        store.with_name("two.zarr"), encoders["dice"]
    )  # computed anew: the dice fall otherwise
    assert not np.array_equal(first.read(grid), other.read(grid))


def test_the_cache_is_an_image_that_nothing_mistakes(plain, encoders, fresh_copy, tmp_path):
    store = fresh_copy(plain)
    before = open_section(store)
    three = encoder_file(tmp_path / "three.pt", Whole(), stride_um=100)
    features_of(store, three)
    section = open_section(store)
    element = section.sdata.images["features_three"]
    assert element.dims == ("c", "y", "x") and element.shape[0] == 3  # as many channels as a picture
    assert section.arrays("images", "features_three")[0].chunks[0] == 3
    assert section.image.bounds_um == before.image.bounds_um
    assert section.catalogue.hr_elements == before.catalogue.hr_elements
    assert section.catalogue.superres_elements == []
    assert catalogue.is_result(section.provenance["features_three"])
    assert section.frame == before.frame and section.extent_um == before.extent_um
    sdata = section.sdata
    del sdata.images["he"]
    assert discovery.find_image(sdata, section.frame) is None
    assert discovery.find_frame(sdata).um_per_unit == pytest.approx(1)


def test_another_file_of_the_name_must_be_confirmed(plain, encoders, fresh_copy, tmp_path):
    store = fresh_copy(plain)
    features_of(store, encoders["colours"])
    other = encoder_file(tmp_path / "colours.pt", Dice())
    with pytest.raises(UsageError, match=r"--overwrite .* or rename colours.pt"):
        features_of(store, other)
    features_of(store, other, overwrite=True)
    assert open_section(store).features(FeatureFile(other).digest) is not None
    assert open_section(store).features(FeatureFile(encoders["colours"]).digest) is None


def test_the_digest_depends_on_file_and_settings(encoders, tmp_path):
    path = encoder_file(tmp_path / "colours.pt", Colours())
    first = FeatureFile(path).digest
    assert FeatureFile(path).digest == first
    encoder_file(path, Colours(), um_per_px=1.0)
    assert FeatureFile(path).digest != first
    big = np.zeros((40, 40, 400), np.float32)
    np.save(tmp_path / "a.npy", big)
    zero = FeatureFile(tmp_path / "a.npy").digest
    big[-1, -1, -1] = 1
    np.save(tmp_path / "a.npy", big)
    assert FeatureFile(tmp_path / "a.npy").digest != zero


def test_an_interrupted_run_continues(plain, encoders, fresh_copy):
    store = fresh_copy(plain)
    interruption, steps = Interruption(), []

    def stop(done, total, label):
        steps.append((done, total))
        interruption.number = 15

    with pytest.raises(Interrupted):
        features_of(store, encoders["colours"], caller=Caller(stop, interruption=interruption))
    assert open_section(store).catalogue.feature_elements == {}
    onwards = Caller(lambda done, total, label: steps.append((done, total)))
    whole = features_of(store, encoders["colours"], caller=onwards)
    total = steps[0][1]
    assert total > 2 and steps == [(number, total) for number in range(1, total + 1)]
    shutil.copytree(plain, store.with_name("two.zarr"))
    once = features_of(store.with_name("two.zarr"), encoders["colours"])
    assert np.array_equal(whole.read(whole.stored.grid), once.read(whole.stored.grid))


def test_a_failure_leaves_the_store_as_it_was(plain, fresh_copy, tmp_path):
    store = fresh_copy(plain)
    section = open_section(store)
    shape = section.image.height // 4, section.image.width // 4
    values = np.zeros((*shape, 2), np.float32)
    for bad, words in ((np.nan, "NaN or infinite at patch"), (1e6, "beyond the 65504")):
        values[shape[0] // 2, shape[1] // 2] = bad
        np.save(tmp_path / "a.npy", values)
        before = sorted(path.name for path in store.parent.iterdir())
        with pytest.raises(StsrError, match=words):
            features_of(store, tmp_path / "a.npy")
        assert sorted(path.name for path in store.parent.iterdir()) == before
        assert open_section(store).elements == section.elements


def test_an_image_that_is_too_coarse_is_said(plain, fresh_copy, tmp_path):
    told = []
    fine = encoder_file(tmp_path / "fine.pt", Colours(), um_per_px=1.0)
    features_of(fresh_copy(plain), fine, caller=Caller(report=told.append))
    assert "has 2 um per pixel and is enlarged to the 1 um of fine.pt" in told[0]
    assert "4 channels in pixels of 10 um" in told[1]


def test_a_section_in_other_units_finds_its_cache(plain, encoders, fresh_copy):
    store = fresh_copy(plain)
    pixels = Section(store, um_per_unit=0.2737, coordinate_system="global")  # as if its units were pixels
    found = section_features(pixels, FeatureFile(encoders["colours"]), device=CPU)
    assert found.pixel_um == 20.0
    again = Section(store, um_per_unit=0.2737, coordinate_system="global")
    assert again.features(FeatureFile(encoders["colours"]).digest, found.pixel_um) is not None


def test_windows_between_pixels_are_interpolated():
    grid = Grid(100.0, 200.0, 20.0, 6, 5)
    values = np.stack([np.add.outer(3.0 * np.arange(6), np.arange(5)), np.ones((6, 5))])
    found = FeatureMap("f", Map(grid, ["0", "1"], values))
    assert np.array_equal(found.read(grid), values)
    moved = found.read(Grid(150.0, 210.0, 20.0, 3, 2))  # 2.5 columns and half a row on
    assert np.allclose(moved[0], np.add.outer(3 * (np.arange(3) + 0.5), np.arange(2) + 2.5))
    assert np.allclose(moved[1], 1)
    beyond = found.read(Grid(80.0, 200.0, 20.0, 2, 2))
    assert (beyond[:, :, 0] == 0).all() and np.array_equal(beyond[:, :, 1], values[:, :2, 0])


# --------------------------------------------------------------------------------------- training, prediction

SMALL = {
    "method": {
        "widths": [8, 8],
        "factors": 4,
        "lr_channels": 8,
        "genes_per_step": 6,
        "tile_lr": 4,
        "overlap_lr": 1,
    },
    "train": {"steps": 6, "batch": 2, "train_tile_lr": 3, "validate_every": 3, "genes": 6, "phases": 1},
}


def small(sections, output, **options):
    settings = ["learning_rate=0.01", "image_channels=8", *options.pop("settings", ())]
    return train(sections, output, method="unet", config=SMALL, settings=settings, device="cpu", **options)


@pytest.fixture(scope="module")
def trained(plain, encoders, tmp_path_factory):
    """A section with cached features, and a model trained on them."""
    folder = tmp_path_factory.mktemp("trained")
    store = shutil.copytree(plain, folder / "one.zarr")
    return store, small([store], folder / "m.safetensors", features=[encoders["colours"]])


def test_features_lie_on_the_counts_of_a_tile_however_it_is_turned(trained, encoders):
    section = open_section(trained[0])
    found = section.features(FeatureFile(encoders["colours"]).digest)
    needs = Requirements((), features=4, features_um=20.0)
    config = TrainConfig(train_tile_lr=3, spots=("square",), tissue=0.5, stain=0)
    tiles = TrainingTiles([section], needs, config, val=0, features={section.name: found})
    starts = tiles.sampler.places[0].starts
    start = tuple(next(start for start in starts.tolist() if start[0] % 10))  # within a low-resolution pixel
    drawn = replace(tiles._drawn(0, *start, np.random.default_rng(0)), turn=0)
    plain = tiles._assemble([drawn])
    assert plain.features.shape == (1, 4, 15, 15) and plain.features.std() > 0.02
    for turn in range(8):
        batch = tiles._assemble([replace(drawn, turn=turn)])
        for part in ("image", "features", "hr"):
            assert np.array_equal(getattr(batch, part), turned(getattr(plain, part).numpy(), turn)), part
    red = F.avg_pool2d(plain.image[:, :1].float() / 255, 2)
    shown = F.avg_pool2d(plain.features[:, :1], 3, 1, 1).gt(0.5)  # in the tissue
    apart, shifted = ((moved - plain.features[:, :1])[shown].abs().mean() for moved in (red, red.roll(2, -1)))
    assert shown.sum() > 100 and apart < 0.7 * shifted
    grid, panel = section.grid(10.0), list(tiles.panel)
    field = Field(grid, section.image, None, None, np.eye(len(panel)), panel, 10.0, features=found)
    asked = field.batch(grid.window(*start, tiles.side, tiles.side))
    assert torch.equal(asked.features, plain.features)


def test_a_checkpoint_records_its_features(trained, encoders):
    loaded = checkpoint.load(trained[1])
    assert loaded.method.requirements.features == 4 and loaded.method.requirements.features_um == 20
    digest = FeatureFile(encoders["colours"]).digest
    files = [{"file": "colours.pt", "digest": digest}]
    assert loaded.provenance["features"] == {
        "kind": "encoder",
        "channels": 4,
        "features_um": 20.0,
        "files": files,
    }


def predicted(store, model, name, **options):
    result = superres(store, model=model, name=name, device="cpu", consistency="none", **options)
    return open_section(result.store).map(name).read()


def test_a_prediction_reads_the_cached_features(trained, plain, encoders, fresh_copy):
    store, model = fresh_copy(trained[0]), trained[1]
    first = predicted(store, model, "first")
    section = open_section(store)
    assert section.provenance["first"]["features"] == "features_colours"
    import zarr

    array = zarr.open_array(store / "images" / "features_colours" / "s0", mode="r+")
    array[:] = array[:] + np.float16(1.0)
    assert np.abs(predicted(store, model, "second") - first).max() > 1e-3 * first.max()
    fresh = fresh_copy(plain, "fresh.zarr")
    with pytest.raises(StsrError, match=r"reads features of colours.pt, .* add --features FILE"):
        superres(fresh, model=model, device="cpu")
    assert np.array_equal(predicted(fresh, model, "first", features=encoders["colours"]), first)


def test_features_that_do_not_fit_a_model_are_refused(trained, encoders, fresh_copy, tmp_path):
    store, model = fresh_copy(trained[0]), trained[1]
    with pytest.raises(UsageError, match=r"dice.pt is not the encoder .* give colours.pt"):
        superres(store, model=model, features=encoders["dice"], device="cpu")
    image = open_section(store).image
    np.save(tmp_path / "a.npy", np.zeros((image.height // 8, image.width // 8, 5), np.float32))
    with pytest.raises(UsageError, match="5 channels and the model reads 4"):
        superres(store, model=model, features=tmp_path / "a.npy", device="cpu")
    with pytest.raises(UsageError, match="reads no features"):
        superres(store, method="bicubic", features=encoders["colours"], device="cpu")
    assert set(open_section(store).elements) == set(open_section(trained[0]).elements)


@pytest.mark.parametrize(
    ("settings", "features", "words"),
    [
        (["features=5"], True, "features = 5 contradicts"),
        (["features_um=10.0"], True, "features_um = 10.0 contradicts"),
        (["features=5"], False, "add --features FILE"),
    ],
)
def test_settings_must_agree_with_the_features(trained, encoders, tmp_path, settings, features, words):
    given = [encoders["colours"]] if features else []
    with pytest.raises(UsageError, match=words):
        small([trained[0]], tmp_path / "m.safetensors", features=given, settings=settings)


def test_a_dry_run_computes_no_features(plain, trained, encoders, fresh_copy, tmp_path):
    store = fresh_copy(plain)
    with pytest.raises(UsageError, match="without --dry-run"):
        small([store], tmp_path / "m.safetensors", features=[encoders["colours"]], dry_run=True)
    shown = small([trained[0]], tmp_path / "m.safetensors", features=[encoders["colours"]], dry_run=True)
    assert shown["config"]["method"]["features"] == 4


def test_files_match_sections(encoders, tmp_path):
    sections = [Section(tmp_path / "a.zarr"), Section(tmp_path / "b.zarr")]
    arrays = [tmp_path / "arrays" / f"{name}.npy" for name in "abc"]
    arrays[0].parent.mkdir()
    for path in arrays:
        np.save(path, np.zeros((2, 2, 2)))
    for given in ([arrays[0], arrays[1]], [tmp_path / "arrays"]):
        assert [file.path.name for file in feature_files(given, sections)] == ["a.npy", "b.npy"]
    both = feature_files([encoders["dice"]], sections)
    assert [file.kind for file in both] == ["encoder"] * 2
    for wrong in (arrays, arrays[:1], [arrays[0], encoders["dice"]], [encoders["dice"], encoders["whole"]]):
        with pytest.raises(UsageError, match="give one encoder, one array per section"):
            feature_files(wrong, sections)
    (tmp_path / "arrays" / "b.npy").unlink()
    with pytest.raises(UsageError, match=r"has no b.npy or b.zarr"):
        feature_files([tmp_path / "arrays"], sections)
    with pytest.raises(UsageError, match="no features at"):
        feature_files([tmp_path / "absent.npy"], sections[:1])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UsageError, match="no file of features"):
        feature_files([tmp_path / "x.txt"], sections[:1])
