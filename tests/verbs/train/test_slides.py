"""Training on sections of which only spots were measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import stsr
from stsr import checkpoint
from stsr.errors import StsrError, UsageError
from stsr.methods import method_class
from stsr.methods.batch import SpotTargets
from stsr.methods.regression import poisson_of_spots
from stsr.store.section import open_section
from stsr.verbs.train.augmentation import turned
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.slides import HIDDEN_WEIGHT, SlideTiles

GENES = ("GATA3", "LUM", "LYZ", "EPCAM", "POSTN", "CD68")
CONFIG = TrainConfig(train_tile_lr=3, batch=3, genes=GENES, stain=0.0)
NEEDS = method_class("unet").Config().requirements(())
TINY = {"widths": [8, 8], "factors": 4, "lr_channels": 8, "train_tile_lr": 3, "batch": 2, "tile_lr": 3,
        "overlap_lr": 1, "genes_per_step": 10, "validate_every": 5, "warmup": 5, "image_um": 10.0}  # fmt: skip


@pytest.fixture(scope="module")
def section(visium_section):
    return open_section(visium_section)


@pytest.fixture(scope="module")
def tiles(section):
    return SlideTiles([section], NEEDS, CONFIG, seed=1)


def drawn(tiles, seed=0, size=3):
    return tiles.batch(size, torch.Generator().manual_seed(seed))


def test_loss_of_hand_made_spots():
    # two bins of rates 2 and 3: spot 1 covers the first and half of the second, spot 2 is not there
    maps = torch.tensor([[[[2.0, 3.0]]]])
    targets = SpotTargets(
        torch.tensor([[[[1.0, 0.5]], [[0.0, 0.0]]]]), torch.tensor([[[4.0, 0.0]]]), torch.tensor([[2.0, 0.0]])
    )
    assert targets.sums(maps)[0, 0].tolist() == [3.5, 0.0]
    # weight 2 x (3.5 - 4 log 3.5), per weighted bin: 2 x 1.5
    found = poisson_of_spots(maps, targets, torch.ones(1, 1))
    assert float(found) == pytest.approx(2 * (3.5 - 4 * np.log(3.5)) / 3)
    assert float(poisson_of_spots(maps, targets, torch.zeros(1, 1))) == 0


def test_a_tile_holds_what_its_spots_measured(tiles, section):
    slide = tiles.slides[0]
    counts = section.spots.select(GENES).toarray()
    known = {tuple(row) for row in counts.astype(int).tolist()}
    for seed in range(5):
        batch = drawn(tiles, seed)
        assert batch.hr is None
        assert batch.targets.counts.shape[:2] == (3, len(GENES))
        there = batch.targets.weight > 0
        assert there.any(1).all()
        covered = batch.targets.over.sum((2, 3))
        assert covered[there].numpy() == pytest.approx(np.full(int(there.sum()), np.pi * 2.75**2), rel=1e-2)
        assert (covered[~there] == 0).all()
        for tile in range(3):
            measured = batch.targets.counts[tile].T[there[tile]].int().tolist()
            assert {tuple(row) for row in measured} <= known
    assert set(np.unique(batch.targets.weight)) <= {0.0, 1.0, HIDDEN_WEIGHT}
    assert len(slide.counts) <= len(counts)


@pytest.mark.parametrize("turn", range(8))
def test_image_spots_and_targets_turn_together(tiles, turn):
    first = tiles._drawn(0, *tiles.slides[0].starts[0].tolist(), np.random.default_rng(0))
    plain, other = (tiles._assemble([replace(first, turn=each)]) for each in (0, turn))
    values = torch.arange(900.0).reshape(1, 1, 30, 30)
    moved = torch.from_numpy(np.ascontiguousarray(turned(values.numpy(), turn)))
    torch.testing.assert_close(other.targets.sums(moved), plain.targets.sums(values))
    np.testing.assert_array_equal(other.image[0], turned(plain.image[0].numpy(), turn))
    np.testing.assert_array_equal(other.lr[0], turned(plain.lr[0].numpy(), turn))


def test_reserved_spots_are_validated_and_never_trained_on(section):
    tiles = SlideTiles([section], NEEDS, CONFIG, seed=1, val=0.3)
    slide = tiles.slides[0]
    assert 0.1 < slide.reserved.mean() < 0.5
    reserved = {tuple(row) for row in slide.counts[slide.reserved].tolist()}
    others = {tuple(row) for row in slide.counts[~slide.reserved].tolist()}
    trained, validated = set(), set()
    for into, batches in (
        (trained, [drawn(tiles, n) for n in range(20)]),
        (validated, tiles.validation_batches(4)),
    ):
        for batch in batches:
            for tile in range(len(batch)):
                into |= {
                    tuple(row)
                    for row in batch.targets.counts[tile].T[batch.targets.weight[tile] > 0].tolist()
                }
    assert not trained & (reserved - others)
    assert not validated & (others - reserved)
    assert validated
    # Counts of reserved spots change nothing that is read.
    spoiled = open_section(section.path)
    spots = spoiled.spots
    hidden = np.flatnonzero(np.isin(spots.centres_um[:, 0] + 1e6 * spots.centres_um[:, 1],
                                    (slide.measurement.centres_um @ [1, 1e6])[slide.reserved]))  # fmt: skip
    counts = spots.counts.tolil()
    counts[hidden] = 100
    spoiled.__dict__["spots"] = replace(spots, counts=counts.tocsr())
    again = SlideTiles([spoiled], NEEDS, CONFIG, seed=1, val=0.3)
    np.testing.assert_allclose(again.slides[0].whole.lr, slide.whole.lr, rtol=1e-5)
    assert again.digest != tiles.digest


def test_excluded_areas_have_no_spots(section):
    x = section.spots.centres_um[:, 0]
    most = float(np.quantile(x, 0.7))
    regions = {section.name: {"exclude": [[most, -100, 5000, 5000]]}}
    tiles = SlideTiles([section], NEEDS, CONFIG, regions=regions)
    assert tiles.slides[0].measurement.centres_um[:, 0].max() < most + 10
    with pytest.raises(StsrError, match="20 are needed"):
        SlideTiles([section], NEEDS, CONFIG, regions={section.name: {"exclude": [[0, -100, 5000, 5000]]}})


def test_the_panel_is_what_was_counted_most(section):
    tiles = SlideTiles([section], NEEDS, replace(CONFIG, genes=3))
    totals = np.asarray(section.spots.counts.sum(0)).ravel()
    assert set(tiles.panel) == {section.spots.genes[index] for index in np.argsort(-totals)[:3]}


def test_train_on_spots_resume_and_predict(visium_section, fresh_copy, tmp_path):
    store = fresh_copy(visium_section, "section.zarr")
    output = tmp_path / "own.safetensors"
    stsr.train([store], output, config=TINY, steps=25, val=0.2)
    made = checkpoint.load(output)
    assert made.name == "unet"
    log = (tmp_path / "own.run" / "log.jsonl").read_text()
    assert "val_pcc" in log
    again = tmp_path / "again.safetensors"
    stsr.train([store], again, config=TINY, steps=25, val=0.2)
    assert checkpoint.digest(again) == checkpoint.digest(output)
    result = stsr.superres(store, model=output, genes=["LUM"], adapt="off")
    assert result.genes == 1
    # Started from it, with its settings and panel.
    more = tmp_path / "more.safetensors"
    stsr.train([store], more, steps=3, init=output, settings=["train_tile_lr=3", "batch=2"])
    assert checkpoint.describe(more)["panel"] == list(made.method.panel)
    assert checkpoint.describe(more)["config"] == checkpoint.describe(output)["config"]


def test_training_lowers_the_loss_of_reserved_spots(section):
    """The network learns where genes are from the image: better than its start, which interpolates."""
    torch.manual_seed(0)
    chosen = method_class("unet")
    tiles = SlideTiles([section], NEEDS, CONFIG, seed=1, val=0.3)
    config = chosen.Config(widths=(8, 12), factors=5, lr_channels=8, lr_dropout=0.0)
    method = chosen(config, tiles.panel, tiles.reference)

    def loss():
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            return np.mean(
                [float(method.loss(batch, 1.0, generator)["loss"]) for batch in tiles.validation_batches(8)]
            )

    before = loss()
    optimiser = torch.optim.Adam(method.parameters(), 3e-3)
    for step in range(60):
        optimiser.zero_grad()
        method.loss(drawn(tiles, step), 0.0, torch.Generator().manual_seed(step))["loss"].backward()
        optimiser.step()
    assert loss() < before


def test_what_cannot_be_trained_on_spots_is_refused(visium_section, xenium_section, tmp_path):
    with pytest.raises(UsageError, match="c3diff needs counts per bin"):
        stsr.train([visium_section], tmp_path / "m.safetensors", method="c3diff")
    with pytest.raises(UsageError, match="train on either kind"):
        stsr.train([visium_section, xenium_section], tmp_path / "m.safetensors")
