"""C3-Diff: what conditions it, what its losses reach, and what its predictions may depend on."""

from dataclasses import replace

import pytest
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.errors import UsageError
from stsr.methods.c3diff import C3Diff, C3DiffConfig
from stsr.methods.method import configured
from stsr.methods.sampling import Sampling
from stsr.methods.target import Residual, gaussian, smoothed

PANEL = ("GATA3", "ERBB2", "LUM", "POSTN", "LYZ")
SMALL = C3DiffConfig(
    tile_lr=3,
    overlap_lr=1,
    widths=(16, 24),
    image_widths=(8, 12),
    feature_channels=8,
    vector_channels=8,
    gene_channels=8,
    embedding_channels=16,
    genes_per_tile=3,
    steps=3,
)
BIG_ENOUGH = 1e-4  # of counts per bin: a change larger than rounding


def model(panel=PANEL, awake=True, **settings):
    """A small model; awake, its layers that start at zero do not."""
    torch.manual_seed(0)
    method = C3Diff(replace(SMALL, **settings), panel)
    if awake:
        torch.nn.init.normal_(method.unet.head[-1].weight, std=0.1)
        torch.nn.init.normal_(method.null_condition)
        torch.nn.init.normal_(method.null_steering)
    return method.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def part(batch, index):
    """One tile of a batch, and its noise's place."""
    return batch.of_tiles(slice(index, index + 1)), TileNoise(Noise(0), ((0, 30 * index),))


def test_predicts_counts_and_repeats_itself(tiles, at):
    method, batch = model(), tiles()
    counts = method.predict(batch, at(batch))
    assert counts.shape == (2, 5, 30, 30)
    assert counts.isfinite().all()
    assert (counts >= 0).all()
    assert torch.equal(counts, method.predict(batch, at(batch)))
    assert not torch.allclose(counts, method.predict(batch, at(batch, sample=1)), atol=BIG_ENOUGH)
    given = method.predict(batch, at(batch), features=method.condition(batch))
    assert torch.equal(counts, given)


def test_neither_gene_order_nor_blocks_nor_batches_matter(tiles, at):
    method, batch = model(), tiles()
    counts = method.predict(batch, at(batch))
    order = torch.tensor([3, 0, 4])
    some = method.predict(batch.of_genes(order), at(batch), method.condition(batch))
    assert torch.allclose(some, counts[:, order], atol=1e-5)
    for index in range(2):
        one, noise = part(batch, index)
        assert torch.allclose(method.predict(one, noise)[0], counts[index], atol=1e-5)


def test_image_spots_and_gene_matter(tiles, at):
    method, batch = model(), tiles()
    counts = method.predict(batch, at(batch))

    def differs(other):
        return float((method.predict(other, at(batch)) - counts).abs().mean()) > BIG_ENOUGH

    assert differs(replace(batch, image=255 - batch.image))
    assert differs(replace(batch, lr=batch.lr.flip(-1)))
    assert differs(replace(batch, lr_mask=torch.zeros_like(batch.lr_mask)))
    assert differs(replace(batch, genes=batch.genes.flip(0)))  # other codes, the same spots and noise
    assert differs(replace(batch, lr_mean=3 * batch.lr_mean))


def test_lr_features_condition_the_denoiser_beside_the_base(tiles):
    # the same base, without the encoders' maps
    method, batch = model(), tiles()
    features, steering = method.condition(batch), method.genes(batch.genes, method.scale(batch))
    lr = method._encode_lr(batch, steering)
    base = method.residual(batch).base
    with_maps = method._condition_genes(batch, features, lr, base, 1.0)
    for name in ("modality_maps", "content_maps"):
        without = replace(lr, **{name: torch.zeros_like(lr.modality_maps)})
        assert not torch.allclose(
            method._condition_genes(batch, features, without, base, 1.0), with_maps, atol=1e-3
        )


def test_mixture_genes(tiles, at):
    method, batch = model(), tiles()
    mixed = replace(batch, genes=batch.genes.clone())
    mixed.genes[0] = torch.tensor([0.3, 0.2, 0.5, 0, 0])
    counts, other = method.predict(batch, at(batch)), method.predict(mixed, at(batch))
    assert other.isfinite().all()
    assert not torch.allclose(other[:, 0], counts[:, 0], atol=BIG_ENOUGH)
    assert torch.allclose(other[:, 1:], counts[:, 1:], atol=1e-5)


@pytest.mark.parametrize("imputation", ["dynamic", "mean", "zero", "none"])
def test_predicts_without_spots_at_batch_size_one(imputation, tiles, at):
    method, batch = model(imputation=imputation), tiles()
    alone, noise = part(batch.without_lr(torch.tensor([True, True])), 0)
    counts = method.predict(alone, noise)
    assert counts.isfinite().all()
    # a neighbour with spots changes nothing: prediction imputes nothing
    mixed = batch.without_lr(torch.tensor([True, False]))
    assert torch.allclose(method.predict(mixed, at(mixed))[:1], counts, atol=1e-5)


