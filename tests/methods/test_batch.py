"""Batches: hiding spots, choosing genes, cutting windows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stsr.geometry.grid import Grid
from stsr.methods.batch import Batch, Requirements, cut, lr_mean
from stsr.methods.method import interpolated
from stsr.verbs.superres.field import Field


def make(tiles=2, genes=3):
    rng = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.randint(0, 256, (tiles, 3, 20, 20), generator=rng, dtype=torch.uint8),
        lr=torch.rand(tiles, genes, 2, 2, generator=rng) + 1,
        lr_mask=torch.ones(tiles, 1, 2, 2),
        has_lr=torch.ones(tiles, dtype=torch.bool),
        lr_mean=torch.rand(tiles, genes, generator=rng),
        genes=torch.eye(genes),
        names=tuple("ABCDEF"[:genes]),
        hr=torch.rand(tiles, genes, 20, 20, generator=rng),
    )


def test_hidden_spots_leave_nothing_and_other_tiles_alone():
    batch = make()
    hidden = batch.without_lr(torch.tensor([True, False]))
    assert hidden.lr[0].sum() == 0 and hidden.lr_mask[0].sum() == 0
    assert hidden.has_lr.tolist() == [False, True]
    assert torch.equal(hidden.lr[1], batch.lr[1]) and torch.equal(hidden.hr, batch.hr)


def test_some_genes_in_any_order():
    batch = make()
    part = batch.of_genes(torch.tensor([2, 0]))
    assert part.names == ("C", "A")
    assert torch.equal(part.lr[:, 0], batch.lr[:, 2]) and torch.equal(part.hr[:, 1], batch.hr[:, 0])
    assert torch.equal(part.genes, torch.eye(3)[[2, 0]]) and torch.equal(
        part.lr_mean[:, 0], batch.lr_mean[:, 2]
    )


def test_the_base_goes_with_its_tiles_and_genes():
    base = torch.rand(2, 3, 20, 20)
    batch = replace(make(), base=base)
    assert torch.equal(batch.of_genes(torch.tensor([2, 0])).base, base[:, [2, 0]])
    assert torch.equal(batch.of_tiles(slice(1, 2)).base, base[1:])
    assert batch.to("cpu").base is base
    assert make().of_genes(torch.tensor([0])).base is None and make().of_tiles(slice(1)).base is None


def test_the_base_is_what_spots_say_where_they_are_shown():
    base = torch.rand(2, 3, 20, 20)
    plain = make()
    batch = replace(plain, base=base)
    assert torch.equal(interpolated(batch, batch.lr_mean, 10), base)
    drop = torch.tensor([True, False])
    hidden, bare = batch.without_lr(drop), plain.without_lr(drop)
    assert not hidden.base[0].any() and torch.equal(hidden.base[1], base[1])
    found = interpolated(hidden, batch.lr_mean, 10)
    assert torch.equal(found[0], interpolated(bare, batch.lr_mean, 10)[0]) and found[0].any()
    assert torch.equal(found[1], base[1])


def test_cut_is_zero_outside():
    raster = np.arange(1.0, 13).reshape(1, 3, 4)
    window = cut(raster, -1, 2, 3, 4)
    assert window.shape == (1, 3, 4)
    assert window[0].tolist() == [[0, 0, 0, 0], [3, 4, 0, 0], [7, 8, 0, 0]]
    assert not cut(raster, 9, 9, 2, 2).any()


def test_mean_is_over_what_was_measured():
    lr = np.array([[[4.0, 8.0], [0.0, 0.0]]], np.float32)
    assert lr_mean(lr, np.array([[[1.0, 1.0], [0.0, 0.0]]])) == pytest.approx([6.0])
    assert lr_mean(lr, np.array([[[1.0, 0.5], [0.0, 0.0]]])) == pytest.approx([8 / 1.5])
    assert lr_mean(lr, np.zeros((1, 2, 2))).tolist() == [0.0]


def test_field_cuts_the_same_place_from_all():
    class Picture:
        def read(self, grid):
            columns = (grid.centres_um()[0] / 10).astype(np.uint8)
            return np.broadcast_to(columns, (3, *grid.shape))

    grid = Grid(0, 0, 10, 40, 50)
    lr = np.arange(40, dtype=np.float32).reshape(2, 4, 5)
    field = Field(grid, Picture(), lr, np.ones((1, 4, 5), np.float32), np.eye(2), ["A", "B"], 10.0)
    batch = field.batch(grid.window(10, 20, 20, 20))
    assert batch.lr[0, 0].tolist() == [[7, 8], [12, 13]]
    assert batch.image[0, 0, 0].tolist() == list(range(20, 40))
    assert batch.has_lr.all() and batch.hr is None
    bare = Field(grid, Picture(), None, None, np.eye(2), ["A", "B"], 10.0).batch(grid)
    assert not bare.has_lr.any() and bare.lr.shape == (1, 2, 4, 5) and not bare.lr_mask.any()


def test_requirements_count_bins():
    assert Requirements((), bin_um=20, image_um=5).per_lr == 5
    assert Requirements((), bin_um=20, image_um=5).image_per_lr == 20
    with pytest.raises(ValueError, match="nest"):
        Requirements((), bin_um=30).per_lr  # noqa: B018
