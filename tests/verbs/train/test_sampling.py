"""Tiles are drawn by organ, section and tissue, as documented."""

import numpy as np
import pytest

from stsr.verbs.train.sampling import Places, Sampler, section_weights


def places(organ, tiles, seed=0):
    """Tiles of 30 bins in a row, far from each other, with random fractions of tissue."""
    starts = np.stack([np.arange(tiles) * 40, np.zeros(tiles, int)], 1)
    return Places(organ, starts, np.random.default_rng(seed).uniform(0.3, 1.0, tiles))


BREAST = [places("breast", 400), places("breast", 100, 1), places("breast", 25, 2)]


def test_organs_weigh_the_same_and_sections_by_the_root_of_their_tiles():
    weights = section_weights([*BREAST, places("kidney", 9)])
    np.testing.assert_allclose(weights, [10 / 35, 5 / 35, 2.5 / 35, 0.5])
    np.testing.assert_allclose(section_weights([places("a", 5), places("b", 500)]), [0.5, 0.5])
    np.testing.assert_allclose(section_weights([places("a", 0), places("a", 4), places("b", 0)]), [0, 1, 0])


def test_drawn_tiles_follow_the_weights():
    sampler = Sampler([*BREAST, places("kidney", 30)], 30)
    rng = np.random.default_rng(0)
    drawn = [tile for _ in range(1500) for tile in sampler.draw(4, rng)]
    share = np.bincount([section for section, *_ in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(share, sampler.weights, atol=0.025)
    kidney = np.bincount([row // 40 for section, row, _ in drawn if section == 3], minlength=30)
    tissue = sampler.places[3].tissue
    assert np.corrcoef(kidney, tissue)[0, 1] > 0.9
    full, part = kidney[tissue > 0.8].mean(), kidney[tissue < 0.5].mean()
    assert full / part == pytest.approx(tissue[tissue > 0.8].mean() / tissue[tissue < 0.5].mean(), rel=0.15)


def test_a_small_section_keeps_its_share_although_its_tiles_overlap():
    """Tiles that overlap too much are drawn again in the same section."""
    starts = np.stack(np.meshgrid(np.arange(0, 40, 2), np.arange(0, 40, 2)), -1).reshape(-1, 2)
    small = Places("small", starts, np.ones(len(starts)))
    sampler = Sampler([small, places("large", 1000)], 30)
    rng = np.random.default_rng(0)
    batches = [sampler.draw(4, rng) for _ in range(800)]
    share = np.mean([section == 0 for batch in batches for section, *_ in batch])
    assert share == pytest.approx(0.5, abs=0.03)
    for batch in batches:
        assert len(set(batch)) == 4


def test_a_batch_may_need_all_tiles():
    sampler = Sampler([places("a", 2), places("b", 3)], 30)
    for seed in range(5):
        assert len(set(sampler.draw(5, np.random.default_rng(seed)))) == 5
    assert sampler.count == 5


def test_the_generator_alone_decides():
    sampler = Sampler(BREAST, 30)
    a, b, c = (sampler.draw(6, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b != c
