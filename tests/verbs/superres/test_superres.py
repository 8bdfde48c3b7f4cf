import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr

from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.geometry.correction import Correction
from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement
from stsr.methods import method_class
from stsr.methods.regression import RegressionConfig, UNetRegression
from stsr.simulate import simulate_tissue, write_visium
from stsr.spread.dispersion import Dispersion
from stsr.store import elements, publishing
from stsr.store.section import Section, open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres import loop, predict
from stsr.verbs.superres.verb import superres

GENES = ["GATA3", "LUM", "LYZ", "EPCAM", "POSTN", "CD68"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("superres")


@pytest.fixture(scope="module")
def prepared(xenium_section, visium_section):
    """Stores as `stsr prepare` makes them; tests work on copies."""
    return {"xenium": xenium_section, "visium": visium_section}


TINY = {
    "unet": {"widths": (8, 8), "factors": 4, "lr_channels": 8},
    "corrdiff": {
        "widths": (8, 8),
        "factors": 4,
        "lr_channels": 8,
        "directions": 3,
        "denoiser_widths": (8, 8),
    },
    "c3diff": {"widths": (8, 8), "image_widths": (8, 8), "feature_channels": 8, "steps": 2},
    "diffst": {
        "widths": (8, 8),
        "image_widths": (8, 8),
        "feature_channels": 8,
        "gene_channels": 8,
        "steps": 2,
    },
}


@pytest.fixture(scope="module")
def models(folder, tissue):
    """Untrained methods with random weights in all layers, and tiles of 4 x 4 pixels."""
    panel = tuple(gene for gene in tissue.genes if gene != "CD68")

    def made(name):
        torch.manual_seed(0)
        chosen = method_class(name)
        method = chosen(chosen.Config(tile_lr=4, overlap_lr=2, **TINY[name]), panel, np.full(len(panel), 5.0))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name == "unet":
                method.set_dispersion(Dispersion((0.05, 0.1, 0.0, 0.0), (0.1, 0.2, 0.0, 0.0), {"LUM": 2.0}))
            if name == "corrdiff":
                method.turn.copy_(torch.eye(4)[:, :3])
        return checkpoint.save(folder / f"{name}.safetensors", method, name, {"trained_on": "nothing"})

    return {name: made(name) for name in TINY}


@pytest.fixture(params=list(TINY))
def any_model(models, request):
    """Each method in turn: properties of maps hold for all of them."""
    return models[request.param]


@pytest.fixture(scope="module")
def model(models):
    return models["corrdiff"]


@pytest.fixture
def store(prepared, fresh_copy):
    def copy(kind="visium", name="section.zarr"):
        return fresh_copy(prepared[kind], name)

    return copy


def read(store, element="superres_x10", genes=None):
    return open_section(store).map(element).read(genes)


@pytest.fixture(scope="module")
def legacy(prepared, tissue, folder):
    """First-generation ST: discs of 100 um, about 200 um apart; an H&E over three quarters of it; no mask."""
    rng = np.random.default_rng(0)
    grid = Grid(0, 0, 10, 54, 62)
    x, y = np.meshgrid(np.arange(60.0, 600, 180), np.arange(60.0, 520, 190))
    centres = np.stack([x.ravel(), y.ravel()], 1) + rng.uniform(-8, 8, (x.size, 2))
    shown = Grid(0, 0, 2.0, 270, 232)
    image = open_section(prepared["visium"]).image.read(shown)
    return foreign(folder / "legacy.zarr", tissue, grid, centres, 100.0, image, shown)


def foreign(path, tissue, grid, centres, size_um, image, shown):
    """A store with round spots and an image that covers the grid ``shown``, and nothing else."""
    from anndata import AnnData
    from spatialdata.models import Image2DModel

    counts = tissue.counts(grid.bin_um, 0, 0, grid.width, grid.height)
    measured = np.rint(Measurement.discs(grid, centres, size_um).add_up(counts)).astype(np.float32)
    names = [f"s{number}" for number in range(len(centres))]
    annotation = AnnData(sp.csr_matrix(measured))
    annotation.obs_names, annotation.var_names = names, list(tissue.genes)
    parts = {
        "he": Image2DModel.parse(image, dims="cyx", transformations=elements.placed(shown.bin_to_um)),
        "spots": elements.spot_shapes(centres, "disc", size_um, names),
        "spots_table": elements.table(annotation, "spots", centres),
    }
    return publishing.create(path, elements.store_of(parts), {"spots": {}})


def whole_spots(section, grid):
    """Spots that lie entirely inside the support."""
    measurement = section.spots.measurement(grid)
    return (measurement.bins_seen > 0) & (measurement.matrix @ ~section.support(grid).ravel() == 0)


@pytest.mark.parametrize("kind", ["xenium", "visium"])
def test_maps_add_up_to_the_spots(store, any_model, kind):
    path = store(kind)
    result = superres(path, model=any_model, genes=GENES, consistency="exact")
    section = open_section(path)
    maps, spots = section.map("superres_x10"), section.spots
    assert maps.genes == GENES and maps.grid == section.grid(10)
    whole = whole_spots(section, maps.grid)
    counts = spots.select(GENES).toarray()[whole]
    added = spots.measurement(maps.grid).add_up(maps.read())[whole]
    assert whole.sum() >= 0.7 * len(whole)
    assert (np.abs(added - counts).sum(0) <= 1e-3 * counts.sum(0)).all()
    assert result.consistency_error < 1e-3
    assert section.provenance["superres_x10"]["consistency_error"] < 1e-3
    assert (read(path, "superres_x10_sd") >= 0).all() and read(path, "superres_x10_sd").max() > 0


def test_the_section_opens_in_spatialdata(store, model):
    import spatialdata

    path = store()
    superres(path, model=model, genes=GENES, samples=1)
    sdata = spatialdata.read_zarr(path)
    image = sdata.images["superres_x10"]
    assert list(image.coords["c"].values) == GENES
    assert "superres_x10_sd" not in sdata.images
    extent = spatialdata.get_extent(sdata["superres_x10"], coordinate_system="global")
    x0, y0, x1, y1 = open_section(path).grid(10).bounds_um
    np.testing.assert_allclose([*extent["x"], *extent["y"]], [x0, x1, y0, y1], atol=1e-3)


def test_a_coarser_scale_is_the_sum_of_the_finer(store, any_model):
    path = store("xenium")
    superres(path, model=any_model, genes=GENES, samples=1)
    superres(path, model=any_model, genes=GENES, samples=1, scale=5)
    fine, coarse = read(path), read(path, "superres_x5")
    summed = fine.reshape(len(GENES), coarse.shape[1], 2, coarse.shape[2], 2).sum((2, 4))
    supported = open_section(path).support(open_section(path).grid(10))
    inside = supported.reshape(coarse.shape[1], 2, coarse.shape[2], 2).all(
        (1, 3)
    )  # at the border one has more bins
    np.testing.assert_allclose(coarse[:, inside], summed[:, inside], rtol=2e-3, atol=1e-5)


def test_same_seed_same_bits_whatever_the_order_and_the_blocks(store, any_model, monkeypatch):
    path = store()
    superres(path, model=any_model, genes=GENES, seed=5, name="one")
    superres(path, model=any_model, genes=GENES, seed=5, name="again")
    np.testing.assert_array_equal(read(path, "one"), read(path, "again"))
    np.testing.assert_array_equal(read(path, "one_sd"), read(path, "again_sd"))
    monkeypatch.setattr(predict, "_GENES_AT_ONCE", 2)
    monkeypatch.setattr(loop, "MEMORY_BYTES", 1)
    many = GENES[::-1] + [g for g in open_section(path).spots.genes if g not in GENES][:14]
    superres(path, model=any_model, genes=many, seed=5, name="two")
    superres(path, model=any_model, genes=GENES, seed=6, name="three")
    for suffix in ("", "_sd"):
        one, two = read(path, "one" + suffix), read(path, "two" + suffix, GENES)
        np.testing.assert_allclose(
            one, two, rtol=1e-4 if suffix else 1e-5, atol=2e-6 if suffix else 1e-7
        )  # a spread is a difference
    sampled = method_class(checkpoint.describe(any_model)["method"]).samples
    assert np.allclose(read(path, "one_sd"), read(path, "three_sd"), rtol=1e-2) != sampled


INNER = (210, 190, 330, 280)  # um: neither at the border nor on the borders of tiles


def assert_a_region_is_the_crop(path, **options):
    options = {"genes": GENES, "samples": 2, **options}
    whole = superres(path, name="whole", **options)
    part = superres(path, name="part", region=INNER, **options)
    section = open_section(path)
    for wide, narrow in zip((whole.element, whole.spread), (part.element, part.spread), strict=True):
        if wide is not None:
            shown, crop = section.map(narrow), section.map(wide)
            assert shown.grid.height < crop.grid.height and shown.grid.width < crop.grid.width
            np.testing.assert_array_equal(shown.read(), crop.read(window=shown.grid))
            assert shown.read().max() > 0


@pytest.mark.parametrize("kind", ["xenium", "visium", "legacy"])
@pytest.mark.parametrize("scale", [10, 5])
def test_a_region_is_the_crop_of_the_whole(store, model, legacy, tmp_path, kind, scale):
    path = shutil.copytree(legacy, tmp_path / "section.zarr") if kind == "legacy" else store(kind)
    assert_a_region_is_the_crop(path, model=model, scale=scale)


@pytest.mark.parametrize("kind", ["xenium", "visium", "legacy"])
def test_a_region_of_a_baseline_is_the_crop_of_the_whole(store, legacy, tmp_path, kind):
    path = shutil.copytree(legacy, tmp_path / "section.zarr") if kind == "legacy" else store(kind)
    assert_a_region_is_the_crop(path, method="bicubic", samples=1)


@pytest.mark.parametrize(
    "options",
    [
        {"consistency": "none"},
        {"consistency": "smooth"},
        {"use_lr": False, "genes": GENES[:4]},
        {"scale": 2, "samples": 1},
    ],
)
def test_a_region_is_the_crop_whatever_the_options(store, model, options):
    """At 2x bins are so large that spots share them."""
    assert_a_region_is_the_crop(store(), model=model, **options)


@pytest.mark.parametrize("name", ["c3diff", "diffst"])
def test_a_region_of_another_model_is_the_crop_of_the_whole(store, models, name):
    assert_a_region_is_the_crop(store("xenium"), model=models[name], genes=GENES[:3])


def test_a_region_needs_only_the_tiles_around_it(store, model, monkeypatch):
    path, tiles = store("xenium"), []
    one = predict.Predictor.tile

    def counted(self, field, tile):
        tiles.append(tile)
        return one(self, field, tile)

    monkeypatch.setattr(predict.Predictor, "tile", counted)
    superres(path, model=model, genes=["LUM"], samples=1, name="whole")
    whole = len(tiles)
    superres(path, model=model, genes=["LUM"], samples=1, name="part", region=(0, 0, 90, 90))
    assert 0 < len(tiles) - whole < whole / 2


def test_maps_are_zero_where_there_is_no_image(legacy, model, tmp_path):
    import spatialdata

    path = shutil.copytree(legacy, tmp_path / "section.zarr")
    result = superres(path, model=model, genes=GENES, samples=2, consistency="exact")
    section = open_section(path)
    maps = section.map(result.element)
    support = section.support(maps.grid)
    covered = section.image.covered(maps.grid)
    assert 0.3 < support.mean() < covered.mean() < 0.9 and not support[~covered].any()
    for element in (result.element, result.spread):
        values = section.map(element).read()
        assert np.isfinite(values).all() and not values[:, ~support].any() and values[:, support].max() > 0
    whole = whole_spots(section, maps.grid)
    counts = section.spots.select(GENES).toarray()
    added = section.spots.measurement(maps.grid).add_up(maps.read())
    assert 3 <= whole.sum() < len(whole)
    error = np.abs(added - counts)[whole].sum(0) / counts[whole].sum(0)
    assert error.max() < 1e-3 and result.consistency_error == pytest.approx(error.max(), abs=1e-6)
    beyond = section.provenance[result.element]["spots_beyond_support"]
    assert beyond == (~whole).sum()
    assert any(note.startswith(f"{beyond} spot") and "image or the tissue" in note for note in result.notes)
    published = np.asarray(spatialdata.read_zarr(path).labels["support"].data)
    np.testing.assert_array_equal(published > 0, support)
    assert section.provenance["support"]["command"] == "superres"
    assert section.provenance["support"]["origin"] == "derived"


def test_support_is_published_once_and_stays(legacy, tmp_path):
    path, copy = shutil.copytree(legacy, tmp_path / "section.zarr"), tmp_path / "copy.zarr"
    superres(path, method="bicubic", genes=["LUM"], scale=5, output=copy)
    assert "support" not in open_section(path).elements
    made = open_section(copy).provenance["support"]
    superres(copy, method="bicubic", genes=["LUM"], scale=5, overwrite=True)
    superres(copy, method="bicubic", genes=["LUM"])
    assert open_section(copy).provenance["support"] == made


def test_without_spots_the_counts_do_not_matter(store, any_model, monkeypatch):
    path = store()
    options = {"model": any_model, "genes": ["GATA3"], "samples": 1, "consistency": "none"}
    result = superres(path, use_lr=False, name="blind", **options)
    superres(path, name="seeing", **options)
    spots = open_section(path).spots
    more = replace(spots, counts=spots.counts * 3)
    monkeypatch.setattr(Section, "spots", property(lambda section: more))
    superres(path, use_lr=False, name="blind_more", **options)
    superres(path, name="seeing_more", **options)
    assert result.consistency_error is None
    assert not open_section(path).provenance["blind"]["spots_used"]
    assert read(path, "blind").max() > 0
    np.testing.assert_array_equal(read(path, "blind"), read(path, "blind_more"))
    assert not np.allclose(read(path, "seeing"), read(path, "seeing_more"), rtol=0.1)
    with pytest.raises(UsageError, match="CD68"):
        superres(path, model=any_model, genes=["CD68"], use_lr=False)


def test_a_finer_model_reads_the_image_and_reports_a_coarse_one(store, folder, tissue):
    path, genes = store(), tuple(tissue.genes[:4])
    torch.manual_seed(0)
    settings = {"widths": (8, 8), "factors": 4, "lr_channels": 8, "views": 1, "tile_lr": 4, "overlap_lr": 2}
    maps = {}
    for image_um in (4.0, 0.5):
        config = RegressionConfig(image_um=image_um, image_channels=8, **settings)
        method = UNetRegression(config, genes, np.full(len(genes), 5.0))
        torch.nn.init.normal_(method.trunk.head[-1].weight, std=0.2)
        model = checkpoint.save(folder / f"fine{image_um}.safetensors", method, "unet", {})
        result = superres(path, model=model, overwrite=True, consistency="none")
        um_per_px = open_section(path).image.um_per_px
        reported = any("detail is missing" in note for note in result.notes)
        assert reported == (um_per_px > 1.5 * image_um)
        maps[image_um] = read(path)
    assert maps[0.5].shape == maps[4.0].shape and reported
    white = folder / "white"
    shutil.copytree(path, white)
    for _, array in zarr.open_group(white / "images" / "he", mode="r+").arrays():
        array[:] = 255
    superres(white, model=model, overwrite=True, consistency="none")
    assert not np.allclose(read(white), maps[0.5], rtol=0.05)


def test_genes_outside_the_panel_follow_their_look_alikes(store, any_model):
    path = store()
    result = superres(path, model=any_model, genes=["CD68", "LYZ"], samples=1)
    assert any("not in the model's panel" in note for note in result.notes)
    assert open_section(path).provenance["superres_x10"]["genes_outside_panel"] == 1


@pytest.mark.parametrize("alike", ["LUM", "EPCAM"])
def test_a_gene_outside_the_panel_is_mapped_like_the_gene_with_its_spots(store, models, monkeypatch, alike):
    path = store()
    spots = open_section(path).spots
    counts = spots.counts.tolil()
    counts[:, spots.genes.index("CD68")] = counts[:, spots.genes.index(alike)]
    copied = replace(spots, counts=counts.tocsr())
    monkeypatch.setattr(Section, "spots", property(lambda section: copied))
    superres(path, model=models["corrdiff"], genes=["CD68", "LUM", "EPCAM"], samples=1, consistency="none")
    superres(path, method="bilinear", genes=["CD68"], consistency="none", name="plain")
    maps = dict(zip(("CD68", "LUM", "EPCAM", "spots"), [*read(path), *read(path, "plain")], strict=True))
    inside = maps["spots"] > 0
    found, own, plain, other = (
        np.log(maps[gene][inside]) for gene in ("CD68", alike, "spots", "EPCAM" if alike == "LUM" else "LUM")
    )
    assert np.corrcoef(found, own)[0, 1] > 0.95
    # Its spots alone would give the same correlation with the gene it copies, but not the detail from the image.
    assert np.corrcoef(found - plain, own - plain)[0, 1] > 0.8
    assert np.corrcoef(found - plain, other - plain)[0, 1] < 0.8


def test_baselines_need_no_model(store):
    path = store()
    result = superres(path, method="bicubic", genes=["all"], consistency="exact")
    assert result.spread is None and result.consistency_error < 1e-3
    superres(path, method="bicubic", genes=["LUM"], consistency="none", name="loose")
    section = open_section(path)
    assert section.map("superres_x10").genes == section.spots.genes
    loose = section.map("loose")
    whole = whole_spots(section, loose.grid)
    added = section.spots.measurement(loose.grid).add_up(loose.read())[whole, 0]
    assert np.corrcoef(added, section.spots.select(["LUM"]).toarray()[whole, 0])[0, 1] > 0.8


def test_a_section_smaller_than_a_tile(tmp_path, model):
    write_visium(simulate_tissue(260, 230, seed=1), tmp_path / "small")
    path = prepare(tmp_path / "small", tmp_path / "small.zarr")
    assert superres(path, model=model, genes=["LUM"], consistency="exact").consistency_error < 1e-3


def test_a_store_by_spatialdata_io(visium_folder, prepared, model, tmp_path):
    spatialdata_io = pytest.importorskip("spatialdata_io")
    path = tmp_path / "foreign.zarr"
    spatialdata_io.visium(visium_folder, dataset_id="sample", fullres_image_file="he_fullres.tif").write(path)
    superres(path, model=model, genes=["LUM", "GATA3"], samples=1)
    superres(
        mine := shutil.copytree(prepared["visium"], tmp_path / "mine.zarr"),
        model=model,
        genes=["LUM", "GATA3"],
        samples=1,
    )
    theirs, ours = read(path), read(mine)
    assert theirs.shape == ours.shape
    both = (theirs > 0) & (ours > 0)  # their store has no tissue mask
    assert both.mean() > 0.4
    assert np.corrcoef(theirs[both], ours[both])[0, 1] > 0.98
    import spatialdata

    sdata, section = spatialdata.read_zarr(path), open_section(path)
    assert {"superres_x10", "support"} <= {*sdata.images, *sdata.labels}
    for element in ("superres_x10", "support"):
        extent = spatialdata.get_extent(sdata[element], coordinate_system=section.frame.name)
        x0, y0, x1, y1 = np.array(section.grid(10).bounds_um) / section.frame.um_per_unit
        np.testing.assert_allclose([*extent["x"], *extent["y"]], [x0, x1, y0, y1], atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ["GATA33"]}, "did you mean GATA3"),
        ({"scale": 3}, "choose one of 10, 5, 2, 1"),
        ({"samples": 0}, "at least 1"),
        ({"region": (5000, 5000, 6000, 6000)}, "outside the section"),
        ({"region": (300, 0, 100, 100)}, "X0 < X1"),
        ({"name": "spots"}, "reserved for measured data"),
        ({"sampler": "dpm"}, "dpmpp_2m"),
        ({"steps": 0}, "steps"),
        ({"method": "bicubic"}, "exclude each other"),
    ],
)
def test_wrong_wishes_are_answered_with_a_sentence(store, model, options, message):
    path = store()
    before = sorted(os.listdir(path.parent))
    with pytest.raises(UsageError, match=message) as caught:
        superres(path, **{"model": model, "genes": ["LUM"], **options})
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(path.parent)) == before