def test_imputation_fills_missing_features_while_training_and_fades(tiles):
    method = model()
    batch = tiles(3).without_lr(torch.tensor([False, True, False]))
    features, steering = method.condition(batch), method.genes(batch.genes, method.scale(batch))
    lr, base = method._encode_lr(batch, steering), method.residual(batch).base
    start, half, end = (method._condition_genes(batch, features, lr, base, p) for p in (0.0, 0.5, 1.0))
    assert torch.equal(start[[0, 2]], end[[0, 2]])
    effect = (start - end)[1].abs().mean()
    assert effect > 1e-3
    assert torch.allclose((half - end)[1], (start - end)[1] / 2, atol=1e-5)
    mean = model(imputation="mean")._condition_genes(batch, features, lr, base, 0.0)
    assert not torch.allclose(mean[1], start[1], atol=1e-6)
    zero = model(imputation="zero")._condition_genes(batch, features, lr, base, 0.0)
    assert torch.allclose(zero[1], end[1], atol=1e-6)


def test_guidance_weighs_condition_against_none(tiles, at):
    method, batch = model(), tiles(1)
    counts = {}
    for weight in (0.0, 1.0, 3.0):
        method.sampling = Sampling("ddim", 1, weight)  # a single step is linear in the two denoisers
        counts[weight] = method.predict(batch, at(batch))
    residual = method.residual(batch)
    x0 = {weight: (value - residual.base) / residual.spread for weight, value in counts.items()}
    inside = torch.stack(list(counts.values())).amin(0) > 0  # where nothing was clipped at zero
    assert inside.any()
    assert torch.allclose(x0[3.0][inside], (3 * x0[1.0] - 2 * x0[0.0])[inside], atol=1e-3)
    assert not torch.allclose(counts[3.0], counts[1.0], atol=BIG_ENOUGH)


def test_without_condition_nothing_but_the_noise_is_seen(tiles, at):
    method, batch = model(guidance=0.0), tiles(1)
    other = replace(batch, image=255 - batch.image, genes=batch.genes.flip(0))
    assert torch.equal(method.predict(batch, at(batch)), method.predict(other, at(batch)))


@pytest.mark.parametrize("sampler", ["ancestral", "euler", "heun", "dpmpp_2m"])
def test_every_sampler_walks(sampler, tiles, at):
    method, batch = model(), tiles(1)
    method.sampling = Sampling(sampler, 2)
    assert method.predict(batch, at(batch)).isfinite().all()


ENCODERS = ("image_modality", "image_content", "lr_modality", "lr_content")
REACHED = {
    "modal": ("image_modality", "lr_modality"),
    "content": ("image_content", "lr_content"),
    "inter": ("image_modality", "image_content"),
    "denoise": ENCODERS,
}


@pytest.mark.parametrize("term", REACHED)
def test_every_term_reaches_its_encoders(term, tiles):
    method = model(temperature=1.0, lr_dropout=0.0).train()
    method.loss(tiles(4), 0.3, seeded())[term].backward()
    for name in REACHED[term]:
        for key, parameter in getattr(method, name).named_parameters():
            if term == "denoise" and "project" in key:
                continue  # unit vectors are for the other terms; nothing is imputed here
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.abs().sum() > 0, (name, key)
    for name in set(ENCODERS) - set(REACHED[term]):
        assert all(p.grad is None or not p.grad.any() for p in getattr(method, name).parameters()), name
    if term in ("modal", "content"):
        assert method.genes.table.grad.any()
    if term != "denoise":
        assert method.log_temperature.grad != 0
    else:
        assert method.genes.table.grad.any()


def test_imputation_teaches_which_images_are_alike(tiles):
    method = model(lr_dropout=0.0, condition_dropout=0.0).train()
    batch = tiles(4).without_lr(torch.tensor([True, False, False, False]))
    method.loss(batch, 0.0, seeded())["denoise"].backward()
    assert method.image_modality.project.mix[-1].weight.grad.any()


def test_terms_are_weighted(tiles):
    method = model().train()
    terms = method.loss(tiles(3), 0.5, seeded())
    c = method.config
    expected = terms["denoise"] + c.modal_weight * terms["modal"]
    expected = expected + c.content_weight * terms["content"] + c.inter_weight * terms["inter"]
    assert torch.allclose(terms["loss"], expected)
    bare = model(modal_weight=0.0, content_weight=0.0, inter_weight=0.0).train()
    terms = bare.loss(tiles(3), 0.5, seeded())
    assert torch.equal(terms["loss"], terms["denoise"])


def test_hypersphere_noise_only_while_training(tiles):
    settings = {"lr_dropout": 0.0, "condition_dropout": 0.0}
    quiet, loud = model(hypersphere_noise=0.0, **settings), model(hypersphere_noise=0.5, **settings)
    batch = tiles(3)
    content = [m.loss(batch, 0.5, seeded())["content"] for m in (quiet, loud)]
    assert torch.equal(*content)
    content = [m.train().loss(batch, 0.5, seeded())["content"] for m in (quiet, loud)]
    assert not torch.allclose(*content)


