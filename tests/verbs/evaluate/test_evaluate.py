import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import stsr
from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.methods import method_class
from stsr.signals import interruptible
from stsr.store.section import open_section
from stsr.verbs.evaluate import hiding
from stsr.verbs.evaluate.hiding import Hiding
from stsr.verbs.evaluate.verdict import sentence
from stsr.verbs.evaluate.ways import ADAPTED, BILINEAR, KRIGED, MODEL, WHITE, ways_of
from stsr.verbs.superres import adaptation, own_spots
from stsr.verbs.superres.loading import load
from stsr.verbs.superres.own_spots import Schedule

GENES = ["GATA3", "LUM", "LYZ", "EPCAM"]


@pytest.fixture(scope="module")
def model(tissue, tmp_path_factory):
    """A small U-Net with random weights."""
    torch.manual_seed(0)
    chosen = method_class("unet")
    config = chosen.Config(tile_lr=4, overlap_lr=2, widths=(8, 8), factors=4, lr_channels=8)
    method = chosen(config, tuple(tissue.genes), np.full(len(tissue.genes), 5.0))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return checkpoint.save(tmp_path_factory.mktemp("m") / "m.safetensors", method, "unet", {})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The simulated slide has some forty spots."""
    monkeypatch.setattr(own_spots, "LEAST_SPOTS", 15)
    monkeypatch.setattr(adaptation, "TUNE", Schedule(steps=4, tiles=1, learning_rate=5e-3, check_every=2))


def _hiding(section, model, interruption):
    device = torch.device("cpu")
    simple = [load(None, name, section, use_lr=True, device=device) for name in ("bilinear", "kriged")]
    loaded = load(model, None, section, use_lr=True, device=device)
    return Hiding(section, GENES, ways_of(*simple, loaded, "", adapt_steps=4), 0, interruption)


def test_hidden_counts_take_no_part(visium_section, model, monkeypatch):
    section = open_section(visium_section)
    spots = section.spots
    hidden = np.arange(1, len(spots.centres_um), 3)
    with interruptible() as interruption:
        before = _hiding(section, model, interruption).predict(hidden)
        changed = spots.counts.toarray()
        changed[hidden] = changed[hidden][:, ::-1] * 5
        monkeypatch.setitem(section.__dict__, "spots", replace(spots, counts=sp.csr_matrix(changed)))
        again = _hiding(section, model, interruption).predict(hidden)
        changed[0] *= 5  # a visible spot
        monkeypatch.setitem(section.__dict__, "spots", replace(spots, counts=sp.csr_matrix(changed)))
        other = _hiding(section, model, interruption).predict(hidden)
    for first, same, different in zip(before, again, other, strict=True):
        np.testing.assert_array_equal(same, first)
        assert np.nanmax(np.abs(different - first)) > 0


def test_every_way_is_another_map(visium_section, model):
    section = open_section(visium_section)
    with interruptible() as interruption:
        found = _hiding(section, model, interruption).predict(np.arange(5))
    for number, one in enumerate(found):
        assert one.shape == (5, len(GENES)) and np.isfinite(one).any()
        for other in found[:number]:
            assert np.nanmax(np.abs(one - other)) > 1e-3 * np.nanmax(one)


def test_predictions_are_those_of_superres_without_the_spots(visium_section, fresh_copy):
    """Of the way that needs no denoising, against a store from which the spots were removed."""
    section = open_section(visium_section)
    hidden = np.arange(0, len(section.spots.centres_um), 7)
    bilinear = load(None, "bilinear", section, use_lr=True, device=torch.device("cpu"))
    with interruptible() as interruption:
        found = Hiding(section, GENES, ways_of(bilinear, bilinear, None, "")[:1], 0, interruption).predict(
            hidden
        )[0]
    store = fresh_copy(visium_section)
    stripped = open_section(store)
    stripped.__dict__["spots"] = section.spots.take(
        np.setdiff1d(np.arange(len(section.spots.centres_um)), hidden)
    )
    from stsr.verbs.superres.job import make_job
    from stsr.verbs.superres.predict import predicted_maps

    options = {
        "scale": 10,
        "genes": GENES,
        "use_lr": True,
        "seed": 0,
        "spots": "raw",
        "consistency": "none",
        "base": "auto",
    }
    job = make_job(stripped, bilinear, **options | dict.fromkeys(("samples", "region", "name")))
    maps = np.where(section.support(job.grid), predicted_maps(job, slice(0, 4), lambda: None), 0)
    over = section.spots.take(hidden).measurement(job.grid)
    assert job.grid == section.grid(10.0)
    np.testing.assert_allclose(found, over.add_up(maps), rtol=1e-5, atol=1e-6)


def test_evaluate(visium_section, model, tmp_path):
    before = sorted(path.name for path in visium_section.rglob("*"))
    result = stsr.evaluate(visium_section, model=model, genes=GENES, folds=2)
    assert (result.genes, result.folds) == (4, 2)
    assert set(result.ways["hidden"]) == {"scattered", "blocks"}
    row = result.ways.set_index(["hidden", "way"]).loc[("scattered", KRIGED)]
    assert row["pcc_low"] < row["pcc"] < row["pcc_high"] and row["pcc_gain"] == 0
    assert len(result.per_gene) == len(result.ways) * 4
    assert result.verdict and result.best in set(result.ways["way"])
    assert result.options.startswith(("--method", "--model"))
    assert sorted(path.name for path in visium_section.rglob("*")) == before  # nothing is written
    again = stsr.evaluate(visium_section, model=model, genes=GENES, folds=2)
    pd.testing.assert_frame_equal(again.ways, result.ways)
    from stsr.verbs.evaluate.figure import evaluation_figure

    assert evaluation_figure(result, tmp_path / "e.png").stat().st_size > 20_000


def test_an_adapted_model_is_that_of_superres_without_the_hidden_spots(visium_section, model, monkeypatch):
    """The spots that adaptation sees are those of the fold, and it is asked for the given steps."""
    section = open_section(visium_section)
    hidden = np.arange(0, len(section.spots.centres_um), 4)
    seen = []

    def spied(loaded, make, spots, **options):
        seen.append((spots, options["steps"]))
        return adaptation.adapt(loaded, make, spots, **options)

    monkeypatch.setattr(hiding, "adapt", spied)
    with interruptible() as interruption:
        whole = _hiding(section, model, interruption)
        found = dict(zip([way.label for way in whole.ways], whole.predict(hidden), strict=True))
    ((spots, steps),) = seen
    assert steps == 4
    kept = np.setdiff1d(np.arange(len(section.spots.centres_um)), hidden)
    np.testing.assert_array_equal(spots.centres_um, section.spots.centres_um[kept])
    assert np.nanmax(np.abs(found[ADAPTED] - found[MODEL])) > 0


def test_a_section_without_image_compares_interpolations(visium_section, fresh_copy):
    store = fresh_copy(visium_section)
    section = open_section(store)
    result = stsr.evaluate(store, image=False, genes=GENES, folds=2)
    assert set(result.ways["way"]) == {"bilinear, raw", BILINEAR, KRIGED}
    assert "H&E" not in result.verdict and section.image is not None


def test_options_are_accepted_by_superres(visium_section, fresh_copy):
    """What is printed can be given to `stsr superres`."""
    from typer.testing import CliRunner

    from stsr.cli.app import app

    store = fresh_copy(visium_section)
    table = store.with_suffix(".csv")
    runner = CliRunner()
    asked = ["evaluate", str(store), "--no-image", "--folds", "2", "--genes", "LUM,LYZ", "-o", str(table)]
    printed = runner.invoke(app, asked, catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    options = printed.stdout.strip().splitlines()[-1].split()
    made = runner.invoke(app, ["superres", str(store), "--genes", "LUM", *options], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    assert set(pd.read_csv(table)["gene"]) == {"LUM", "LYZ"}
    record = runner.invoke(app, [*asked[:-2], "--json"], catch_exceptions=False)
    assert json.loads(record.stdout)["options"] == " ".join(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"folds": 1}, "at least 2"), ({"folds": 500}, "needs at least"), ({"genes": ["NOGENE"]}, "NOGENE")],
)
def test_bad_input(visium_section, options, message):
    with pytest.raises((UsageError, StsrError), match=message):
        stsr.evaluate(visium_section, image=False, **options)


def _table(scattered, low):
    rows = []
    for kind in ("scattered", "blocks"):
        for way, pcc in scattered.items():
            gain = pcc - scattered[KRIGED]
            rows.append(
                {
                    "way": way,
                    "hidden": kind,
                    "options": "" if way == WHITE else f"--as {way}",
                    "pcc": pcc,
                    "pcc_gain": gain,
                    "pcc_gain_low": gain - low,
                    "pcc_gain_high": gain + low,
                }
            )
    return pd.DataFrame(rows)


def test_the_verdict_names_the_best_way_if_it_is_ahead():
    scores = {BILINEAR: 0.39, KRIGED: 0.4, MODEL: 0.45, WHITE: 0.39}
    best, text = sentence(_table(scores, 0.02), "slide")
    assert best == MODEL and f"stsr superres --as {MODEL}" in text and "+0.050" in text
    assert "H&E changes the model's PCC by +0.060" in text
    best, text = sentence(_table(scores, 0.08), "slide")
    assert best == KRIGED and "beyond chance" in text and f"--as {KRIGED}" in text
    best, _ = sentence(_table({**scores, WHITE: 0.9}, 0.02), "slide")
    assert best == MODEL  # a white image is a test, not an option


def test_simulated_tissue_keeps_its_store(visium_section, tmp_path):
    """A store without write permission can be evaluated."""
    store = shutil.copytree(visium_section, tmp_path / "v.zarr")
    store.chmod(0o555)
    assert stsr.evaluate(store, image=False, genes=GENES, folds=2).spots > 0
    store.chmod(0o755)
