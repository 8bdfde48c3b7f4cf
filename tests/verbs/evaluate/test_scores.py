import numpy as np
import pytest

from stsr import metrics
from stsr.verbs.evaluate.folds import blocks, in_blocks, scattered
from stsr.verbs.evaluate.scores import Bootstrap, Sums, slope


def _spots(spots=400, genes=12, seed=0):
    rng = np.random.default_rng(seed)
    rate = rng.gamma(2.0, 2.0, (spots, genes))
    return rate, rng.poisson(rate).astype(float), np.arange(spots) // 10


def test_scores_are_those_of_the_metrics():
    rate, counts, block = _spots()
    counts[:, 3], rate[:, 4] = 0, 2.0
    sums = Sums.of(rate, counts, block)
    pcc, deviance = sums.pcc(), sums.deviance_explained()
    assert np.isnan(pcc[3]) and np.isnan(deviance[3])
    assert pcc[4] == 0  # a constant map has no pattern
    kept = [0, 1, 2, *range(5, 12)]
    np.testing.assert_allclose(pcc[kept], metrics.pearson(rate.T, counts.T)[kept])
    np.testing.assert_allclose(deviance[kept], metrics.deviance_explained(rate.T, counts.T)[kept])


def test_weights_repeat_blocks():
    rate, counts, block = _spots(spots=60)
    weights = np.array([2.0, 0, 1, 1, 0, 1])
    rows = np.concatenate([np.flatnonzero(block == number) for number in (0, 0, 2, 3, 5)])
    np.testing.assert_allclose(
        Sums.of(rate, counts, block).pcc(weights), metrics.pearson(rate[rows].T, counts[rows].T)
    )


def test_intervals_are_paired_and_cover():
    rate, counts, block = _spots()
    rng = np.random.default_rng(1)
    good, worse = (Sums.of(rate * rng.lognormal(0, sd, rate.shape), counts, block) for sd in (0.05, 0.3))
    draws = Bootstrap(int(block.max()) + 1, seed=0)
    mean, gain = draws.mean(good, "pcc"), draws.difference(good, worse, "pcc")
    assert mean.low < mean.value < mean.high and mean.high - mean.low < 0.1
    assert gain.low > 0 and gain.excludes_zero
    alone = draws.mean(worse, "pcc")
    assert gain.high - gain.low < (mean.high - mean.low) + (alone.high - alone.low)
    nothing = draws.difference(good, good, "deviance_explained")
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0) and not nothing.excludes_zero


def test_intervals_widen_when_neighbours_are_alike():
    rate, counts, _ = _spots()
    block = np.arange(len(rate)) // 40
    common = np.random.default_rng(2).lognormal(0, 1.0, (10, 1))[block]
    counts = np.random.default_rng(3).poisson(rate * common).astype(float)
    by_block, by_spot = (Sums.of(rate, counts, each) for each in (block, np.arange(len(rate))))
    wide, narrow = Bootstrap(10, 0).mean(by_block, "pcc"), Bootstrap(len(rate), 0).mean(by_spot, "pcc")
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_genes_are_ahead_only_beyond_chance():
    rate, counts, block = _spots()
    other = rate.copy()
    other[:, :4] = rate[:, :4].mean(0)  # four genes lose their pattern
    draws = Bootstrap(int(block.max()) + 1, 0)
    ahead = draws.genes_ahead(Sums.of(rate, counts, block), Sums.of(other, counts, block))
    assert ahead.tolist() == [True] * 4 + [False] * 8


def test_slope_is_one_for_the_truth_and_less_for_exaggeration():
    rate, counts, _ = _spots(spots=3000)
    np.testing.assert_allclose(slope(rate, counts), 1, atol=0.1)
    np.testing.assert_allclose(slope(rate**2, counts), 0.5, atol=0.05)
    np.testing.assert_allclose(slope(np.sqrt(rate), counts), 2, atol=0.2)
    assert np.isnan(slope(np.ones((5, 1)), np.ones((5, 1)))).all()
    assert np.isnan(slope(np.arange(5.0)[:, None], np.zeros((5, 1)))).all()


def test_folds():
    y, x = np.mgrid[:20, :20]
    centres = np.stack([x.ravel(), y.ravel()], 1) * 100.0
    fold = scattered(len(centres), 5, 0)
    assert np.bincount(fold).tolist() == [80] * 5
    assert (scattered(len(centres), 5, 1) != fold).any()
    block = blocks(centres, 100.0)
    assert np.bincount(block).tolist() == [16] * 25  # of 25 spots there would be 16 only
    assert np.ptp(centres[block == 5], axis=0) == pytest.approx([300, 300])
    hidden = in_blocks(centres, 100.0, 5, 0)
    assert all(len(np.unique(hidden[block == number])) == 1 for number in range(25))
    assert np.bincount(hidden).tolist() == [80] * 5
    assert blocks(centres[:10], 100.0).tolist() == list(range(10))
