"""Training and prediction see the same tile in the same way."""

import numpy as np
import pytest
import torch

from stsr.geometry.grid import add_up
from stsr.methods import method_class
from stsr.methods.batch import Requirements
from stsr.simulate import simulate_tissue, write_xenium
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.field import Field
from stsr.verbs.superres.job import make_job
from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.predict import Predictor
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.tiles import TrainingTiles


@pytest.fixture(scope="module", params=[{}, {"mirror": True, "turn_deg": 7}], ids=["straight", "turned"])
def section(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    write_xenium(simulate_tissue(620, 540, seed=3), folder / "xenium", labels=False, **request.param)
    return open_section(prepare(folder / "xenium", folder / "section.zarr"))


@pytest.mark.parametrize("image_um", [10.0, 5.0])
def test_training_and_prediction_build_equal_batches(section, image_um):
    needs = Requirements((), image_um=image_um)
    config = TrainConfig(
        train_tile_lr=3, spots=("square",), phases=1, tissue=0, stain=0, flips=False, coarse=0
    )
    tiles = TrainingTiles([section], needs, config, val=0)
    grid, panel = section.grid(needs.bin_um), list(tiles.panel)
    lr, mask = section.spots.measurement(grid).raster(section.spots.select(panel))
    field = Field(grid, section.image, lr, mask, np.eye(len(panel)), panel, needs.image_um)
    trained = tiles._sections[0]
    starts = tiles.sampler.places[0].starts
    assert trained.grid == grid and len(starts) > 3
    for number, (row, column) in enumerate(starts.tolist()):
        drawn = tiles._drawn(0, row, column, np.random.default_rng(number))
        learned = tiles._assemble([drawn])
        shown = field.batch(grid.window(row, column, tiles.side, tiles.side))
        assert learned.names == shown.names
        for part in ("image", "lr_mask", "has_lr", "genes"):
            assert torch.equal(getattr(learned, part), getattr(shown, part)), part
        assert torch.equal(learned.lr + add_up(learned.hr, 10), shown.lr)  # spots and truth are its halves
        torch.testing.assert_close(2 * learned.lr_mean, shown.lr_mean)
        assert learned.lr.max() > 0 and len(torch.unique(learned.image)) > 20


@pytest.mark.parametrize("absent", [False, True])
def test_panel_genes_that_the_spots_lack_are_marked(section, absent):
    panel = (*section.spots.genes[:3], *(["ABSENT"] if absent else []))
    chosen = method_class("unet")
    method = chosen(chosen.Config(widths=(8, 8), factors=2, lr_channels=4), panel).eval()
    loaded = Loaded(method=method, name="unet", model="m", digest=None, device=torch.device("cpu"))
    job = make_job(
        section,
        loaded,
        scale=10,
        genes=None,
        samples=None,
        use_lr=True,
        spots="raw",
        consistency="exact",
        base="auto",
        region=None,
        name=None,
        seed=0,
    )
    predictor = Predictor(job)
    window = job.grid.window(0, 0, 30, 30)
    measured = predictor._panel.batch(window).measured
    assert measured.tolist() == [[True, True, True, False]] if absent else measured is None
    assert predictor.field(slice(0, 2)).batch(window).measured is None
