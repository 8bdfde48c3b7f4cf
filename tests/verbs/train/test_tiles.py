"""Training tiles: image, spots and counts belong together, and held-out areas are never touched."""

import numpy as np
import pytest
import torch
import zarr

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.histology.image import Image
from stsr.methods.batch import Requirements
from stsr.methods.method import configured
from stsr.store import elements, names, publishing
from stsr.store.section import open_section
from stsr.verbs.train.augmentation import turned
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.heldout import (
    Rectangle,
    choose_block,
    far_from,
    shifts_of,
    widest_gap,
    window_shares,
    window_starts,
)
from stsr.verbs.train.tiles import TrainingTiles

NEEDS = Requirements(())
GENES = ["A", "B", "C", "D", "E"]


class Maps:
    def __init__(self, grid, genes, counts):
        self.grid, self.genes, self.counts = grid, list(genes), counts
        self.reads = []

    def read(self, genes=None, window=None):
        window = window or self.grid
        index = [self.genes.index(gene) for gene in genes or self.genes]
        row, column = self.grid.offset_of(window)
        whole = np.zeros((len(index), *window.shape), self.counts.dtype)
        part = self.counts[index, row : row + window.height, column : column + window.width]
        whole[:, : part.shape[1], : part.shape[2]] = part
        return whole


class Picture:
    """Red is the first gene's count, so that image and counts can be compared bin by bin."""

    px_to_um = np.eye(3)

    def __init__(self, maps):
        self.maps = maps

    def covered(self, grid):
        return np.ones(grid.shape, bool)

    def read(self, grid):
        red = self.maps.read(self.maps.genes[:1], grid)[0]
        return np.stack([red, 2 * red, 255 - red]).astype(np.uint8)


class Everywhere:
    def __init__(self, mask):
        self.mask = mask

    def read(self, grid):
        return self.mask


class FakeSection:
    """A section in memory with the interface of `stsr.store.section.Section`."""

    unseen = None

    def __init__(self, name="one", lr=(16, 14), genes=GENES, bin_um=10.0, seed=0, tissue=None, organ=None):
        rng = np.random.default_rng(seed)
        per_lr = round(100 / bin_um)
        grid = Grid(1000.0, -500.0, bin_um, lr[0] * per_lr, lr[1] * per_lr)
        rates = np.linspace(0.1, 1.5, len(genes))[::-1, None, None]
        self.name = name
        self.hr = Maps(grid, genes, rng.poisson(rates, (len(genes), *grid.shape)).astype(np.uint16))
        self.image = Picture(self.hr)
        self.tissue = None if tissue is None else Everywhere(tissue)
        self.organ, self.divided_from_um = organ, 0.0

    def grid(self, bin_um):
        return self.hr.grid.at(bin_um)


def tiles_of(sections, needs, *, val=0.15, regions=None, **settings):
    """Training tiles of 300 um, unless ``train_tile_lr`` says otherwise, with these settings of training."""
    config = configured(TrainConfig, {"train_tile_lr": 3, **settings})
    return TrainingTiles(sections, needs, config, val=val, regions=regions)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def places(tiles, batch, section):
    """First bins of a batch's tiles, found by their image, which is the first gene's count; unturned tiles only."""
    first = section.hr.counts[0]
    corners = np.lib.stride_tricks.sliding_window_view(first, (1, tiles.side))[: -tiles.side + 1, :, 0]
    found = []
    for tile in batch.image.numpy():
        rows, columns = np.nonzero((corners == tile[0, 0]).all(2))  # windows with the tile's first row
        assert len(rows) == 1
        found.append((int(rows[0]), int(columns[0])))
    return found