def test_results_are_replaced_only_on_request(store, model):
    path = store()
    superres(path, model=model, genes=["LUM"], samples=1)
    with pytest.raises(UsageError, match="--overwrite"):
        superres(path, model=model, genes=["GATA3"], samples=1)
    superres(path, model=model, genes=["GATA3"], samples=1, overwrite=True)
    assert open_section(path).map("superres_x10").genes == ["GATA3"]


def test_a_section_without_image(store, model):
    path = store()
    import spatialdata

    sdata = spatialdata.read_zarr(path)
    del sdata.images["he"]
    sdata.delete_element_from_disk("he")
    with pytest.raises(StsrError, match="no H&E image"):
        superres(path, model=model, genes=["LUM"])
    assert superres(path, method="bilinear", genes=["LUM"], consistency="exact").consistency_error < 1e-3


def test_output_leaves_the_section_alone(store, model, tmp_path):
    path = store()
    superres(path, model=model, genes=["LUM"], samples=1, output=tmp_path / "copy.zarr")
    assert "superres_x10" not in open_section(path).elements
    assert "superres_x10" in open_section(tmp_path / "copy.zarr").elements


def test_an_interrupted_run_goes_on_at_the_same_band(store, model, monkeypatch):
    calm, path = store(name="calm.zarr"), store()
    monkeypatch.setattr(loop, "MEMORY_BYTES", 1)
    options = {"model": model, "genes": open_section(path).spots.genes[:40], "samples": 2, "steps": 1}
    options["consistency"] = "exact"
    predicted, corrected = [], []
    tile, apply = predict.Predictor.tile, Correction.apply

    def counted(self, field, where):
        predicted.append(where)
        if len(predicted) == stop_at_tile:
            raise KeyboardInterrupt
        return tile(self, field, where)

    def corrected_once(self, maps, counts):
        corrected.append(maps.shape)
        if len(corrected) == stop_at_group:
            raise KeyboardInterrupt
        return apply(self, maps, counts)

    monkeypatch.setattr(predict.Predictor, "tile", counted)
    monkeypatch.setattr(Correction, "apply", corrected_once)
    stop_at_tile = stop_at_group = None
    superres(calm, **options)
    every = len(predicted)  # 3 blocks of genes through 2 bands of 3 tiles
    runs = []
    for stop_at_tile, stop_at_group in ((9, None), (None, 2), (None, None)):  # noqa: B007 - read above
        predicted.clear(), corrected.clear()
        try:
            superres(path, **options)
        except KeyboardInterrupt:
            assert "superres_x10" not in open_section(path).elements
        runs.append((len(predicted), len(corrected)))
    assert every == 18
    assert runs == [
        (9, 1),
        (12, 2),
        (0, 1),
    ]  # stopped in the second block; in its correction of the third; done
    for element in ("superres_x10", "superres_x10_sd"):
        np.testing.assert_array_equal(read(path, element), read(calm, element))
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


