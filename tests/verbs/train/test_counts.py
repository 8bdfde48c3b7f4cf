"""Counts on disk equal dense ones, however they are cut, and are read a block at a time."""

import hashlib

import numpy as np
import pytest

from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.verbs.train import counts as module
from stsr.verbs.train.counts import Window, read_counts

GRID = Grid(100.0, 50.0, 10.0, 60, 50)
GENES = tuple(f"g{number}" for number in range(90))


class Maps:
    """Maps in memory with the interface of `stsr.store.parts.Map`, which note the largest window read."""

    def __init__(self, values, grid=GRID):
        self.values, self.grid, self.genes, self.largest = values, grid, list(GENES), 0

    def read(self, genes, window):
        row, column = self.grid.offset_of(window)
        rows, columns = slice(row, row + window.height), slice(column, column + window.width)
        part = self.values[[self.genes.index(gene) for gene in genes], rows, columns]
        self.largest = max(self.largest, part.size)
        return part


class Section:
    name = "one"

    def __init__(self, values, unseen=None, grid=GRID):
        self.hr = Maps(values, grid)
        self.unseen = None if unseen is None else Maps(unseen, grid)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)


def dense(seed=0, high=3):
    rng = np.random.default_rng(seed)
    values = rng.poisson(rng.random(GRID.shape) * high * 0.1, (len(GENES), *GRID.shape)).astype(np.uint16)
    values[5, 20, 20] = 700
    return values


def of_window(window, side, genes, values):
    return window.matrix(values.astype(np.float32), genes).toarray().T.reshape(genes, *side)


@pytest.mark.parametrize("corner", [(0, 0), (3, 7), (15, 14), (40, 30), (-5, -3), (50, 41)])
def test_a_window_equals_a_dense_one(corner):
    values, shape = dense(), (20, 18)
    found = read_counts(Section(values), GENES, GRID)
    padded = np.pad(values, ((0, 0), (30, 30), (30, 30)))
    row, column = corner[0] + 30, corner[1] + 30
    expected = padded[:, row : row + shape[0], column : column + shape[1]]
    for each in (found, found.of_genes(np.arange(90), 90)):
        window = each.cut(*corner, *shape)
        assert np.array_equal(of_window(window, shape, 90, window.count), expected)


def test_genes_are_chosen_and_ordered():
    values = dense()
    columns = np.full(90, -1)
    columns[[7, 5, 80]] = [0, 1, 2]
    kept = read_counts(Section(values), GENES, GRID).of_genes(columns, 3)
    window = kept.cut(0, 0, *GRID.shape)
    assert np.array_equal(of_window(window, GRID.shape, 3, window.count), values[[7, 5, 80]])
    assert kept.count.dtype == np.uint16 and kept.gene.dtype == np.uint8  # as small as possible
    assert len(kept.count) == (values[[7, 5, 80]] > 0).sum()


def test_sums_are_weighted_by_bins():
    values = dense()
    weights = np.random.default_rng(1).random((2, *GRID.shape))
    found = read_counts(Section(values), GENES, GRID).weighted(weights)
    np.testing.assert_allclose(found, np.einsum("kyx,gyx->kg", weights, values))


def test_fine_bins_are_added_up():
    fine = Grid(100.0, 50.0, 5.0, 120, 100)
    values = np.random.default_rng(2).poisson(0.1, (90, *fine.shape)).astype(np.uint8)
    window = read_counts(Section(values, grid=fine), GENES, GRID).cut(0, 0, *GRID.shape)
    assert np.array_equal(of_window(window, GRID.shape, 90, window.count), add_up(values.astype(int), 2))


def test_only_a_block_of_some_genes_is_read_at_once():
    section = Section(dense())
    read_counts(section, GENES, GRID)
    assert 0 < section.hr.largest <= module._GENES_AT_ONCE * 16 * 16


def test_whole_counts_are_halved_anew_each_time():
    values = dense(high=30)
    window = read_counts(Section(values), GENES, GRID).of_genes(np.arange(90), 90).cut(0, 0, *GRID.shape)
    a, b = window.halves(np.random.default_rng(0))
    assert np.array_equal(a + b, window.count) and (a >= 0).all() and (b >= 0).all()
    assert not np.array_equal(a, window.halves(np.random.default_rng(1))[0])
    for count in (1, 4, 8, 9, 300):  # by bits and by rng.binomial
        many = Window(np.arange(5001), np.zeros(5000, np.int32), np.full(5000, count, np.uint16), None)
        half, _ = many.halves(np.random.default_rng(2))
        assert half.mean() == pytest.approx(count / 2, abs=4 * np.sqrt(count / 4 / 5000))
        assert half.var() == pytest.approx(count / 4, rel=0.1)
    thin = sum(window.halves(np.random.default_rng(0), depth=0.2))
    assert thin.sum() == pytest.approx(0.2 * window.count.sum(), rel=0.02) and (thin <= window.count).all()


def test_fractions_keep_their_two_halves():
    whole = dense().astype(np.float32) * 0.7
    unseen = whole * np.random.default_rng(0).random(whole.shape, np.float32)
    found = read_counts(Section(whole, unseen), GENES, GRID).of_genes(np.arange(90), 90)
    window = found.cut(3, 3, 20, 20)
    seen = [window.halves(np.random.default_rng(seed)) for seed in range(8)]
    expected = of_window(window, (20, 20), 90, window.unseen)
    assert np.array_equal(expected, unseen[:, 3:23, 3:23])
    firsts = {np.array_equal(a, window.unseen) for a, _ in seen}
    assert firsts == {True, False}  # either half may give the spots
    assert all(np.allclose(a + b, window.count) for a, b in seen)
    ones = np.ones((1, *GRID.shape))
    np.testing.assert_allclose(found.weighted(ones, found.unseen)[0], unseen.sum((1, 2)), rtol=1e-5)


def test_whole_counts_need_no_stored_half():
    values = dense().astype(np.float32)
    assert read_counts(Section(values, values * 0), GENES, GRID).unseen is None


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 0.5])
def test_other_numbers_are_no_counts(wrong):
    values = dense().astype(np.float32)
    values[70, 50, 40] = wrong
    with pytest.raises(StsrError, match="of one does not hold raw counts"):
        read_counts(Section(values), GENES, GRID)


@pytest.mark.parametrize("wrong", [5000.0, -1.0, np.nan])
def test_a_half_is_a_part(wrong):
    values = dense().astype(np.float32) / 2
    unseen = values / 2
    unseen[5, 20, 20] = wrong
    with pytest.raises(StsrError, match="exceeds the counts"):
        read_counts(Section(values, unseen), GENES, GRID)


def test_digest_depends_on_every_count():
    digests = set()
    for change in (None, (0, 0, 0), (89, 59, 49)):
        values = dense()
        if change:
            values[change] += 1
        whole = hashlib.sha256()
        read_counts(Section(values), GENES, GRID).update(whole)
        digests.add(whole.hexdigest())
    assert len(digests) == 3


def test_a_section_without_counts_of_a_gene():
    found = read_counts(Section(np.zeros((90, *GRID.shape), np.uint8)), GENES, GRID).of_genes(
        np.arange(90), 90
    )
    window = found.cut(0, 0, 20, 20)
    assert not len(window.count) and not found.weighted(np.ones((1, *GRID.shape))).any()
