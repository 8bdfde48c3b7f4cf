"""Training and prediction see the same tile in the same way."""

import numpy as np
import pytest
import torch

from stsr.geometry.grid import add_up
from stsr.methods.batch import Requirements
from stsr.simulate import simulate_tissue, write_xenium
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.field import Field
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
    config = TrainConfig(train_tile_lr=3, spots=("square",), phases=1, tissue=0, stain=0, flips=False)
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
