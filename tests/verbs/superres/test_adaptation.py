"""Training a model on the slide's own spots."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from stsr import checkpoint
from stsr.errors import UsageError
from stsr.methods import method_class
from stsr.progress import silent
from stsr.signals import interruptible
from stsr.store.section import open_section
from stsr.verbs.superres import adaptation, own_spots
from stsr.verbs.superres.adaptation import adapt, wanted_adaptation
from stsr.verbs.superres.job import make_job
from stsr.verbs.superres.loading import load
from stsr.verbs.superres.own_spots import Schedule, Slide, Training
from stsr.verbs.superres.spots import with_denoised
from stsr.verbs.superres.tiles import Tile
from stsr.verbs.superres.verb import superres

GENES = ["GATA3", "LUM", "LYZ", "EPCAM", "POSTN"]
SCHEDULE = Schedule(steps=6, tiles=1, learning_rate=5e-3, check_every=3)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The simulated slide has some forty spots."""
    monkeypatch.setattr(own_spots, "LEAST_SPOTS", 20)
    monkeypatch.setattr(adaptation, "LEAST_SPOTS", 20)
    monkeypatch.setattr(adaptation, "LEAST_SPOTS_FRESH", 1000)
    monkeypatch.setattr(adaptation, "TUNE", SCHEDULE)


@pytest.fixture(scope="module")
def model(tissue, tmp_path_factory):
    """A small U-Net with new weights."""
    torch.manual_seed(0)
    chosen = method_class("unet")
    config = chosen.Config(tile_lr=4, overlap_lr=2, widths=(8, 8), factors=4, lr_channels=8, views=4)
    method = chosen(config, tuple(tissue.genes), np.full(len(tissue.genes), 5.0))
    return checkpoint.save(tmp_path_factory.mktemp("m") / "m.safetensors", method, "unet", {})


@pytest.fixture
def section(visium_section):
    return open_section(visium_section)


def _maker(section):
    options = {
        "scale": 10,
        "genes": GENES,
        "use_lr": True,
        "seed": 0,
        "spots": "denoised",
        "consistency": "none",
        "base": "auto",
    }
    options |= dict.fromkeys(("samples", "region", "name"))

    def make(loaded, base="auto", kept=None, genes=GENES):
        return make_job(section, loaded, kept=kept, **options | {"genes": genes, "base": base})

    return make


def _loaded(section, model):
    return load(model, None, section, use_lr=True, device=torch.device("cpu"))


def _adapt(section, model, **options):
    usual = {"base": "auto", "steps": None, "minutes": 10, "seed": 0, "progress": silent}
    with interruptible() as interruption:
        loaded = _loaded(section, model)
        return loaded, adapt(
            loaded, _maker(section), section.spots, **usual | options, interruption=interruption
        )


def _weights(loaded):
    return torch.cat([value.flatten() for value in loaded.method.parameters()]).detach()


def test_training_on_the_slide_predicts_reserved_spots_better(section, model):
    loaded, found = _adapt(section, model)
    losses = found.record["loss_of_reserved_spots"]
    assert found.record["kept"] == "adapted" and losses["adapted"] < losses["unadapted"]
    assert found.loaded.method.config.views == loaded.method.config.views == 4
    assert (_weights(found.loaded) != _weights(loaded)).any()
    assert f"{found.record['reserved_spots']} reserved spots" in found.note


def test_a_model_that_gets_worse_is_not_kept(section, model, monkeypatch):
    monkeypatch.setattr(adaptation, "TUNE", replace(SCHEDULE, learning_rate=30.0))
    loaded, found = _adapt(section, model)
    assert found.record["kept"] == "unadapted" and found.loaded is loaded
    assert "not adapted" in found.note


def test_the_given_model_is_left_as_it_was(section, model):
    before = _weights(_loaded(section, model))
    loaded, found = _adapt(section, model)
    assert found.loaded is not loaded
    assert torch.equal(_weights(loaded), before)


