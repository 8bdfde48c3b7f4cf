import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.methods import method_class
from stsr.simulate import simulate_tissue, write_visium
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres import loop as superresolution_run
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
    """Methods that have learned nothing yet, but have random weights everywhere, and tiles of 4 x 4 pixels."""
    panel = tuple(gene for gene in tissue.genes if gene != "CD68")

    def made(name):
        torch.manual_seed(0)
        chosen = method_class(name)
        method = chosen(chosen.Config(tile_lr=4, overlap_lr=2, **TINY[name]), panel, np.full(len(panel), 5.0))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name == "corrdiff":
                method.turn.copy_(torch.eye(4)[:, :3])
        return checkpoint.save(folder / f"{name}.safetensors", method, name, {"trained_on": "nothing"})

    return {name: made(name) for name in TINY}


@pytest.fixture(params=list(TINY))
def any_model(models, request):
    """One method after the other: what holds for maps holds for all of them."""
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


@pytest.mark.parametrize("kind", ["xenium", "visium"])
def test_maps_add_up_to_the_spots(store, any_model, kind):
    path = store(kind)
    result = superres(path, model=any_model, genes=GENES)
    section = open_section(path)
    maps, spots = section.map("superres_x10"), section.spots
    assert maps.genes == GENES and maps.grid == section.grid(10)
    counts = spots.select(GENES).toarray()
    added = spots.measurement(maps.grid).add_up(maps.read())
    assert np.abs(added - counts).sum(0).max() <= 1e-3 * counts.sum(0).max()
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
    np.testing.assert_allclose(coarse, summed, rtol=2e-3, atol=1e-5)


def test_same_seed_same_bits_whatever_the_order_and_the_blocks(store, any_model, monkeypatch):
    path = store()
    superres(path, model=any_model, genes=GENES, seed=5, name="one")
    superres(path, model=any_model, genes=GENES, seed=5, name="again")
    np.testing.assert_array_equal(read(path, "one"), read(path, "again"))
    np.testing.assert_array_equal(read(path, "one_sd"), read(path, "again_sd"))
    monkeypatch.setattr(superresolution_run, "_GENES_AT_ONCE", 2)
    monkeypatch.setattr(superresolution_run, "MEMORY_BYTES", 1)
    many = GENES[::-1] + [g for g in open_section(path).spots.genes if g not in GENES][:14]
    superres(path, model=any_model, genes=many, seed=5, name="two")
    superres(path, model=any_model, genes=GENES, seed=6, name="three")
    for suffix in ("", "_sd"):
        one, two = read(path, "one" + suffix), read(path, "two" + suffix, GENES)
        np.testing.assert_allclose(
            one, two, rtol=1e-4 if suffix else 1e-5, atol=2e-6 if suffix else 1e-7
        )  # a spread is a difference
    assert not np.allclose(read(path, "one_sd"), read(path, "three_sd"), rtol=1e-2)


def test_a_region_is_a_part_of_the_whole_map(store, any_model):
    path = store("xenium")
    superres(path, model=any_model, genes=GENES, consistency=False, name="whole")
    superres(path, model=any_model, genes=GENES, consistency=False, region=(110, 90, 390, 280), name="part")
    part = open_section(path).map("part")
    assert part.grid.height % 10 == 0 and part.grid.bounds_um[0] <= 110
    whole = open_section(path).map("whole").read(window=part.grid)
    assert np.corrcoef(whole.ravel(), part.read().ravel())[0, 1] > 0.9  # tiles lie elsewhere, noise does not


def test_without_spots_the_image_is_enough(store, any_model):
    path = store()
    result = superres(path, model=any_model, genes=["GATA3"], use_lr=False, samples=1)
    assert result.consistency_error is None
    maps = read(path)
    assert np.isfinite(maps).all() and maps.max() > 0
    with pytest.raises(UsageError, match="CD68"):
        superres(path, model=any_model, genes=["CD68"], use_lr=False, overwrite=True)


def test_genes_outside_the_panel_follow_their_look_alikes(store, any_model):
    path = store()
    result = superres(path, model=any_model, genes=["CD68", "LYZ"], samples=1)
    assert any("not in the model's panel" in note for note in result.notes)
    assert open_section(path).provenance["superres_x10"]["genes_outside_panel"] == 1


def test_baselines_need_no_model(store):
    path = store()
    result = superres(path, method="bicubic", genes=["all"])
    assert result.spread is None and result.consistency_error < 1e-3
    assert open_section(path).map("superres_x10").genes == open_section(path).spots.genes


def test_a_section_smaller_than_a_tile(tmp_path, model):
    write_visium(simulate_tissue(260, 230, seed=1), tmp_path / "small")
    path = prepare(tmp_path / "small", tmp_path / "small.zarr")
    assert superres(path, model=model, genes=["LUM"]).consistency_error < 1e-3


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
    assert abs(theirs.sum() / ours.sum() - 1) < 0.05
    import spatialdata

    assert "superres_x10" in spatialdata.read_zarr(path).images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ["GATA33"]}, "did you mean GATA3"),
        ({"scale": 3}, "choose one of 10, 5, 2, 1"),
        ({"samples": 0}, "at least 1"),
        ({"region": (5000, 5000, 6000, 6000)}, "outside the section"),
        ({"region": (300, 0, 100, 100)}, "X0 < X1"),
        ({"name": "spots"}, "kept for measured data"),
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
    assert superres(path, method="bilinear", genes=["LUM"]).consistency_error < 1e-3


def test_output_leaves_the_section_alone(store, model, tmp_path):
    path = store()
    superres(path, model=model, genes=["LUM"], samples=1, output=tmp_path / "copy.zarr")
    assert "superres_x10" not in open_section(path).elements
    assert "superres_x10" in open_section(tmp_path / "copy.zarr").elements


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