def test_everything_has_the_shape_of_a_batch():
    tiles = tiles_of([FakeSection(), FakeSection("two", (12, 12), seed=1)], NEEDS)
    batch = tiles.batch(4, generator())
    assert batch.image.shape == (4, 3, 30, 30) and batch.image.dtype == torch.uint8
    assert batch.hr.shape == (4, 5, 30, 30) and batch.hr.dtype == torch.float32
    assert batch.lr.shape == (4, 5, 3, 3) and batch.lr_mask.shape == (4, 1, 3, 3)
    assert batch.lr_mean.shape == (4, 5) and batch.has_lr.all()
    assert torch.equal(batch.genes, torch.eye(5)) and batch.names == tuple(GENES) == tiles.panel


def test_spots_and_truth_are_halves_of_the_counts_however_tiles_are_turned():
    tiles = tiles_of([FakeSection()], NEEDS, spots=["square"], stain=0)
    for seed in range(4):
        batch = tiles.batch(6, generator(seed))
        counts = batch.image[:, 0].float()  # of the first gene
        assert torch.equal(batch.lr[:, 0] + add_up(batch.hr[:, 0], 10), add_up(counts, 10))
        assert torch.equal(batch.image[:, 1].float(), 2 * counts)
        assert (batch.hr[:, 0] <= counts).all() and 0.45 < batch.hr[:, 0].sum() / counts.sum() < 0.55
        assert (batch.lr_mask == 1).all()


def test_spots_and_truth_share_no_noise():
    tiles = tiles_of([FakeSection(lr=(20, 20))], NEEDS, spots=["square"], val=0)
    batches = [tiles.batch(8, generator(seed)) for seed in range(8)]
    lr = (
        torch.cat([batch.lr for batch in batches]).transpose(0, 1).flatten(1)
    )  # (g, pixels): Poisson noise alone
    hr = torch.cat([add_up(batch.hr, 10) for batch in batches]).transpose(0, 1).flatten(1)
    shared = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(lr, hr, strict=True)]
    assert abs(np.mean(shared)) < 0.1
    spread = (lr.var(1) / lr.mean(1)).mean()
    assert 0.8 < spread < 1.2  # a half has the noise of its own depth


def test_a_section_may_have_no_validation_area():
    own = FakeSection(lr=(20, 20))
    tiles = tiles_of([own], NEEDS, val=0, regions={own.name: {"validation": []}})
    assert tiles.validation_count == 0


def test_halves_are_drawn_anew_at_each_step():
    tiles = tiles_of([FakeSection(lr=(3, 3))], NEEDS, val=0, flips=False, stain=0)
    a, b = tiles.batch(1, generator(0)), tiles.batch(1, generator(1))
    assert torch.equal(a.image, b.image) and not torch.equal(a.hr, b.hr) and not torch.equal(a.lr, b.lr)


def test_fixed_halves_of_fractions_change_places():
    section = FakeSection(lr=(5, 5))
    counts = section.hr.counts.astype(np.float32) * 0.75
    section.hr.counts = counts
    section.unseen = Maps(section.hr.grid, GENES, counts * np.float32(0.25))
    section.image = Picture(FakeSection(lr=(5, 5)).hr)
    tiles = tiles_of([section], NEEDS, spots=["square"], val=0, stain=0)
    batches = [tiles.batch(2, generator(seed)) for seed in range(6)]
    pixels = torch.cat([add_up(batch.image[:, 0].float(), 10) for batch in batches])
    lr, hr = (
        torch.cat(parts)
        for parts in zip(*((b.lr[:, 0], add_up(b.hr[:, 0], 10)) for b in batches), strict=True)
    )
    torch.testing.assert_close(lr + hr, 0.75 * pixels)
    share = (lr / (lr + hr)).mean((1, 2))
    assert set(share.numpy().round(3)) == {0.25, 0.75}
    mean = counts.mean((1, 2)) * 50
    np.testing.assert_allclose(batches[0].lr_mean[0], mean, rtol=1e-5)


def test_all_eight_ways_of_turning_occur():
    array = np.arange(9).reshape(3, 3)
    assert len({turned(array, turn).tobytes() for turn in range(8)}) == 8
    assert np.array_equal(turned(array, 0), array)


