"""superres on sections of Visium HD: bins of 16 um as spots, and maps in bins of 8 um."""

import numpy as np
import pytest

from stsr.errors import UsageError
from stsr.geometry.grid import add_up
from stsr.methods.batch import Requirements
from stsr.store import names
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.job import _factor
from stsr.verbs.superres.verb import superres
from stsr.verbs.train.verb import train

EIGHT = Requirements(("A",), bin_um=8.0, image_um=8.0, lr_um=96.0)


@pytest.fixture(scope="module")
def square(hd_folder):
    return hd_folder / "binned_outputs" / "square_008um"


def test_scales_of_bins_of_8_um():
    assert [_factor(scale, EIGHT) for scale in (12.5, 6.25, 4.16667, 3.125)] == [1, 2, 3, 4]
    with pytest.raises(UsageError, match=r"choose one of 12\.5, 6\.25, 4\.16667"):
        _factor(10, EIGHT)
    with pytest.raises(UsageError, match=r"choose one of 10, 5, 2, 1$"):
        _factor(float("nan"), Requirements(("A",)))
    for scale, bin_um in ((12.5, 8), (6.25, 16), (4.16667, 24), (10, 10)):
        assert names.bin_um_of(names.result_name("superres", scale)) == bin_um


def test_maps_in_bins_of_8_um_lie_on_the_measured_ones(square, tmp_path):
    store = prepare(square, tmp_path / "s.zarr", bin_um=8, spots="square", refine=False)
    genes = open_section(store).hr.genes[:3]
    done = superres(store, method="bicubic", scale=12.5, genes=genes, consistency="exact")
    section = open_section(store)
    maps = section.map(done.element)
    assert done.element == "superres_x12.5" and maps.grid == section.hr.grid
    assert section.provenance[done.element]["bin_um"] == 8
    inside = section.spots.measurement(maps.grid)
    kept = (inside.matrix @ ~section.support(maps.grid).ravel()) == 0
    assert kept.sum() > 5
    assert np.allclose(
        inside.add_up(maps.read())[kept], section.spots.select(genes).toarray()[kept], rtol=1e-3
    )
    coarse = superres(store, method="bicubic", scale=4.16667, genes=genes, consistency="none")
    fine = superres(store, method="bicubic", scale=12.5, genes=genes, consistency="none", name="fine")
    grid, added = section.hr.grid.at(24), add_up(open_section(store).map(fine.element).read(), 3)
    read = open_section(store).map(coarse.element)
    assert read.grid == grid
    both = (read.read() > 0) & (add_up(section.support(section.hr.grid).astype(int), 3) == 9)
    assert both.any() and np.allclose(read.read()[both], added[both], rtol=1e-4)


def test_a_model_of_bins_of_8_um_is_trained_and_used(square, tmp_path):
    store = prepare(square, tmp_path / "s.zarr", bin_um=8, spots="square", refine=False)
    tiny = {
        "steps": 2,
        "batch": 2,
        "train_tile_lr": 3,
        "tissue": 0,
        "widths": [8],
        "factors": 4,
        "tile_lr": 4,
    }
    config = {**tiny, "overlap_lr": 2, "bin_um": 8, "image_um": 2, "image_channels": 8, "genes": 5}
    model = train([store], tmp_path / "m.safetensors", method="unet", config=config, val=0)
    done = superres(store, model=model, scale=12.5)
    section = open_section(store)
    maps = section.map(done.element)
    assert maps.grid == section.hr.grid and maps.read().max() > 0
    with pytest.raises(UsageError, match=r"choose one of 12\.5"):
        superres(store, model=model, scale=10)


def test_own_bins_are_spots_that_maps_add_up_to(square, tmp_path):
    store = prepare(square, tmp_path / "s.zarr", spots="bins", refine=False)
    genes = open_section(store).hr.genes[:4]
    done = superres(store, method="bicubic", genes=genes, consistency="exact")
    section = open_section(store)
    maps = section.map(done.element).read()
    measured = section.spots.select(genes).toarray()
    added = section.spots.measurement(section.hr.grid).add_up(maps)
    assert done.consistency_error < 0.25  # bins of 10 um cannot add up to all bins of 16 um with few counts
    assert np.abs(added - measured).sum() < 0.25 * measured.sum()
    smooth = superres(store, method="bicubic", genes=genes, consistency="none", name="smooth")
    rough = section.spots.measurement(section.hr.grid).add_up(open_section(store).map(smooth.element).read())
    assert np.abs(rough - measured).sum() > 2 * np.abs(added - measured).sum()