def test_dropping_only_while_training(tiles):
    always = {"lr_dropout": 0.999, "condition_dropout": 0.999, "hypersphere_noise": 0.0}
    dropping, keeping = model(**always), model(lr_dropout=0.0, condition_dropout=0.0, hypersphere_noise=0.0)
    batch = tiles(3)
    assert torch.equal(*(m.loss(batch, 0.5, seeded())["loss"] for m in (dropping, keeping)))
    terms = dropping.train().loss(batch, 0.5, seeded())
    assert float(terms["content"]) == 0  # no spots, no pairs
    assert not torch.allclose(terms["denoise"], keeping.train().loss(batch, 0.5, seeded())["denoise"])
    terms["denoise"].backward()
    assert dropping.null_condition.grad.any()
    assert dropping.null_steering.grad.any()


def test_loss_at_batch_size_one_and_repeatable(tiles):
    method, batch = model().train(), tiles(1)
    terms = method.loss(batch, 0.0, seeded(4))
    assert terms["modal"].item() == terms["content"].item() == terms["inter"].item() == 0
    assert terms["loss"].isfinite()
    assert torch.equal(terms["loss"], method.loss(batch, 0.0, seeded(4))["loss"])


def test_overfits_one_tile(tiles, at):
    method, batch = model(awake=False, lr_dropout=0.0, genes_per_tile=5).train(), tiles(1)
    before = mean_loss(method, batch)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    generator = seeded(1)
    for step in range(120):
        optimizer.zero_grad()
        method.loss(batch, step / 120, generator)["loss"].backward()
        optimizer.step()
    assert mean_loss(method, batch) < 0.6 * before
    counts = torch.stack([method.predict(batch, at(batch, sample=n)) for n in range(3)]).mean(0)
    truth = smoothed(batch.hr, method.config.smooth_bins)
    base = method.residual(batch).base
    assert (counts - truth).square().mean() < 0.9 * (base - truth).square().mean()


@torch.no_grad()
def mean_loss(method, batch):
    method.eval()
    losses = [float(method.loss(batch, 1.0, seeded(100 + n))["denoise"]) for n in range(8)]
    method.train()
    return sum(losses) / len(losses)


def test_image_pixels_finer_than_bins(tiles, at):
    method = model(image_um=5.0)
    batch = tiles(1)
    batch = replace(batch, image=batch.image.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert method.predict(batch, at(batch)).shape == (1, 5, 30, 30)
    assert method.requirements.image_um == 5.0


def test_residual_returns_and_keeps_totals(tiles):
    batch = tiles(2)
    residual = Residual.of(batch, batch.lr_mean, 10, 1.0)
    x0 = residual.encode(batch.hr)
    back = residual.decode(x0)
    assert torch.allclose(back, smoothed(batch.hr, 1.0), atol=1e-4)
    assert torch.allclose(back.sum((2, 3)), batch.hr.sum((2, 3)), rtol=1e-4)
    assert 0.5 < float(x0.std()) < 1.5  # of unit size for any counts
    # linear in counts: the mean over samples is the mean of counts
    other = residual.encode(batch.hr.flip(0))
    assert torch.allclose(residual.decode((x0 + other) / 2), (back + back.flip(0)) / 2, atol=1e-4)
    assert torch.equal(smoothed(batch.hr, 0), batch.hr)
    assert torch.equal(gaussian(0), torch.ones(1))


def test_without_spots_the_base_is_the_reference(tiles):
    reference = torch.tensor([1.0, 2, 3, 4, 5])
    torch.manual_seed(0)
    method = C3Diff(SMALL, PANEL, reference.numpy())
    batch = tiles(2).without_lr(torch.tensor([False, True]))
    base = method.residual(batch).base
    assert torch.allclose(base[1], (reference / 100)[:, None, None].expand(5, 30, 30))
    assert not torch.allclose(base[0], base[1])


def test_the_default_is_small():
    method = C3Diff(panel=PANEL)
    assert sum(parameter.numel() for parameter in method.parameters()) < 2e6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_um": 3.0}, "whole number of image_um"),
        ({"image_um": 0.0}, "image_um must be positive"),
        ({"overlap_lr": 8}, "cannot overlap"),
        ({"imputation": "median"}, "imputation must be one of"),
        ({"sigma_min": 30.0}, "sigma_min < sigma_max"),
        ({"genes_per_tile": 0}, "must be positive"),
        ({"lr_dropout": 1.0}, "probability"),
        ({"inter_weight": -1.0}, "cannot be negative"),
        ({"sampler": "dpm"}, "no sampler"),
        ({"steps": 0}, "at least 1"),
        ({"guidance": -1.0}, "guidance must be"),
        ({"guidence": 1.0}, "did you mean guidance"),
    ],
)
def test_config_says_what_is_wrong(settings, words):
    with pytest.raises(UsageError, match=words):
        configured(C3DiffConfig, settings)


def test_empty_panel():
    with pytest.raises(ValueError, match="panel is empty"):
        C3Diff()