def test_the_same_seed_gives_the_same_weights(section, model):
    first, second, other = (_adapt(section, model, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(_weights(first.loaded), _weights(second.loaded))
    assert not torch.equal(_weights(first.loaded), _weights(other.loaded))


def _trained(section, model, slide, change):
    """Weights after some steps, with the counts of some spots changed."""
    spots = section.spots
    counts = spots.counts.toarray()
    counts[change] = counts[change][:, ::-1] * 4
    section.__dict__["spots"] = replace(spots, counts=sp.csr_matrix(counts))
    try:
        job = with_denoised(_maker(section)(_loaded(section, model), kept=slide.kept), silent)
        training = Training(job, slide, SCHEDULE, seed=0)
        optimiser = torch.optim.SGD(training.method.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            training._tile_loss().backward()
            optimiser.step()
        return _weights(job.loaded)
    finally:
        section.__dict__["spots"] = spots


def test_reserved_spots_teach_nothing(section, model):
    slide = Slide.of(_maker(section)(_loaded(section, model)), seed=0)
    assert not set(slide.kept) & set(slide.reserved) and len(slide.reserved) > 2
    plain = _trained(section, model, slide, slide.kept[:0])
    assert torch.equal(_trained(section, model, slide, slide.reserved), plain)
    assert not torch.equal(_trained(section, model, slide, slide.kept[:5]), plain)


def test_spots_that_the_network_does_not_see_weigh_more(section, model, monkeypatch):
    slide = Slide.of(_maker(section)(_loaded(section, model)), seed=0)
    job = with_denoised(_maker(section)(_loaded(section, model), kept=slide.kept), silent)
    training = Training(job, slide, SCHEDULE, seed=0)
    shares = [seen.mean() for seen in training.visible]
    assert 0.5 < np.mean(shares) < 0.9
    state = training.rng.bit_generator.state
    usual = training._tile_loss().item()
    training.rng.bit_generator.state = state
    monkeypatch.setattr(own_spots, "HIDDEN_WEIGHT", 1.0)
    assert training._tile_loss().item() != usual


def test_the_loss_is_that_of_summed_maps(section, model):
    """Of a map that is the same everywhere, spots hold their area times its value."""
    slide = Slide.of(_maker(section)(_loaded(section, model)), seed=0)
    job = with_denoised(_maker(section)(_loaded(section, model), kept=slide.kept), silent)
    tile = Tile(0, 0, 40, 40)
    part, rows = own_spots._inside(job.measurement.matrix, job.grid.shape, tile)
    flat = part[rows] @ np.full(tile.height * tile.width, 2.0)
    np.testing.assert_allclose(flat, 2 * job.measurement.bins_seen[rows], rtol=1e-6)
    x, y = (job.measurement.centres_um[rows] - [job.grid.x0_um, job.grid.y0_um]).T
    assert ((x > 27) & (x < 373) & (y > 27) & (y < 373)).all() and len(rows) >= 8


def test_a_fresh_model_is_tried_where_there_are_enough_spots(section, model, monkeypatch):
    monkeypatch.setattr(adaptation, "LEAST_SPOTS_FRESH", 20)
    monkeypatch.setattr(adaptation, "FRESH", SCHEDULE)
    _, found = _adapt(section, model)
    assert set(found.record["loss_of_reserved_spots"]) == {
        "unadapted",
        "adapted",
        "trained on this slide alone",
        "kriged spots",
    }
    assert set(found.record["steps"].values()) <= {0, 3, 6}


def test_a_model_from_nothing_starts_from_kriged_spots(visium_section, fresh_copy, model, monkeypatch):
    monkeypatch.setattr(adaptation, "LEAST_SPOTS_FRESH", 20)
    monkeypatch.setattr(adaptation, "FRESH", replace(SCHEDULE, learning_rate=1e-3))
    monkeypatch.setattr(adaptation, "TUNE", replace(SCHEDULE, learning_rate=30.0))  # spoils the given model
    unadapted = Slide.loss

    def worse(self, job):
        return unadapted(self, job) + 1e6 * (job.loaded.model != "this slide")

    monkeypatch.setattr(Slide, "loss", worse)
    store = fresh_copy(visium_section)
    superres(store, model=model, genes=GENES, name="alone")
    superres(store, model=model, genes=GENES, base="raster", name="raster")
    made = open_section(store).provenance
    assert made["alone"]["adaptation"]["kept"] == "trained on this slide alone"
    assert (made["alone"]["base"], made["alone"]["method"], made["alone"]["model"]) == (
        "kriged",
        "unet",
        "this slide",
    )
    assert made["raster"]["base"] == "raster"


def test_kriged_spots_are_what_models_are_compared_with(section, model):
    _, one = _adapt(section, model)
    _, other = _adapt(section, model, base="raster")
    losses = [found.record["loss_of_reserved_spots"] for found in (one, other)]
    assert losses[0]["kriged spots"] == losses[1]["kriged spots"]
    # By hand: kriging from the spots that are kept, summed over the reserved ones.
    method = load(None, "kriged", section, use_lr=True, device=torch.device("cpu"))
    slide = Slide.of(_maker(section)(_loaded(section, model)), 0)
    scored, _ = adaptation._genes(section.spots, _loaded(section, model).method.panel)
    job = with_denoised(_maker(section)(method, kept=slide.kept, genes=scored), silent)
    maps = job.counts.kriged(scored, np.arange(len(slide.kept))).maps(job.grid)
    rate = np.maximum(section.spots.take(slide.reserved).measurement(job.grid).add_up(maps), 1e-6)
    counts = section.spots.select(scored)[slide.reserved].toarray()
    by_hand = (rate - counts * np.log(rate)).sum() / counts.sum()
    assert losses[0]["kriged spots"] == pytest.approx(by_hand, abs=2e-3)


@pytest.mark.parametrize(
    "without, said", [(0.5, "no better than --method kriged"), (2.0, "without image: 2.0000")]
)
def test_the_user_is_told_when_the_image_does_not_help(section, model, without, said):
    loaded = _loaded(section, model)
    found = [
        own_spots.Candidate(name, loaded, loss, 1) for name, loss in (("unadapted", 1.2), ("adapted", 1.0))
    ]
    assert said in adaptation._outcome(found, without, 10, "auto").note
    assert said in adaptation._outcome(found[:1], without, 10, "auto").note


def test_time_is_limited(section, model):
    found = _adapt(section, model, minutes=0)[1]
    assert max(found.record["steps"].values()) <= 1


def test_superres_adapts_and_keeps_the_model(visium_section, fresh_copy, model, tmp_path):
    store, kept = fresh_copy(visium_section), tmp_path / "kept.safetensors"
    made = superres(store, model=model, genes=GENES, adapt="auto", save_model=kept, name="adapted")
    plain = superres(store, model=model, genes=GENES, adapt="off", name="plain")
    again = superres(store, model=kept, genes=GENES, adapt="off", name="again")
    section = open_section(store)
    maps = {each.element: section.map(each.element).read(GENES) for each in (made, plain, again)}
    assert section.provenance["adapted"]["adaptation"]["kept"] == "adapted"
    assert any("reserved spots" in note for note in made.notes) and not plain.notes
    assert "adaptation" not in section.provenance["plain"]
    np.testing.assert_allclose(maps["again"], maps["adapted"], rtol=1e-5, atol=1e-7)
    assert np.abs(maps["plain"] - maps["adapted"]).max() > 1e-3 * maps["plain"].max()
    assert checkpoint.describe(kept)["provenance"]["trained_on"] == section.name


def test_a_gene_has_the_same_map_whatever_else_is_asked_for(visium_section, fresh_copy, model):
    store = fresh_copy(visium_section)
    superres(store, model=model, genes=["LUM"], adapt="auto", name="alone")
    superres(store, model=model, genes=GENES, adapt="auto", name="together")
    section = open_section(store)
    alone, together = (section.map(name).read(["LUM"]) for name in ("alone", "together"))
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-7)


def test_genes_to_compare_models_by(section, monkeypatch):
    spots = section.spots
    totals = dict(zip(spots.genes, spots.counts.sum(0).A1, strict=True))
    monkeypatch.setattr(adaptation, "SCORED_GENES", 3)
    monkeypatch.setattr(adaptation, "FRESH_GENES", 6)
    monkeypatch.setattr(adaptation, "LEAST_KNOWN_GENES", 3)
    most = sorted(spots.genes, key=lambda gene: -totals[gene])
    scored, fresh = adaptation._genes(spots, tuple(most[3:7]))
    assert set(scored) == set(most[3:6])  # of the panel, those with the most counts
    assert set(fresh) == set(most[:6])
    scored, fresh = adaptation._genes(spots, tuple(most[5:7]))
    assert set(scored) == set(most[:3]) and set(fresh) == {*most[:4], *most[5:7]}
    renamed = replace(spots, genes=[{most[0]: "MT-ND1"}.get(gene, gene) for gene in spots.genes])
    scored, fresh = adaptation._genes(renamed, ())
    assert set(scored) == set(most[1:4]) and set(fresh) == set(most[1:7])


def test_auto_leaves_sums_alone(xenium_section, fresh_copy, model):
    store = fresh_copy(xenium_section)
    superres(store, model=model, genes=GENES, adapt="auto", name="s")
    assert "adaptation" not in open_section(store).provenance["s"]


def test_auto_leaves_bins_and_few_spots_alone(section, model, monkeypatch):
    job = _maker(section)(_loaded(section, model))
    assert adaptation.adaptable(job)
    bins = replace(job.counts, spots=replace(job.counts.spots, size_um=16.0))
    assert not adaptation.adaptable(replace(job, counts=bins))
    monkeypatch.setattr(adaptation, "LEAST_SPOTS", 10_000)
    assert not adaptation.adaptable(job)


@pytest.mark.parametrize("wrong", ["yes", "-3", "0", "1.5"])
def test_bad_values(wrong):
    with pytest.raises(UsageError, match="off, auto or a number"):
        wanted_adaptation(wrong)


def test_what_cannot_be_adapted_is_refused(visium_section, fresh_copy, model, monkeypatch):
    store = fresh_copy(visium_section)
    with pytest.raises(UsageError, match="cannot be adapted"):
        superres(store, method="bilinear", genes=GENES, adapt=10)
    with pytest.raises(UsageError, match="no model is adapted"):
        superres(store, model=model, genes=GENES, adapt="off", save_model="x.safetensors")
    with pytest.raises(UsageError, match="there are none"):
        superres(store, model=model, genes=GENES, adapt=10, use_lr=False)
    monkeypatch.setattr(own_spots, "LEAST_SPOTS", 10_000)
    with pytest.raises(UsageError, match="at least 10000 spots"):
        superres(store, model=model, genes=GENES, adapt=10)
