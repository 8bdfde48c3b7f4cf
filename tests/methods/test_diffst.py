"""Diff-ST: what conditions it, what its losses reach, and what its predictions may depend on."""

from dataclasses import replace

import pytest
import torch

from stsr.errors import UsageError
from stsr.methods.diffst import DiffST, DiffSTConfig
from stsr.methods.method import configured
from stsr.methods.sampling import Sampling
from stsr.methods.target import smoothed

PANEL = ("GATA3", "ERBB2", "LUM", "POSTN", "LYZ")
SMALL = DiffSTConfig(
    tile_lr=3,
    overlap_lr=1,
    widths=(16, 24),
    image_widths=(8, 12),
    feature_channels=8,
    attention_channels=8,
    gene_channels=8,
    embedding_channels=16,
    steps=3,
)


def model(panel=PANEL, awake=True, **settings):
    """A small model; awake, its layers that start at zero do not."""
    torch.manual_seed(0)
    method = DiffST(replace(SMALL, **settings), panel)
    if awake:
        torch.nn.init.normal_(method.unet.head[-1].weight, std=0.1)
        torch.nn.init.normal_(method.null_condition)
    return method.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def other_genes(batch, order):
    """The same tiles asked for panel genes in another order, or for some of them."""
    return batch.of_genes(torch.tensor(order))


# ------------------------------------------------------------------------------------------------------ predictions


def test_predicts_counts_and_repeats_itself(tiles, at):
    method, batch = model(), tiles()
    first, again = method.predict(batch, at(batch)), method.predict(batch, at(batch))
    assert first.shape == batch.hr.shape
    assert torch.equal(first, again)
    assert (first >= 0).all()
    assert not torch.equal(first, method.predict(batch, at(batch, sample=1)))


def test_the_mean_needs_no_noise_and_is_what_nothing_gives(tiles):
    method, batch = model(), tiles()
    features = method.condition(batch)
    mean = method.mean(batch, features)
    start = torch.zeros_like(batch.hr)
    x0 = method.denoise(start, torch.tensor(method.denoising.sigma_max), features.condition)
    assert torch.equal(mean, method.residual(batch).decode(x0))
    assert not model(mean_share=0.0).knows_mean


def test_asking_for_some_genes_changes_none_of_them(tiles, at):
    method, batch = model(), tiles()
    features, order = method.condition(batch), [3, 0]
    drawn = method.draw(batch, features, at(batch))
    whole, some = (
        method.predict(batch, None, features, drawn),
        method.predict(other_genes(batch, order), None, features, drawn),
    )
    assert torch.allclose(some, whole[:, order], atol=1e-6)


def test_a_gene_outside_the_panel_is_a_mixture(tiles):
    method, batch = model(), tiles()
    features = method.condition(batch)
    asked = replace(other_genes(batch, [0]), genes=torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]]))
    residual = method.residual(asked)
    expected = residual.base + residual.spread * features.expected[:, :2].mean(1, keepdim=True)
    assert torch.allclose(method.mean(asked, features), expected.clamp_min(0), atol=1e-6)


def test_permuting_the_panel_permutes_the_output(tiles, at):
    method, batch = model(), tiles()
    turned = torch.tensor([3, 1, 4, 0, 2])
    panel = tuple(PANEL[index] for index in turned)
    other = model(panel)
    weights = method.state_dict()
    weights["table"], weights["reference"] = weights["table"][turned], weights["reference"][turned]
    other.load_state_dict(weights)
    moved = replace(other_genes(batch, turned.tolist()), genes=torch.eye(5))
    features = method.condition(batch)
    assert torch.allclose(
        other.mean(moved, other.condition(moved)), method.mean(batch, features)[:, turned], atol=1e-5
    )
    assert torch.allclose(
        other.predict(moved, at(moved)), method.predict(batch, at(batch))[:, turned], atol=1e-3
    )  # the noise of a gene depends on its name


def test_neighbours_in_the_batch_do_not_matter(tiles):
    method, batch = model(), tiles(2)
    whole = method.mean(batch, method.condition(batch))
    one = batch.of_tiles(slice(0, 1))
    assert torch.allclose(method.mean(one, method.condition(one)), whole[:1], atol=1e-5)