def test_killed_at_any_moment_the_store_opens_and_the_same_command_finishes(store, model):
    import spatialdata

    calm, path = store(name="calm.zarr"), store()

    def command(target):
        words = ["superres", target, "--model", model, "--genes", "all", "--samples", 2]
        return [sys.executable, "-m", "stsr", *map(str, words)]

    began = time.monotonic()
    subprocess.run(command(calm), check=True, capture_output=True)
    duration = time.monotonic() - began
    rng = np.random.default_rng(0)
    finished = False
    for _ in range(4):
        process = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(rng.uniform(0.5, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        spatialdata.read_zarr(path)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0 or (finished and "--overwrite" in said)
        finished = "superres_x10" in open_section(path).elements
    if not finished:
        subprocess.run(command(path), check=True, capture_output=True)
    np.testing.assert_array_equal(read(path), read(calm))
    np.testing.assert_array_equal(read(path, "superres_x10_sd"), read(calm, "superres_x10_sd"))
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []
    assert open_section(path).provenance["superres_x10"]["command"] == "superres"


def test_sigterm_stops_cleanly_and_the_next_run_goes_on(store, model):
    path = store()
    words = [
        "superres",
        str(path),
        "--model",
        str(model),
        "--genes",
        "all",
        "--samples",
        "8",
        "--steps",
        "40",
    ]
    process = subprocess.Popen([sys.executable, "-m", "stsr", *words], stderr=subprocess.PIPE, text=True)
    hidden = path.parent / f".{path.name}.stsr-superres_x10" / "done.jsonl"
    while process.poll() is None and not hidden.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "same command again" in said and "Traceback" not in said
    assert "superres_x10" not in open_section(path).elements and hidden.exists()
    subprocess.run([sys.executable, "-m", "stsr", *words], check=True, capture_output=True)
    assert "superres_x10" in open_section(path).elements and not hidden.exists()
