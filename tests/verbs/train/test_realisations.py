"""Denoised spots in training: what prediction makes of one half of the transcripts, apart from the truth."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.methods.batch import Requirements
from stsr.methods.method import configured
from stsr.simulate import simulate_tissue, write_xenium
from stsr.spots.denoising import denoise
from stsr.store.parts import Spots
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.superres.field import Field
from stsr.verbs.train import realisations as module
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.counts import Window
from stsr.verbs.train.tiles import TrainingTiles

NEEDS = Requirements(())
GENES = [f"g{number}" for number in range(12)]
PLAIN = {"train_tile_lr": 3, "stain": 0, "flips": False, "denoised": 1.0, "realisations": 3}


class Maps:
    """Maps in memory with the interface of `stsr.store.parts.Map`."""

    def __init__(self, grid, counts):
        self.grid, self.genes, self.counts = grid, list(GENES), counts

    def read(self, genes, window):
        row, column = self.grid.offset_of(window)
        index = [self.genes.index(gene) for gene in genes]
        return self.counts[index, row : row + window.height, column : column + window.width]


class Picture:
    """Colours that give the place of a bin."""

    px_to_um = np.eye(3)

    def __init__(self, grid):
        self.grid = grid

    def covered(self, grid):
        return np.ones(grid.shape, bool)

    def read(self, grid):
        row, column = self.grid.offset_of(grid)
        rows, columns = np.mgrid[row : row + grid.height, column : column + grid.width]
        return np.stack([rows, columns, rows * 0]).astype(np.uint8)


class Tissue:
    """Counts about known rates, which differ from pixel to pixel of 100 um and from gene to gene."""

    unseen = tissue = organ = None
    divided_from_um = 0.0

    def __init__(self, name="one", lr=(16, 14), seed=0, mean=1.0):
        rng = np.random.default_rng(seed)
        grid = Grid(0.0, 0.0, 10.0, lr[0] * 10, lr[1] * 10)
        pixels = rng.gamma(1.5, mean / 1.5, (len(GENES), *lr))
        self.rates = np.repeat(np.repeat(pixels, 10, 1), 10, 2) * 0.05  # a mean of 5 in a pixel
        self.name = name
        self.hr = Maps(grid, rng.poisson(self.rates).astype(np.uint16))
        self.image = Picture(grid)

    def grid(self, bin_um):
        return self.hr.grid.at(bin_um)

    def fractional(self):
        """The same counts as fractions, with a fixed random half."""
        half = np.random.default_rng(9).binomial(self.hr.counts, 0.5).astype(np.float32)
        self.unseen = Maps(self.hr.grid, half * np.float32(0.6))
        self.hr.counts = self.hr.counts.astype(np.float32) * np.float32(0.6)
        return self


def tiles_of(section, *, val=0.0, regions=None, seed=0, **settings):
    config = configured(TrainConfig, PLAIN | settings)
    return TrainingTiles([section], NEEDS, config, val=val, regions=regions, seed=seed)


def batches_of(tiles, number=1, size=6):
    return [tiles.batch(size, torch.Generator().manual_seed(seed)) for seed in range(number)]


def starts_of(batch):
    """First bins of a batch's tiles, by their image."""
    return [tuple(tile[:2, 0, 0].tolist()) for tile in batch.image.numpy()]


def same(a, b):
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("hr", "lr", "lr_mean", "image"))


def shared_noise(section, **settings):
    """Correlation of what spots and truth have above the known rates, pixel by pixel and gene by gene."""
    tiles = tiles_of(section, spots=["square"], phases=2, realisations=6, **settings)
    spots, truth = [], []
    for batch in batches_of(tiles, 25, 8):
        for at, (row, column) in enumerate(starts_of(batch)):
            rates = add_up(section.rates[:, row : row + 30, column : column + 30], 10)
            hr = add_up(batch.hr[at], 10).numpy()
            for found, parts in ((batch.lr[at].numpy(), spots), (hr, truth)):
                parts.append((found / found.mean() - rates / rates.mean()).ravel())
    return np.corrcoef(np.concatenate(spots), np.concatenate(truth))[0, 1]


@pytest.mark.parametrize("settings", [{}, {"spot_counts": 15}], ids=["full", "thinned"])
@pytest.mark.parametrize("make", [Tissue, lambda: Tissue().fractional()], ids=["whole", "fractional"])
def test_spots_and_truth_share_no_noise(make, settings, monkeypatch):
    assert abs(shared_noise(make(), **settings)) < 0.06
    split = Window.split
    monkeypatch.setattr(Window, "split", lambda *own: split(*own)[:1] * 2)  # the truth is the spots' half
    assert shared_noise(make(), **settings) > 0.15


