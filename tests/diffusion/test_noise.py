"""Noise: windows cut from one plane, independent of their order."""

import numpy as np
import pytest
import torch

from stsr.diffusion.noise import BLOCK, Noise

KEYS = ["GATA3", "KRT5", "PECAM1"]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_shape_and_type():
    values = Noise(0).window(KEYS, -3, 100, 20, 30)
    assert values.shape == (3, 20, 30)
    assert values.dtype == torch.float32


def test_is_standard_normal():
    values = (
        Noise(0).window(["A"], -100, 37, 640, 640).flatten().double()
    )  # 409,600 values: sd of the mean 0.0016
    assert abs(values.mean()) < 0.006
    assert abs(values.std() - 1) < 0.005
    assert abs((values**4).mean() - 3) < 0.06
    probability = (values[:, None] < torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).double().mean(0)
    expected = torch.tensor([0.02275, 0.15866, 0.5, 0.84134, 0.97725], dtype=torch.float64)
    assert torch.allclose(probability, expected, atol=0.004)


def test_neighbours_are_independent():
    values = Noise(0).window(["A"], 0, 0, 300, 300)[0]
    assert abs(correlation(values[1:], values[:-1])) < 0.015
    assert abs(correlation(values[:, 1:], values[:, :-1])) < 0.015
    assert abs(correlation(values[BLOCK:], values[:-BLOCK])) < 0.015  # one block and the next
    assert abs(correlation(values[:, BLOCK:], values[:, :-BLOCK])) < 0.015


@pytest.mark.parametrize("corner", [(0, 0), (50, 61), (-70, 10), (-129, -64), (64, 128)])
def test_windows_agree_where_they_overlap(corner):
    whole = Noise(3, sample=1).window(KEYS, -200, -200, 400, 400, step=2)
    y0, x0 = corner
    part = Noise(3, sample=1).window(KEYS, y0, x0, 70, 55, step=2)
    assert torch.equal(part, whole[:, y0 + 200 : y0 + 270, x0 + 200 : x0 + 255])


def test_depends_on_nothing_but_the_name():
    noise = Noise(7)
    before = noise.window(KEYS, 5, 6, 70, 70)
    noise.window(["another"], 0, 0, 10, 10, step=9)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(Noise(7).window(KEYS, 5, 6, 70, 70), before)


def test_order_of_keys_only_orders_channels():
    noise = Noise(0)
    order = [2, 0, 1]
    shuffled = noise.window([KEYS[i] for i in order], 0, 0, 32, 32)
    assert torch.equal(shuffled, noise.window(KEYS, 0, 0, 32, 32)[order])
    assert torch.equal(noise.window(KEYS[1:2], 0, 0, 32, 32)[0], noise.window(KEYS, 0, 0, 32, 32)[1])


@pytest.mark.parametrize(
    ("noise", "key", "step"),
    [(Noise(1), "A", 0), (Noise(0, sample=1), "A", 0), (Noise(0), "B", 0), (Noise(0), "A", 1)],
    ids=["seed", "sample", "key", "step"],
)
def test_another_name_is_independent(noise, key, step):
    first = Noise(0).window(["A"], 0, 0, 256, 256)
    second = noise.window([key], 0, 0, 256, 256, step)
    assert abs(correlation(first, second)) < 0.02  # sd 0.004


def test_names_are_not_confused():
    # sample 1, step 11 against sample 11, step 1; a key that looks like the numbers before it
    a = Noise(0, sample=1).window(["A"], 0, 0, 8, 8, step=11)
    b = Noise(0, sample=11).window(["A"], 0, 0, 8, 8, step=1)
    assert not torch.equal(a, b)
    numeric = [Noise(0).window([key], 0, 0, 8, 8) for key in ("0/A", "A", "0/0/A")]
    assert not torch.equal(numeric[0], numeric[1])
    assert not torch.equal(numeric[0], numeric[2])


def test_values_are_the_same_for_ever():
    # a result with a seed must be repeatable in a later version: if this fails, note it in the changelog
    values = Noise(42).window(["GATA3"], -1, -1, 2, 2)[0].flatten()  # a corner of four blocks
    expected = [2.33899689, -0.38203275, -0.55232972, -0.81205803]
    assert torch.allclose(values, torch.tensor(expected), atol=1e-6)


def test_antithetic_partner():
    noise = Noise(0, sample=4)
    partner = Noise(0, sample=4, sign=-1)
    assert torch.equal(partner.window(KEYS, 1, 2, 9, 9), -noise.window(KEYS, 1, 2, 9, 9))


def test_sign_must_be_a_sign():
    with pytest.raises(ValueError, match="1 or -1"):
        Noise(0, sign=0.5)


def test_source_gives_the_windows_of_a_batch_step_by_step():
    noise = Noise(0)
    draw = noise.source(KEYS, [(0, 0), (-5, 40)], 16, 24)
    assert draw(3).shape == (2, 3, 16, 24)
    assert torch.equal(draw(3)[1], noise.window(KEYS, -5, 40, 16, 24, step=3))
    assert not torch.equal(draw(3), draw(0))