def test_visium_spots_are_raster_of_discs():
    tiles = tiles_of([FakeSection()], NEEDS, spots=["visium"], flips=False)
    batch = tiles.batch(6, generator())
    sums = add_up(batch.hr, 10)
    assert not torch.equal(batch.lr, sums)
    relative = batch.lr.sum((0, 2, 3)) / sums.sum((0, 2, 3))
    assert (relative[:2] - 1).abs().max() < 0.15  # a disc's density stands for its whole pixel


def test_section_mean_is_per_pixel():
    section = FakeSection()
    batch = tiles_of([section], NEEDS, spots=["square"], phases=1).batch(2, generator())
    mean = section.hr.counts.mean((1, 2)) * 50  # half of the counts of 100 bins
    np.testing.assert_allclose(batch.lr_mean[0], mean, rtol=1e-5)


def test_fine_bins_are_added_up_and_image_may_be_finer_than_bins():
    section = FakeSection(bin_um=5.0)
    tiles = tiles_of([section], Requirements((), bin_um=10, image_um=5), spots=["square"], stain=0, coarse=0)
    batch = tiles.batch(4, generator())
    assert batch.image.shape[-1] == 60
    counts = add_up(batch.image[:, 0].float(), 20)
    assert torch.equal(batch.lr[:, 0] + add_up(batch.hr[:, 0], 10), counts)


def test_a_share_of_the_tiles_looks_like_a_coarser_scan():
    section = FakeSection()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 320, 280)).astype(np.uint8)
    section.image = Image([pixels], np.array([[5.0, 0, 1000], [0, 5, -500], [0, 0, 1]]))

    def sharpness(coarse):
        """Mean difference of neighbouring pixels in each of 12 tiles."""
        needs = Requirements((), bin_um=10, image_um=5)
        image = tiles_of([section], needs, stain=0, coarse=coarse).batch(12, generator()).image
        return image.float().diff(dim=-1).abs().mean((1, 2, 3))

    sharp, some, every = sharpness(0), sharpness(0.5), sharpness(1)
    assert every.max() < sharp.min()
    assert 0 < (some < sharp.min()).sum() < 12


def test_a_panel_that_fits_no_memory_is_refused():
    section = FakeSection(genes=[f"g{number}" for number in range(10)])
    with pytest.raises(UsageError, match=r"with 10 genes takes 1\.1 GB; .* --set genes=1000"):
        tiles_of([section], NEEDS, batch=30000)
    assert len(tiles_of([section], NEEDS, batch=30000, genes=5).panel) == 5