@pytest.mark.parametrize("make", [Tissue, lambda: Tissue().fractional()], ids=["whole", "fractional"])
def test_tiles_are_cut_from_the_denoised_half_that_their_truth_is_not(make):
    section = make()
    tiles = tiles_of(section, spots=["square"], val=0, realisations=4, phases=3)
    counts = section.hr.counts
    for realisation in tiles._realised[0]:
        row, column = realisation.split.corner
        window = tiles._sections[0].counts.cut(0, 0, *section.hr.grid.shape)
        seen, truth = (
            window.matrix(half, len(GENES)).toarray().T.reshape(counts.shape)
            for half in window.split(realisation.split.key)
        )
        np.testing.assert_allclose(seen + truth, counts, rtol=1e-5)
        height, width = (
            (side - start) // 10 * 10 for side, start in zip(seen.shape[1:], (row, column), strict=True)
        )
        spots = add_up(seen[:, row : row + height, column : column + width], 10)
        expected = denoise(sp.csr_matrix(spots.reshape(len(GENES), -1).T)).expected().T.reshape(spots.shape)
        np.testing.assert_allclose(realisation.lr, expected, rtol=1e-3)
        for start in realisation.starts[::7].tolist():
            tile = tiles._drawn(0, *start, np.random.default_rng(0))
            batch = tiles._assemble([replace(tile, row=start[0], column=start[1], realisation=realisation)])
            assert np.array_equal(
                batch.hr[0].numpy(), truth[:, start[0] : start[0] + 30, start[1] : start[1] + 30]
            )
            top, left = (start[0] - row) // 10, (start[1] - column) // 10
            assert np.array_equal(batch.lr[0], realisation.lr[:, top : top + 3, left : left + 3])
            assert starts_of(batch) == [tuple(start)]


def test_windows_agree_on_their_transcripts():
    counts = tiles_of(Tissue(mean=30))._sections[0].counts
    whole, part = counts.cut(0, 0, 160, 140), counts.cut(13, 57, 40, 50)

    def maps(window, side, depth):
        return [window.matrix(half, 12).toarray().T.reshape(12, *side) for half in window.split(77, depth)]

    for depth in (1.0, 0.3):
        for large, small in zip(maps(whole, (160, 140), depth), maps(part, (40, 50), depth), strict=True):
            assert np.array_equal(large[:, 13:53, 57:107], small)
    (a, b), count = whole.split(77, 0.3), whole.count.astype(float)
    for half in (a, b):
        assert half.sum() == pytest.approx(0.15 * count.sum(), rel=0.02)
        excess = half - 0.15 * count
        assert (excess**2).sum() == pytest.approx((0.15 * 0.85 * count).sum(), rel=0.05)  # binomial
    both = ((a - 0.15 * count) * (b - 0.15 * count)).sum() / (0.15 * 0.15 * count).sum()
    assert both == pytest.approx(-1, abs=0.15)  # covariance of a multinomial: none where counts are Poisson
    other = whole.split(78, 0.3)[0]
    assert abs(np.corrcoef(a - 0.15 * count, other - 0.15 * count)[0, 1]) < 0.02


