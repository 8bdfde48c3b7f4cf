"""Diff-ST's equations on hand-made tensors: known values, identities, and what must not matter."""

import math

import pytest
import torch

from stsr.methods.crossmodal import (
    CellAttention,
    GeneGraph,
    Modulation,
    PatchEncoder,
    curriculum,
    disentangling_loss,
    entropy,
    intensity,
    patches,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


# -------------------------------------------------------------------------------------------- patches and curriculum


def test_patches_are_where_they_were():
    picture = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    cut = patches(picture[..., :4], 2)
    assert cut.shape == (2, 4, 3, 2, 2)
    assert torch.equal(cut[1, 0], picture[1, :, :2, :2])
    assert torch.equal(cut[1, 1], picture[1, :, :2, 2:4])
    assert torch.equal(cut[0, 2], picture[0, :, 2:4, :2])


def test_patches_must_be_whole():
    with pytest.raises(ValueError, match="no 3 x 3 whole patches"):
        patches(torch.zeros(1, 3, 4, 4), 3)


def test_entropy_of_plain_half_and_every_level():
    plain = torch.full((3, 8, 8), 200.0)
    half = plain.clone()
    half[:, :4] = 20
    every = (torch.arange(64).reshape(8, 8) * 4.0).expand(3, 8, 8)
    found = entropy(torch.stack([plain, half, every]))
    assert found.tolist() == pytest.approx([0, math.log(2) / math.log(32), 1], abs=1e-5)


def test_the_threshold_rises_with_progress():
    entropies = torch.tensor([[0.1, 0.3, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]])
    kept = [curriculum(entropies, 0.6, progress).tolist() for progress in (0.0, 0.4, 0.8, 1.0)]
    assert [row[0] for row in kept] == [
        [True, True, True, True],
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]
    assert all(row[1] == [True] * 4 for row in kept)  # no patch above the threshold: the richest is kept


# ------------------------------------------------------------------------------------------------------- attention


def test_attention_sees_kept_cells_only():
    attention = CellAttention(4, 6, 8)
    tissue, cells = normal(2, 4, 3, 5), normal(2, 7, 6, seed=1)
    kept = torch.zeros(2, 7, dtype=torch.bool)
    kept[0, 2] = kept[1, :3] = True
    found = attention(tissue, cells, kept)
    other = torch.where(kept[..., None], cells, 9.0)
    assert torch.allclose(attention(tissue, other, kept), found)
    assert not torch.allclose(attention(tissue, cells, torch.ones_like(kept)), found)
    alone = attention.out(attention.value(cells[0, 2]))  # a single key: its value everywhere
    assert torch.allclose(found[0] - tissue[0], alone[:, None, None].expand(4, 3, 5), atol=1e-5)


def test_attention_does_not_mind_the_order_of_cells():
    attention = CellAttention(4, 6, 8)
    tissue, cells, kept = normal(1, 4, 3, 3), normal(1, 7, 6, seed=1), normal(1, 7, seed=2) > 0
    turned = torch.randperm(7, generator=seeded())
    assert torch.allclose(
        attention(tissue, cells, kept), attention(tissue, cells[:, turned], kept[:, turned]), atol=1e-6
    )


def test_a_patch_is_encoded_by_itself():
    encoder = PatchEncoder(3, 8, 10)
    some = normal(1, 3, 3, 10, 10)
    found = encoder(some)
    assert found.shape == (1, 3, 8)
    assert torch.allclose(encoder(some[:, 1:2]), found[:, 1:2], atol=1e-6)


# ------------------------------------------------------------------------------------------------------ modulation


def test_modulation_is_equation_3():
    modulation = Modulation(3)
    torch.nn.init.normal_(modulation.fc.weight, generator=seeded())
    own, other = normal(1, 4, 5, 5), normal(1, 4, 5, 5, seed=1)
    found = modulation(own, other)
    region = own[0, :, 1:4, 1:4].flatten(1)  # (c, a a) around pixel (2, 2)
    by_hand = region @ modulation.fc(region.T @ other[0, :, 2, 2] / 2)  # the root of four channels
    assert torch.allclose(found[0, :, 2, 2], by_hand, atol=1e-5)


def test_modulation_of_a_blind_fc_is_the_identity():
    modulation = Modulation(3)
    torch.nn.init.zeros_(modulation.fc.weight)
    own = normal(2, 4, 5, 6)
    assert torch.allclose(modulation(own, normal(2, 4, 5, 6, seed=1)), own, atol=1e-6)


def test_modulation_reads_its_region_and_the_other_modality():
    modulation, own, other = Modulation(3), normal(1, 2, 7, 7).requires_grad_(), normal(1, 2, 7, 7, seed=1)
    other.requires_grad_()
    modulation(own, other)[0, :, 3, 3].sum().backward()
    reached = own.grad.abs().sum(1)[0] > 0
    assert reached[2:5, 2:5].all()
    assert int(reached.sum()) == 9
    assert (other.grad.abs().sum(1)[0] > 0).nonzero().tolist() == [[3, 3]]


def test_a_region_has_a_middle():
    with pytest.raises(ValueError, match="odd"):
        Modulation(4)


# --------------------------------------------------------------------------------------------------- disentangling


def directions(*vectors):
    """Maps (b, 2, 1, 1), one vector each."""
    return torch.tensor(vectors, dtype=torch.float32)[..., None, None]


def test_disentangling_of_paired_swapped_and_collapsed():
    east, north = directions([1, 0]), directions([0, 1])
    assert float(disentangling_loss((east, east), (east, north))) == 0
    swapped = float(disentangling_loss((east, north), (east, east)))
    assert swapped == pytest.approx(1 / 1e-3)  # a unit apart on both axes, over the least distance
    assert float(disentangling_loss((east, north), (north, east))) == pytest.approx(1)


def test_disentangling_minds_directions_only():
    shared, unique = (
        (normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)),
        (normal(2, 4, 3, 3, seed=2), normal(2, 4, 3, 3)),
    )
    plain = disentangling_loss(shared, unique)
    assert torch.allclose(
        disentangling_loss([0.1 * s for s in shared], [50 * u for u in unique]), plain, rtol=1e-4
    )