def test_image_and_spots_matter(tiles):
    method, batch = model(), tiles()
    mean = method.condition(batch).expected
    assert not torch.allclose(
        method.condition(replace(batch, image=255 - batch.image)).expected, mean, atol=1e-4
    )
    assert not torch.allclose(
        method.condition(replace(batch, lr=batch.lr.flip(-1))).expected, mean, atol=1e-4
    )


def test_predicts_without_spots_at_batch_size_one(tiles, at):
    method, batch = model(), tiles(1)
    blind = batch.without_lr(torch.tensor([True]))
    assert method.predict(blind, at(blind)).isfinite().all()
    other = replace(blind, lr=batch.lr.flip(-1) * 0)
    assert torch.equal(method.condition(blind).expected, method.condition(other).expected)


@pytest.mark.parametrize("sampler", ["ancestral", "euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["edm", "ddpm"])
def test_every_sampler_walks_either_schedule(sampler, schedule, tiles, at):
    method, batch = model(schedule=schedule), tiles(1)
    method.sampling = Sampling(sampler, 4)
    assert method.predict(batch, at(batch)).isfinite().all()


def test_guidance_weighs_condition_against_none(tiles, at):
    method, batch = model(), tiles(1)
    features, x0 = method.condition(batch), {}
    for weight in (0.0, 1.0, 3.0):
        method.sampling = Sampling("ddim", 1, weight)  # a single step is linear in the two denoisers
        x0[weight] = method.draw(batch, features, at(batch))
    assert torch.allclose(x0[3.0], 3 * x0[1.0] - 2 * x0[0.0], atol=1e-3)
    assert not torch.allclose(x0[3.0], x0[1.0], atol=1e-3)


# --------------------------------------------------------------------------------------------------- the curriculum


def test_the_curriculum_changes_which_patches_are_used(tiles):
    method, batch = model(entropy_threshold=0.6), tiles()
    early, late = (method.kept_patches(batch, progress) for progress in (0.0, 1.0))
    assert early.sum() > late.sum() >= len(batch)
    assert not (late & ~early).any()
    changed = method.features(batch, 0.0).condition - method.features(batch, 1.0).condition
    assert changed.abs().max() > 1e-4
    always = model(entropy_threshold=0.6, curriculum=False)
    assert torch.equal(always.kept_patches(batch, 0.0), always.kept_patches(batch, 1.0))


def test_dropped_patches_are_not_seen(tiles):
    method, batch = model(entropy_threshold=0.6), tiles(1)
    dropped = (~method.kept_patches(batch, 1.0))[0].nonzero()[0].item()
    row, column = divmod(dropped, 3)
    image = batch.image.clone()
    image[..., 10 * row : 10 * row + 10, 10 * column : 10 * column + 10] = 255  # uniform: stays dropped
    seen = []
    method.cells.register_forward_hook(lambda module, given, found: seen.append(found))
    method.attention.register_forward_hook(lambda module, given, found: seen.append(given[2]))
    method.features(replace(batch, image=image), 1.0)
    assert not seen[1][0, dropped]


# -------------------------------------------------------------------------------------------------------- learning

PARTS = (
    "tissue",
    "cells",
    "attention",
    "refine",
    "refined",
    "graph",
    "spots",
    "modulate_image",
    "modulate_spots",
    "shared_image",
    "unique_image",
    "shared_spots",
    "unique_spots",
)
ONLY_DENOISING = ("mix", "level", "enter", "unet")


@pytest.mark.parametrize("term", ["denoise", "disentangle"])
def test_every_term_reaches_what_it_should(term, tiles):
    method = model(lr_dropout=0.0, condition_dropout=0.0).train()
    method.loss(tiles(4), 0.3, seeded())[term].backward()
    for name in PARTS + (ONLY_DENOISING if term == "denoise" else ()):
        module = getattr(method, name)
        for key, parameter in module.named_parameters():
            if name == "attention" and key == "key.bias":
                continue  # adds the same to every key's product, which the softmax cancels
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.abs().sum() > 0, (name, key)
    assert method.table.grad.any()
    if term == "disentangle":
        for name in ONLY_DENOISING:
            assert all(p.grad is None for p in getattr(method, name).parameters()), name


ABLATIONS = {
    "cell_attention": ({"cell_attention": False}, ("cells", "attention")),
    "modulation": ({"modulation": False}, ("modulate_image", "modulate_spots")),
    "graph": ({"graph_weight": 0.0}, ()),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_leave_their_part_out(name, tiles, at):
    settings, gone = ABLATIONS[name]
    method, batch = model(lr_dropout=0.0, **settings), tiles()
    assert not any(hasattr(method, part) for part in gone)
    assert method.predict(batch, at(batch)).isfinite().all()
    method.train().loss(batch, 0.5, seeded())["loss"].backward()
    if name == "graph":
        assert all(p.grad is None for p in method.graph.parameters())


def test_terms_are_weighted(tiles):
    terms = model(disentangling_weight=0.3).train().loss(tiles(3), 0.5, seeded())
    assert torch.allclose(terms["loss"], terms["denoise"] + 0.3 * terms["disentangle"])
    bare = model(disentangling_weight=0.0).train().loss(tiles(3), 0.5, seeded())
    assert torch.equal(bare["loss"], bare["denoise"])


def test_tiles_without_spots_do_not_disentangle(tiles):
    method = model(lr_dropout=0.999).train()
    terms = method.loss(tiles(3), 0.5, seeded())
    assert float(terms["disentangle"]) == 0
    assert terms["loss"].isfinite()


def trained(batch, steps=120, **settings):
    """A model after some steps on one tile, and its terms at the first and the last."""
    method = model(awake=False, lr_dropout=0.0, **settings).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    generator, kept = seeded(1), []
    for step in range(steps):
        optimizer.zero_grad()
        terms = method.loss(batch, step / steps, generator)
        terms["loss"].backward()
        optimizer.step()
        kept.append({name: float(term.detach()) for name, term in terms.items()})
    return method.eval(), kept


def test_overfits_one_tile_and_disentangles(tiles, at):
    batch = tiles(1)
    method, kept = trained(batch)
    features = method.condition(batch)
    truth = smoothed(batch.hr, method.config.smooth_bins)
    base = method.residual(batch).base
    before = (base - truth).square().mean()
    assert (method.mean(batch, features) - truth).square().mean() < 0.75 * before
    samples = torch.stack([method.predict(batch, at(batch, sample=n), features) for n in range(3)]).mean(0)
    assert (samples - truth).square().mean() < 0.9 * before
    disentangled = [terms["disentangle"] for terms in kept]
    assert sum(disentangled[-20:]) < 0.5 * sum(disentangled[:20])


def test_loss_repeats_itself(tiles):
    method, batch = model().train(), tiles(1)
    terms = method.loss(batch, 0.0, seeded(4))
    assert torch.equal(terms["loss"], method.loss(batch, 0.0, seeded(4))["loss"])


def test_image_pixels_finer_than_bins_and_larger_patches(tiles, at):
    method = model(image_um=5.0, tile_lr=4, patch_lr=2)
    batch = tiles(1, side=4)
    fine = replace(batch, image=batch.image.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert method.kept_patches(fine, 0.0).shape == (1, 4)
    assert method.predict(fine, at(fine)).shape == batch.hr.shape


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosine"}, "schedule must be one of edm, ddpm"),
        ({"region": 2}, "region must be odd"),
        ({"patch_lr": 3}, "whole number of patch_lr"),
        ({"graph_weight": 1.5}, "graph_weight must lie between 0 and 1"),
        ({"entropy_threshold": -1.0}, "entropy_threshold must lie between"),
        ({"mean_share": 1.0}, "mean_share is a probability"),
        ({"beta_start": 0.0}, "need 0 < beta_start"),
        ({"overlap_lr": 8}, "cannot overlap"),
        ({"disentangling_weight": -1.0}, "cannot be negative"),
        ({"lr_dropout": 1.0}, "lr_dropout is a probability"),
        ({"image_um": 3.0}, "whole number of image_um"),
        ({"gene_channels": 0}, "gene_channels must be positive"),
        ({"grap_weight": 0.2}, "did you mean graph_weight"),
    ],
)
def test_config_says_what_is_wrong(settings, words):
    with pytest.raises(UsageError, match=words):
        configured(DiffSTConfig, settings)


def test_empty_panel():
    with pytest.raises(ValueError, match="panel is empty"):
        DiffST(SMALL, ())
