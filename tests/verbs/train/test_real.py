"""Training tiles of real tissue, whose H&E is mirrored and slightly turned."""

import numpy as np
import pytest
import torch

from stsr.geometry.grid import add_up
from stsr.methods.batch import Requirements
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.tiles import TrainingTiles

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def section(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return open_section(prepare(real_data / "breast" / "xenium_same_he", folder / "same.zarr"))


@pytest.mark.parametrize("image_um", [2.0, 4.0, 10.0])
def test_tiles_are_crops_of_the_whole_section(section, image_um):
    config = TrainConfig(spots=("square",), stain=0, coarse=0, flips=False)
    tiles = TrainingTiles([section], Requirements((), image_um=image_um), config)
    whole = section.image.read(section.grid(10.0).at(image_um))
    counts = section.hr.read(list(tiles.panel), section.grid(10.0)).astype(np.float32)
    rng = np.random.default_rng(0)
    aligned = 0
    for section_number, row, column in tiles.sampler.draw(8, rng):
        batch = tiles._assemble([tiles._drawn(section_number, row, column, rng)])
        sums = add_up(torch.from_numpy(counts[:, row : row + 60, column : column + 60]), 10)
        measured = batch.lr_mask[0, 0] == 1
        assert torch.equal((batch.lr + add_up(batch.hr, 10))[0][:, measured], sums[:, measured])
        y, x, side = row * 10 / image_um, column * 10 / image_um, round(600 / image_um)
        if y == int(y) and x == int(x):  # at 4 um, tiles may begin within a pixel
            aligned += 1
            part = whole[:, int(y) : int(y) + side, int(x) : int(x) + side]
            assert np.array_equal(batch.image[0].numpy(), part)
    assert aligned


def test_denoised_spots_predict_the_other_half_better_than_raw_ones(section):
    """Gene by gene, at a third of the depth; spots and truth are of different halves either way."""

    def agreement(denoised):
        config = TrainConfig(
            spots=("visium",), stain=0, denoised=denoised, realisations=4, depths=(0.3,), genes=100
        )
        tiles = TrainingTiles([section], Requirements(()), config)
        batches = [tiles.batch(8, torch.Generator().manual_seed(seed)) for seed in range(12)]
        lr, hr = (
            torch.cat(parts).transpose(0, 1).flatten(1).numpy()
            for parts in zip(*((batch.lr, add_up(batch.hr, 10)) for batch in batches), strict=True)
        )
        return np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(lr, hr, strict=True)])

    raw, denoised = agreement(0.0), agreement(1.0)
    assert denoised > raw + 0.05