def test_all_depends_on_the_seed_alone():
    first, again, other = (tiles_of(Tissue(), val=0.2, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(batches_of(first, 3), batches_of(again, 3), batches_of(other, 3), strict=True):
        assert same(a, b) and not torch.equal(a.lr, c.lr)
    for a, b in zip(first.validation_batches(), again.validation_batches(), strict=True):
        assert same(a, b)
    assert first.digest == again.digest


def test_realisations_differ_in_kind_place_depth_and_half():
    section = Tissue(mean=20)
    half = section.hr.counts.sum() / (16 * 14) / 2
    tiles = tiles_of(section, realisations=12, spot_counts=30)
    splits = [realisation.split for realisation in tiles._realised[0]]
    assert {split.kind for split in splits} == {"square", "visium"}
    assert len({split.key for split in splits}) == 12 and len({split.corner for split in splits}) > 5
    for kind, area in (("square", 1.0), ("visium", np.pi * 0.275**2)):
        depths = sorted(split.depth for split in splits if split.kind == kind)
        edges = (30 / (half * area)) ** (np.arange(7)[::-1] / 6)  # one in each sixth of the logarithmic range
        edges[0] *= 0.95  # the mean of spots of this lattice
        assert np.searchsorted(edges, depths).tolist() == [1, 2, 3, 4, 5, 6]
    for realisation in tiles._realised[0]:
        assert realisation.mean.sum() == pytest.approx(half * realisation.split.depth, rel=0.08)


@pytest.mark.parametrize(
    "make", [Tissue, lambda **own: Tissue(**own).fractional()], ids=["whole", "fractional"]
)
def test_spots_and_truth_have_the_same_depth(make):
    tiles = tiles_of(make(mean=20), realisations=4, spot_counts=60, spots=["square"])
    totals = [(batch.lr.sum((1, 2, 3)), batch.hr.sum((1, 2, 3))) for batch in batches_of(tiles, 6)]
    lr, hr = (torch.cat(parts) for parts in zip(*totals, strict=True))
    torch.testing.assert_close(lr, hr, rtol=0.2, atol=0)
    assert lr.max() > 3 * lr.min()


HELD_OUT = {"one": {"exclude": [[0, 0, 500, 500]], "validation": [[900, 1000, 1400, 1600]]}}


def test_held_out_areas_do_not_influence_training():
    plain = tiles_of(Tissue(), regions=HELD_OUT, gap_lr=1)
    changed = Tissue()
    changed.hr.counts[:, :50, :50] += np.arange(12, dtype=np.uint16)[:, None, None]
    excluded = tiles_of(changed, regions=HELD_OUT, gap_lr=1)
    changed.hr.counts[:, 100:, 90:] += np.arange(12, dtype=np.uint16)[:, None, None]
    both = tiles_of(changed, regions=HELD_OUT, gap_lr=1)
    for a, b in zip(batches_of(plain, 4), batches_of(both, 4), strict=True):
        assert torch.equal(a.lr, b.lr) and torch.equal(a.hr, b.hr) and torch.equal(a.lr_mean, b.lr_mean)
    first, second, third = (next(tiles.validation_batches()) for tiles in (plain, excluded, both))
    assert same(first, second) and not torch.equal(first.lr, third.lr)  # validation has spots of its own area
    assert (first.lr_mask.amax((1, 2, 3)) > 0).all()


def test_validation_has_its_own_realisation_of_each_kind():
    tiles = tiles_of(Tissue(), regions=HELD_OUT, gap_lr=1, spot_counts=5)
    kinds = {tile.realisation.split.kind for tile in tiles._held_out}
    splits = {tile.realisation.split.key: tile.realisation.split for tile in tiles._held_out}
    assert kinds == {"square", "visium"} and len(splits) == 2
    assert all(split.depth == 1 for split in splits.values())
    assert not set(splits) & {realisation.split.key for realisation in tiles._realised[0]}


def test_the_asked_share_of_tiles_is_denoised():
    tiles = tiles_of(Tissue(), denoised=0.4, spots=["square"])
    denoised = [(batch.lr != batch.lr.round()).any(1).any(1).any(1) for batch in batches_of(tiles, 30)]
    assert torch.cat(denoised).float().mean() == pytest.approx(0.4, abs=0.1)
    assert tiles_of(Tissue(), denoised=0.0)._sections[0].others is None


def test_tiles_of_a_small_section_stay_different():
    tiles = tiles_of(Tissue(lr=(4, 5)), realisations=2, phases=3)
    for batch in batches_of(tiles, 15):
        assert len(set(starts_of(batch))) == 6


def test_tiles_move_by_at_most_half_a_pixel_to_the_raster_of_their_spots():
    tiles = tiles_of(Tissue())
    rng, starts = np.random.default_rng(0), tiles.sampler.places[0].starts
    allowed = {tuple(start) for start in starts.tolist()}
    inner = starts[((starts >= 10) & (starts <= [120, 100])).all(1)]
    for row, column in inner[::9].tolist():
        tile = tiles._drawn(0, row, column, rng)
        assert (tile.row, tile.column) in allowed
        assert max(abs(tile.row - row), abs(tile.column - column)) <= 5
        assert all(
            (start - corner) % 10 == 0
            for start, corner in zip((tile.row, tile.column), tile.realisation.split.corner, strict=True)
        )


def test_genes_outside_the_panel_help_to_denoise(monkeypatch):
    rng = np.random.default_rng(0)
    section, other = Tissue(), Tissue()
    both = np.concatenate([rng.poisson(0.05, (4, 160, 140)), rng.poisson(0.4, (8, 160, 140))]).astype(
        np.uint16
    )
    section.hr.counts, other.hr.counts = both, both.copy()
    other.hr.counts[4:, :, :70] *= 4  # genes outside the panel show two kinds of tissue
    other.hr.counts[0, :, 70:] = section.hr.counts[0, :, 70:] = 0
    found = []
    for one in (section, other):
        tiles = tiles_of(one, genes=GENES[:4], spots=["square"], phases=1)
        assert tiles.panel == tuple(GENES[:4]) and tiles._sections[0].others.genes == 8
        found.append(np.stack([realisation.lr for realisation in tiles._realised[0]]))
    within = [lr[:, 0, :, :7].std() / lr[:, 0, :, :7].mean() for lr in found]
    across = [lr[:, 0, :, 7:].mean() / lr[:, 0, :, :7].mean() for lr in found]
    assert within[1] < within[0] and across[1] < 0.25
    monkeypatch.setattr("stsr.verbs.train.reading.FACTOR_GENES", 6)
    other.hr.counts[[5, 9]] += 1
    kept = tiles_of(other, genes=GENES[:4], spots=["square"], phases=1)._sections[0].others
    assert kept.genes == 2 and kept.count.sum() == other.hr.counts[[5, 9]].sum()  # the most counted ones


def test_the_raster_is_made_a_window_at_a_time(monkeypatch):
    whole = tiles_of(Tissue())._realised[0]
    monkeypatch.setattr(module, "_SIDE", 37)
    for a, b in zip(whole, tiles_of(Tissue())._realised[0], strict=True):
        np.testing.assert_allclose(a.lr, b.lr, rtol=1e-4)


@pytest.mark.parametrize("make", [Tissue, lambda: Tissue().fractional()], ids=["whole", "fractional"])
def test_all_genes_of_a_realisation_take_the_same_half_but_their_own_random_numbers(make, monkeypatch):
    section = make()
    section.hr.counts[:] = section.hr.counts[:1]  # genes that differ by their random halves alone
    if section.unseen is not None:
        section.unseen.counts[:] = section.unseen.counts[:1]
    made, simulated = [], module._simulated

    def noted(*own, **named):
        made.append(simulated(*own, **named))
        return made[-1]

    monkeypatch.setattr(module, "_simulated", noted)
    tiles_of(section, genes=GENES[:6], spots=["square"], phases=1, realisations=2)
    for panel, others in zip(made[::2], made[1::2], strict=True):
        same_counts = (others.toarray() == panel.toarray()).mean()
        assert same_counts == 1 if section.unseen is not None else same_counts < 0.5


def test_a_section_without_spots_is_refused():
    section = Tissue()
    section.tissue = type("Nowhere", (), {"read": lambda self, grid: np.zeros(grid.shape, bool)})()
    with pytest.raises(StsrError, match=r"no simulated spot lies inside the tissue of one.*denoised=0"):
        tiles_of(section, tissue=0.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("field")
    write_xenium(simulate_tissue(720, 640, seed=3), folder / "xenium", labels=False)
    return open_section(prepare(folder / "xenium", folder / "section.zarr"))


@pytest.mark.parametrize("kind", ["square", "visium"])
def test_training_shows_the_batch_that_prediction_makes_of_the_same_spots(stored, kind):
    config = configured(
        TrainConfig, PLAIN | {"spots": [kind], "phases": 1, "tissue": 0, "coarse": 0, "realisations": 2}
    )
    tiles = TrainingTiles([stored], NEEDS, config, val=0)
    grid, panel, section = stored.grid(10.0), list(tiles.panel), tiles._sections[0]
    for realisation in tiles._realised[0]:
        split = realisation.split
        window = section.counts.cut(0, 0, *grid.shape)
        seen = window.matrix(window.split(split.key, split.depth)[0], len(panel))
        measured = module.spots_over(kind, grid, section.tissue, section.usable, split.lattice)
        shape, size = ("square", 100.0) if kind == "square" else ("disc", 55.0)
        spots = Spots(measured.centres_um, sp.csr_matrix(measured.matrix @ seen), panel, shape, size)
        measurement, seeing = spots.measurement(grid).of_seeing_spots()
        lr, mask = measurement.raster(denoise(spots.counts).expected()[seeing])
        field = Field(grid, stored.image, lr, mask, np.eye(len(panel)), panel, 10.0)
        for start in realisation.starts.tolist():
            tile = tiles._drawn(0, *start, np.random.default_rng(0))
            learned = tiles._assemble([replace(tile, row=start[0], column=start[1], realisation=realisation)])
            shown = field.batch(grid.window(*start, tiles.side, tiles.side))
            for part in ("lr", "lr_mean"):
                torch.testing.assert_close(getattr(learned, part), getattr(shown, part), rtol=1e-3, atol=1e-4)
            for part in ("image", "lr_mask", "has_lr", "genes"):
                assert torch.equal(getattr(learned, part), getattr(shown, part)), part
        assert not np.array_equal(lr, lr.round()) and lr.max() > 0