def test_the_generator_alone_decides():
    tiles = tiles_of([FakeSection()], NEEDS)
    a, b, c = (tiles.batch(4, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(a.hr, b.hr) and torch.equal(a.image, b.image) and torch.equal(a.lr, b.lr)
    assert not torch.equal(a.hr, c.hr)


def test_tiles_of_a_batch_share_at_most_half():
    section = FakeSection(lr=(20, 20))
    tiles = tiles_of([section], NEEDS, flips=False, val=0, stain=0)
    for seed in range(5):
        found = places(tiles, tiles.batch(6, generator(seed)), section)
        for i, (row, column) in enumerate(found):
            for other_row, other_column in found[:i]:
                shared = max(0, 30 - abs(row - other_row)) * max(0, 30 - abs(column - other_column))
                assert shared <= 450


def test_small_sections_still_give_different_tiles():
    section = FakeSection(lr=(4, 5))
    tiles = tiles_of([section], NEEDS, flips=False, val=0, phases=1, stain=0)
    batch = tiles.batch(6, generator())
    assert len({tile.numpy().tobytes() for tile in batch.image}) == 6
    with pytest.raises(UsageError, match="smaller batch"):
        tiles.batch(7, generator())


def test_held_out_areas_are_never_touched():
    section = FakeSection(lr=(20, 16))
    x0, y0, _, _ = section.hr.grid.bounds_um
    regions = {
        "one": {
            "exclude": [[x0, y0, x0 + 430, y0 + 400]],
            "validation": [[x0 + 1000, y0 + 1400, x0 + 1600, y0 + 2000]],
        }
    }
    tiles = tiles_of([section], NEEDS, flips=False, regions=regions, gap_lr=1, stain=0)
    forbidden = np.zeros(section.hr.grid.shape, bool)
    forbidden[: 40 + 10, : 43 + 10] = True
    forbidden[140 - 10 :, 100 - 10 :] = True
    for seed in range(20):
        for row, column in places(tiles, tiles.batch(4, generator(seed)), section):
            assert not forbidden[row : row + 30, column : column + 30].any()
    held_out = [place for batch in tiles.validation_batches(4) for place in places(tiles, batch, section)]
    assert len(held_out) == tiles.validation_count == 16
    assert all(row >= 140 and column >= 100 for row, column in held_out)


def test_what_is_excluded_changes_nothing():
    regions = {"one": {"exclude": [[1000, -500, 1600, 100]]}}
    plain, other = FakeSection(), FakeSection()
    other.hr.counts[:, :60, :60] = 7
    a, b = (tiles_of([s], NEEDS, regions=regions) for s in (plain, other))
    assert np.array_equal(a.reference, b.reference)
    first, second = a.batch(4, generator()), b.batch(4, generator())
    for name in ("hr", "lr", "lr_mean"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_validation_beside_an_excluded_area_has_no_spots_from_it():
    """Discs reach beyond the tile, but not into what is excluded."""
    regions = {"one": {"exclude": [[1000, -500, 1600, 100]], "validation": [[1600, -500, 2400, 100]]}}
    section = FakeSection()
    section.hr.counts[:, :60, :60] = 200
    tiles = tiles_of([section], NEEDS, regions=regions, spots=["visium"])
    highest = max(float(batch.lr.max()) for batch in tiles.validation_batches())
    assert 0 < highest < 3 * section.hr.counts[:, 60:, 60:].mean((1, 2)).max() * 50


def test_automatic_validation_is_apart_and_the_same_each_time():
    section = FakeSection(lr=(30, 12))
    tiles = tiles_of([section], NEEDS, flips=False, val=0.2, stain=0)
    held_out = np.zeros(section.hr.grid.shape, bool)
    for batch in tiles.validation_batches():
        for row, column in places(tiles, batch, section):
            held_out[row : row + 30, column : column + 30] = True
    assert 0.15 < held_out.mean() < 0.4
    gap = tiles.gaps_lr[0] * 10
    near = Rectangle(*(int(v) for v in _bounds(held_out)))
    for seed in range(10):
        starts = np.array(places(tiles, tiles.batch(4, generator(seed)), section))
        assert not near.meets(starts, 30, gap).any()
    for a, b in zip(tiles.validation_batches(), tiles.validation_batches(), strict=True):
        assert torch.equal(a.hr, b.hr) and torch.equal(a.lr, b.lr)


def _bounds(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def test_tiles_lie_in_tissue():
    mask = np.zeros((160, 140), bool)
    mask[:, :70] = True
    tiles = tiles_of([section := FakeSection(tissue=mask)], NEEDS, flips=False, tissue=0.5, stain=0)
    for seed in range(10):
        for row, column in places(tiles, tiles.batch(3, generator(seed)), section):
            assert mask[row : row + 30, column : column + 30].mean() >= 0.5


def test_panel_is_all_genes_or_the_most_expressed_or_a_list():
    one, two = FakeSection(), FakeSection("two", genes=["E", "X", "C", "B"], seed=1)
    assert tiles_of([one, two], NEEDS).panel == ("A", "B", "C", "D", "E", "X")
    assert tiles_of([one, two], NEEDS, panel="shared").panel == ("B", "C", "E")
    assert tiles_of([one, two], NEEDS, genes=["X", "B"]).panel == ("X", "B")
    tiles = tiles_of([one], NEEDS, genes=2)
    assert tiles.panel == ("A", "B")  # rates fall along the list
    np.testing.assert_allclose(tiles.reference, [75, 57.5], rtol=0.05)  # half of the counts
    with pytest.raises(UsageError, match="no section has Y"):
        tiles_of([one, two], NEEDS, genes=["Y"])
    with pytest.raises(UsageError, match="not every section has X"):
        tiles_of([one, two], NEEDS, genes=["X"], panel="shared")
    with pytest.raises(StsrError, match="no gene in common"):
        tiles_of([one, FakeSection("two", genes=["X"])], NEEDS, panel="shared")


def test_the_most_expressed_genes_are_taken_from_the_sections_in_turn():
    deep, shallow = FakeSection(), FakeSection("two", genes=["X", "Y", "Z", "E"], seed=1)
    deep.hr.counts *= 100
    assert set(tiles_of([deep, shallow], NEEDS, genes=4).panel) == {"A", "B", "X", "Y"}


def test_each_section_has_its_own_genes():
    one, two = FakeSection(genes=["A", "B", "C"]), FakeSection("two", genes=["C", "D"], seed=1)
    tiles = tiles_of([one, two], NEEDS, val=0, spots=["square"])
    assert tiles.panel == ("A", "B", "C", "D")
    batches = [tiles.batch(4, generator(seed)) for seed in range(4)]
    measured, hr, lr = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("measured", "hr", "lr")
    )
    first = measured[:, 0]
    assert 0 < first.sum() < len(first)
    assert (measured[first] == torch.tensor([True, True, True, False])).all()
    assert (measured[~first] == torch.tensor([False, False, True, True])).all()
    for counts in (hr.sum((2, 3)), lr.sum((2, 3))):
        assert ((counts > 0) == measured).all()
    own = [section.hr.counts.mean((1, 2)) * 50 for section in (one, two)]
    expected = [own[0][0], own[0][1], (own[0][2] + own[1][0]) / 2, own[1][1]]
    np.testing.assert_allclose(tiles.reference, expected, rtol=1e-5)
    assert tiles_of([one], NEEDS).batch(2, generator()).measured is None


def test_depths_thin_counts_and_spots_alike():
    section = FakeSection()
    tiles = tiles_of([section], NEEDS, spots=["square"], depths=(0.25,), stain=0)
    batch = tiles.batch(6, generator())
    counts = batch.image[:, 0].float()
    for part in (batch.lr[:, 0], batch.hr[:, 0]):
        assert 0.11 < part.sum() / counts.sum() < 0.14
    assert (add_up(counts, 10) > batch.lr[:, 0] + add_up(batch.hr[:, 0], 10)).all()
    np.testing.assert_allclose(batch.lr_mean[0], section.hr.counts.mean((1, 2)) * 12.5, rtol=1e-5)
    np.testing.assert_allclose(batch.lr_mean[0], tiles.reference, rtol=0.05)


def test_fractions_are_thinned_to_the_depth():
    section = FakeSection()
    section.hr.counts = section.hr.counts.astype(np.float32) * np.float32(3.3)
    section.unseen = Maps(section.hr.grid, GENES, section.hr.counts / 2)
    tiles = tiles_of([section], NEEDS, spots=["square"], depths=(0.25,))
    batches = [tiles.batch(8, generator(seed)) for seed in range(4)]
    lr, hr = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("lr", "hr"))
    expected = section.hr.counts.mean((1, 2)) * 12.5
    np.testing.assert_allclose(lr.mean((0, 2, 3)), expected, rtol=0.05)
    np.testing.assert_allclose(100 * hr.mean((0, 2, 3)), expected, rtol=0.05)
    np.testing.assert_allclose(batches[0].lr_mean[0], expected, rtol=1e-5)
    assert torch.equal(hr, hr.round())


@pytest.mark.parametrize(("kind", "area"), [("square", 1.0), ("visium", np.pi * 0.275**2)])
def test_spots_have_the_counts_asked_for(kind, area):
    """Depths lie between that with the fewest counts per spot and full, evenly on a logarithmic scale."""
    section = FakeSection(lr=(20, 20))
    section.hr.counts *= 10
    full = section.hr.counts.sum() / 400 / 2 * area  # counts of a half in a spot
    fewest = round(full / 10)
    tiles = tiles_of([section], NEEDS, spots=[kind], spot_counts=fewest, val=0)
    batches = [tiles.batch(8, generator(seed)) for seed in range(12)]
    spots = torch.cat([batch.lr.sum(1).mean((1, 2)) for batch in batches]).numpy() * area
    means = torch.cat([batch.lr_mean.sum(1) for batch in batches]).numpy() * area
    np.testing.assert_allclose(spots, means, rtol=0.12)
    assert 0.95 < means.min() / fewest < 1.2 and 0.85 < means.max() / full < 1.05
    np.testing.assert_allclose(np.log(means).mean(), np.log(full * fewest) / 2, atol=0.2)
    np.testing.assert_allclose(tiles.reference, tiles.depth * section.hr.counts.mean((1, 2)) * 100, rtol=1e-4)
    np.testing.assert_allclose(2 * tiles.depth, 0.9 / np.log(10), rtol=0.02)  # mean of 10 ** -u
    assert all((batch.hr == batch.hr.round()).all() for batch in batches)
    shallow = tiles_of([section], NEEDS, spots=[kind], spot_counts=round(10 * full), val=0)
    np.testing.assert_allclose(shallow.depth, 0.5, rtol=1e-6)  # spots that have fewer counts are not thinned


def test_same_data_same_digest():
    a, b, c = (tiles_of([FakeSection(seed=seed)], NEEDS).digest for seed in (0, 0, 1))
    assert a == b != c


def test_the_gap_is_a_tile_where_there_is_room():
    starts = np.stack(np.meshgrid(np.arange(0, 970, 10), np.arange(0, 970, 10)), -1).reshape(-1, 2)
    corner = [Rectangle(0, 0, 100, 100)]
    assert widest_gap(starts, 30, corner, 10) == 30
    few = starts[(starts < 130).all(1)]
    assert widest_gap(few, 30, [Rectangle(0, 0, 80, 80)], 10) == 10
    assert far_from(starts, 30, corner, 30).sum() < far_from(starts, 30, corner, 0).sum()


def test_window_shares_are_means():
    mask = np.random.default_rng(0).random((40, 50)) < 0.4
    starts = np.array([[0, 0], [5, 7], [20, 30]])
    expected = [mask[row : row + 20, column : column + 20].mean() for row, column in starts]
    np.testing.assert_allclose(window_shares(mask, starts, 20), expected)


def test_tiles_are_shifted_by_whole_bins_and_fit_the_grid():
    grid = Grid(0, 0, 10, 40, 50)
    assert shifts_of(grid, 1, 10) == [(0, 0)]
    assert shifts_of(grid, 2, 10) == [(0, 0), (0, 5), (5, 0), (5, 5)]
    assert shifts_of(grid, 3, 10) == [(row, column) for row in (0, 3, 6) for column in (0, 3, 6)]
    assert shifts_of(Grid(0, 0, 10, 15, 14), 2, 10) == [(0, 0), (5, 0)]  # a whole pixel must be left
    assert shifts_of(Grid(0, 0, 10, 14, 15), 2, 10) == [(0, 0), (0, 5)]
    assert shifts_of(grid, 20, 10) == [(row, column) for row in range(10) for column in range(10)]


def test_windows_are_all_that_lie_on_the_raster():
    grid = Grid(0, 0, 10, 45, 38)  # 4 x 3 low-resolution pixels, and 4 x 3 of a raster that starts at (5, 8)
    assert window_starts(grid, (0, 0), 3, 10).tolist() == [[0, 0], [10, 0]]
    assert window_starts(grid, (5, 8), 3, 10).tolist() == [[5, 8], [15, 8]]
    assert window_starts(grid, (6, 8), 3, 10).tolist() == [[6, 8]]
    assert window_starts(grid, (0, 0), 2, 10).tolist() == [[r, c] for r in (0, 10, 20) for c in (0, 10)]
    assert not len(window_starts(grid, (0, 9), 3, 10))


@pytest.mark.parametrize("rows", [(0, 20), (60, 80), (0, 80)])
@pytest.mark.parametrize("columns", [(0, 20), (40, 60), (0, 60)])
def test_the_block_is_the_corner_or_end_that_holds_the_tissue(rows, columns):
    expected = Rectangle(rows[0], columns[0], rows[1], columns[1])
    tissue = np.zeros((80, 60), bool)
    expected.paint(tissue)
    starts = window_starts(Grid(0, 0, 10, 80, 60), (0, 0), 2, 10)
    found = choose_block(tissue, starts, 20, 1.0, [], 10)
    assert found == (None if tissue.all() else expected)


def test_no_block_where_nothing_would_be_left():
    starts = np.array([[0, 0], [0, 10], [10, 0], [10, 10]])
    assert choose_block(np.ones((40, 40), bool), starts, 30, 0.2, [], 10) is None


def _without(name):
    section = FakeSection()
    setattr(section, name, None)
    return section


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: _without("hr"), {}, "no high-resolution counts"),
        (lambda: _without("image"), {}, "no H&E image in one"),
        (lambda: FakeSection(bin_um=20.0), {}, "--bin-um 10"),
        (FakeSection, {"val": 1.5}, "--val"),
        (FakeSection, {"spots": ["round"]}, "square or visium"),
        (FakeSection, {"depths": [0.0]}, "above 0"),
        (FakeSection, {"train_tile_lr": 30}, "smaller train_tile_lr"),
        (lambda: FakeSection(lr=(4, 4)), {}, "--val 0"),
        (FakeSection, {"regions": {"two": {}}}, "not one of the sections"),
        (FakeSection, {"regions": {"one": {"exlude": []}}}, "exclude or validation"),
        (FakeSection, {"regions": {"one": {"exclude": [[0, 0, 1]]}}}, "in um"),
        (FakeSection, {"regions": {"one": {"exclude": [[5, 0, 1, 1]]}}}, "empty"),
    ],
)
def test_refusals_are_one_sentence(make, options, message):
    with pytest.raises(StsrError, match=message):
        tiles_of([make()], NEEDS, **options)


