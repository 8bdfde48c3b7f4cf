"""C3-Diff's equations on vectors made by hand."""

import math

import pytest
import torch

from stsr.methods.contrastive import (
    content_loss,
    contrast,
    falling,
    hypersphere_noise,
    imputation_weights,
    impute,
    inter_loss,
    modal_loss,
)

E = math.e
AXES = torch.eye(3)  # three unit vectors at right angles
SWAPPED = AXES[[1, 2, 0]]
COLLAPSED = AXES[[0, 0, 0]]


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def test_contrast_is_the_formula():
    z, positive, negatives = unit(2, 5), unit(2, 5, seed=1), unit(2, 3, 5, seed=2)
    got = contrast(z, positive, negatives, 0.3)
    for n in range(2):
        up = math.exp(float(z[n] @ positive[n]) / 0.3)
        down = sum(math.exp(float(z[n] @ negatives[n, k]) / 0.3) for k in range(3))
        assert float(got[n]) == pytest.approx(-math.log(up / (up + down)), rel=1e-5)
    assert torch.equal(
        contrast(z, positive, negatives, 0.3, torch.zeros(3, dtype=torch.bool)), torch.zeros(2)
    )


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (AXES, math.log((E + 4) / E)),  # paired: one e for the pair, four ones
        (SWAPPED, math.log((1 + E + 3) / 1)),  # the pair is orthogonal, and a negative is equal
        (COLLAPSED, None),
    ],
)
def test_content_of_paired_swapped_and_collapsed(lr, expected):
    got = float(content_loss(AXES, lr, 1.0))
    if expected is None:
        # image vectors are the axes, all spot vectors the first axis; computed by hand for each anchor
        image = [math.log((E + 2 + 2 * E) / E), math.log(5), math.log(5)]
        spots = [math.log((E + 2 * E + 2) / E), math.log(1 + E + 1 + 2 * E), math.log(1 + E + 1 + 2 * E)]
        assert got == pytest.approx((sum(image) + sum(spots)) / 3, rel=1e-6)
    else:
        assert got == pytest.approx(2 * expected, rel=1e-6)


def test_modal_of_apart_swapped_and_collapsed():
    # modalities apart: all of one are alike, and unlike the other
    apart = modal_loss(COLLAPSED, AXES[[1, 1, 1]], 1.0)
    assert float(apart) == pytest.approx(2 * math.log((E + 3) / E), rel=1e-6)
    # all vectors equal: the positive and three negatives are alike
    assert float(modal_loss(COLLAPSED, COLLAPSED, 1.0)) == pytest.approx(2 * math.log(4), rel=1e-6)
    # the optimum of content is poor for modality, in any order of the tiles
    paired = modal_loss(AXES, AXES, 1.0)
    assert float(paired) == pytest.approx(2 * math.log(1 + E + 2), rel=1e-6)
    assert float(modal_loss(AXES, SWAPPED, 1.0)) == pytest.approx(float(paired), rel=1e-6)


def test_inter_of_paired_swapped_and_collapsed():
    assert float(inter_loss(AXES, AXES, 1.0)) == pytest.approx(math.log((E + 2) / E), rel=1e-6)
    assert float(inter_loss(AXES, SWAPPED, 1.0)) == pytest.approx(math.log(1 + E + 1), rel=1e-6)
    assert float(inter_loss(COLLAPSED, COLLAPSED, 1.0)) == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("loss", [modal_loss, content_loss])
def test_samples_without_spots_enter_nowhere(loss):
    image, lr = unit(4, 6), unit(4, 6, seed=1)
    present = torch.tensor([True, True, False, True])
    other = lr.clone()
    other[2] = unit(6, seed=7)
    assert torch.equal(loss(image, lr, 0.5, present), loss(image, other, 0.5, present))
    assert not torch.equal(loss(image, lr, 0.5), loss(image, other, 0.5))
    nobody = torch.zeros(4, dtype=torch.bool)
    assert float(loss(image, lr, 0.5, nobody)) == 0


def test_a_single_sample_has_no_negative():
    one = unit(1, 6)
    other = unit(1, 6, seed=1)
    assert float(modal_loss(one, other, 0.07)) == 0
    assert float(content_loss(one, other, 0.07)) == 0
    assert float(inter_loss(one, other, 0.07)) == 0


def test_gradients_reach_every_vector_and_tau():
    for loss in (modal_loss, content_loss, inter_loss):
        a, b = unit(4, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_()
        tau = torch.tensor(0.5, requires_grad=True)
        loss(a, b, tau).backward()
        assert (a.grad.norm(dim=-1) > 0).all()
        assert (b.grad.norm(dim=-1) > 0).all()
        assert tau.grad != 0


def test_masked_losses_have_finite_gradients():
    a, b = unit(3, 6).requires_grad_(), unit(3, 6, seed=1).requires_grad_()
    present = torch.tensor([True, False, False])
    (modal_loss(a, b, 0.1, present) + content_loss(a, b, 0.1, present)).backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_hypersphere_noise_is_equation_1():
    z = unit(3, 8)
    got = hypersphere_noise(z, 0.3, torch.Generator().manual_seed(5))
    mu = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    by_hand = z + 0.3 * mu
    assert torch.allclose(got, by_hand / by_hand.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.allclose(got.norm(dim=-1), torch.ones(3))
    # per sample: each has noise of its own
    same = hypersphere_noise(z[:1].expand(3, 8), 0.3, torch.Generator().manual_seed(5))
    assert not torch.allclose(same[0], same[1])
    assert hypersphere_noise(z, 0.0, torch.Generator()) is z


def test_imputation_is_the_formula():
    image, maps = unit(4, 6), torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))
    present = torch.tensor([True, False, True, True])
    got = impute(maps, imputation_weights(image, present, 0.2), present, 0.7)
    similar = {k: math.exp(float(image[1] @ image[k]) / 0.2) for k in (0, 2, 3)}
    expected = 0.7 * sum(value / sum(similar.values()) * maps[k] for k, value in similar.items())
    assert torch.allclose(got[1], expected, atol=1e-6)
    assert torch.equal(got[[0, 2, 3]], maps[[0, 2, 3]])
    mean = impute(maps, imputation_weights(image, present, 0.2, alike=False), present, 1.0)
    assert torch.allclose(mean[1], maps[[0, 2, 3]].mean(0), atol=1e-6)


def test_imputation_reads_no_missing_map_and_falls_to_zero_padding():
    image, maps = unit(3, 6), torch.randn(3, 2)
    present = torch.tensor([True, False, True])
    spoilt = maps.clone()
    spoilt[1] = torch.nan
    weights = imputation_weights(image, present, 0.1)
    strengths = [falling(0.8, progress) for progress in (0.0, 0.5, 1.0)]
    assert strengths == pytest.approx([0.8, 0.4, 0.0])
    sizes = [float(impute(spoilt, weights, present, strength)[1].norm()) for strength in strengths]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-5)
    assert sizes[0] > 0
    assert sizes[2] == 0


def test_nobody_to_impute_from():
    nobody = torch.zeros(2, dtype=torch.bool)
    weights = imputation_weights(unit(2, 4), nobody, 0.1)
    assert torch.equal(weights, torch.zeros(2, 2))
    assert torch.equal(impute(torch.ones(2, 3), weights, nobody, 1.0), torch.zeros(2, 3))