def test_samples_without_spots_do_not_disentangle():
    shared, unique = (
        (normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)),
        (normal(2, 4, 3, 3, seed=2), normal(2, 4, 3, 3)),
    )
    present = torch.tensor([True, False])
    first = disentangling_loss([s[:1] for s in shared], [u[:1] for u in unique])
    assert torch.equal(disentangling_loss(shared, unique, present), first)
    assert float(disentangling_loss(shared, unique, torch.tensor([False, False]))) == 0


# ----------------------------------------------------------------------------------------------------------- graph


def test_intensity_of_like_unlike_and_absent_genes():
    maps = torch.tensor([[[1.0, 2.0, 0.0, 0.0], [10.0, 20.0, 0.0, 0.0], [0.0, 0.0, 3.0, 1.0], [0.0] * 4]])
    found = intensity(maps)
    assert torch.allclose(found[0, 0], torch.tensor([0.5, 0.5, 0.0, 0.0]))  # whatever the units
    assert torch.allclose(found[0, 2], torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert not found[0, 3].any()


def test_graph_is_equation_4():
    graph = GeneGraph(0.2)
    torch.nn.init.normal_(graph.mix.weight, generator=seeded())
    features, relations = normal(1, 3, 4, 4), intensity(normal(1, 3, 16, seed=1).abs())
    mixed = torch.stack([graph.mix(node[None, None])[0, 0] for node in features[0]]).flatten(1)
    middle = torch.nn.functional.leaky_relu(relations[0] @ mixed, 0.2).reshape(3, 4, 4)
    assert torch.allclose(graph(features, relations)[0], 0.2 * middle + 0.8 * features[0], atol=1e-5)


def test_graph_without_weight_is_the_identity():
    features = normal(2, 3, 4, 4)
    assert torch.equal(GeneGraph(0.0)(features, intensity(features.flatten(2).abs())), features)


def test_graph_follows_a_permutation_of_the_genes():
    graph, features = GeneGraph(0.5), normal(2, 6, 4, 4)
    turned = torch.randperm(6, generator=seeded())
    straight = graph(features, intensity(features.flatten(2).abs()))
    after = graph(features[:, turned], intensity(features[:, turned].flatten(2).abs()))
    assert torch.allclose(after, straight[:, turned], atol=1e-5)