def test_fractions_are_no_counts():
    section = FakeSection()
    section.hr.counts = section.hr.counts * 0.3
    with pytest.raises(StsrError, match="raw counts"):
        tiles_of([section], NEEDS)


def test_organs_weigh_the_same():
    sections = [
        FakeSection("a", organ="breast"),
        FakeSection("b", seed=1, organ="breast"),
        FakeSection("c", seed=2),
    ]
    tiles = tiles_of(sections, NEEDS)
    np.testing.assert_allclose(tiles.sampler.weights, [0.25, 0.25, 0.5])


def test_fractions_of_a_store_train_with_their_second_half(xenium_section, tmp_path):
    sdata = open_section(xenium_section).sdata
    whole = sdata["hr_10um"].compute().astype(np.float32)
    parts = {name: sdata[name] for name in ("he", "tissue")}
    for name, part in (("hr_10um_unseen", 0.25), ("hr_10um", 0.5)):
        parts[name] = (whole * np.float32(part)).assign_attrs(whole.attrs).chunk()
    store = publishing.create(
        tmp_path / "half.zarr", elements.store_of(parts), {"hr_10um": {"divided_by_area_from_um": 8.0}}
    )
    zarr.open_group(store, mode="r+").attrs[names.ORGAN_KEY] = "breast"
    section = open_section(store)
    assert section.organ == "breast" and section.hr.genes == section.unseen.genes
    batch = tiles_of([section], NEEDS, spots=["square"], val=0).batch(2, generator())
    assert torch.equal(batch.lr, add_up(batch.hr, 10)) and batch.lr.sum() > 0  # both halves are equal here
    counts = section.hr.read().sum()
    assert 0 < batch.hr.sum() < counts / 2
    assert batch.divided.tolist() == pytest.approx([0.8, 0.8])
    assert open_section(xenium_section).organ is None and open_section(xenium_section).unseen is None
