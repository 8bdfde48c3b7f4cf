"""What every method that learns does with fine pixels, patch features, and genes that a section did not measure."""

from dataclasses import replace

import pytest
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.methods import method_class
from stsr.methods.method import configured, interpolated
from stsr.methods.regression import RegressionConfig, UNetRegression

LEARNING = ("unet", "corrdiff", "c3diff", "diffst")
REGRESSION = {"widths": (8, 12), "factors": 5, "lr_channels": 8, "genes_per_step": 6, "views": 1}
DIFFUSION = {
    "widths": (8, 12),
    "image_widths": (8, 12),
    "feature_channels": 8,
    "gene_channels": 8,
    "embedding_channels": 16,
    "steps": 2,
}
SMALL = {
    "unet": REGRESSION,
    "corrdiff": {**REGRESSION, "directions": 3, "denoiser_widths": (8, 12)},
    "c3diff": DIFFUSION,
    "diffst": {**DIFFUSION, "attention_channels": 8},
}


def model(name, panel, awake=True, **settings):
    """A small model that reads pixels of 2 um; awake, its layers that start at zero do not."""
    torch.manual_seed(0)
    chosen = method_class(name)
    given = {"image_um": 2.0, "image_channels": 8, "tile_lr": 3, "overlap_lr": 1, **SMALL[name], **settings}
    method = chosen(configured(chosen.Config, given), panel)
    with torch.no_grad():
        for parameter in method.parameters():
            if awake and not parameter.any():
                parameter.normal_(std=0.1)
        for buffer, values in method.named_buffers():
            if buffer == "turn":
                values.normal_()
    return method.eval()


def stripes(tiles, width):
    """Black and white stripes of ``width`` pixels of 2 um: all bins of 10 um have the same mean over two bins."""
    at = torch.arange(150)
    return (255 * (at // width % 2)).to(torch.uint8).expand(tiles, 3, 150, 150)


def predicted(method, batch):
    features = method.condition(batch)
    noise = TileNoise(Noise(0), tuple((0, 0) for _ in range(len(batch))))
    drawn = method.draw(batch, features, noise)
    return method.predict(batch, noise, features, drawn)


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_a_pattern_finer_than_a_bin_changes_the_prediction(name, tiles, panel):
    method, batch = model(name, panel), tiles()
    maps = [predicted(method, replace(batch, image=stripes(len(batch), width))) for width in (1, 5)]
    scale = maps[0].std()
    assert (maps[0] - maps[1]).abs().mean() > 0.01 * scale


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_an_image_is_encoded_once_for_all_genes_and_samples(name, tiles, panel):
    method, batch = model(name, panel), replace(tiles(), image=stripes(2, 3))
    calls = []
    method.encoder.register_forward_hook(lambda *_: calls.append(1))
    features = method.condition(batch)
    for sample in range(2):
        noise = TileNoise(Noise(0, sample), ((0, 0), (0, 0)))
        drawn = method.draw(batch, features, noise)
        for gene in range(3):
            method.predict(batch.of_genes(torch.tensor([gene])), noise, features, drawn)
    assert len(calls) == 1


@pytest.mark.parametrize("name", LEARNING)
def test_every_weight_of_the_encoder_has_a_gradient(name, tiles, panel):
    method, batch = model(name, panel, features=4), tiles()
    features = torch.randn(len(batch), 4, 15, 15)
    batch = replace(batch, image=torch.randint(0, 255, (len(batch), 3, 150, 150)).byte(), features=features)
    method.train().loss(batch, 0.9, torch.Generator().manual_seed(0))["loss"].backward()
    sizes = {key: float(weight.grad.abs().max()) for key, weight in method.encoder.named_parameters()}
    assert sizes and min(sizes.values()) > 1e-9, sizes


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_patch_features_change_the_prediction(name, tiles, panel):
    method, batch = model(name, panel, features=4), replace(tiles(), image=stripes(2, 3))
    flat = torch.zeros(2, 4, 15, 15)
    marked = flat.clone()
    marked[..., 7, 7] = torch.arange(4.0)
    plain, changed = (predicted(method, replace(batch, features=each)) for each in (flat, marked))
    assert not torch.allclose(plain, changed, rtol=1e-3)


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_the_loss_leaves_out_genes_that_were_not_measured(name, tiles, panel):
    batch = replace(tiles(), image=stripes(2, 3))
    measured = torch.ones(2, len(panel), dtype=torch.bool)
    measured[0, 1] = False
    other = batch.hr.clone()
    other[0, 1] += 7

    def loss(hr, measured):
        method = model(name, panel)
        given = method.completed(replace(batch, hr=hr, measured=measured))
        return float(method.loss(given, 0.2, torch.Generator().manual_seed(0))["loss"])

    assert loss(batch.hr, measured) == pytest.approx(loss(other, measured), rel=1e-6)
    assert loss(batch.hr, None) != pytest.approx(loss(other, None), rel=1e-6)


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_a_gene_that_was_not_measured_is_predicted_whatever_its_spots_hold(name, tiles, panel):
    method, batch = model(name, panel), replace(tiles(), image=stripes(2, 3))
    measured = torch.ones(2, len(panel), dtype=torch.bool)
    measured[:, 1] = False
    other = batch.lr.clone()
    other[:, 1] *= 50
    maps = [
        predicted(method, method.completed(replace(batch, lr=lr, measured=measured)))
        for lr in (batch.lr, other)
    ]
    assert torch.equal(*maps)
    assert (maps[0][:, 1] > 0).any()


@pytest.mark.parametrize("name", (*LEARNING, "bilinear", "bicubic"))
@torch.no_grad()
def test_the_base_replaces_the_interpolated_spots(name, tiles, panel):
    batch = replace(tiles(), image=stripes(2, 3))
    method = model(name, panel) if name in LEARNING else method_class(name)(panel=panel)
    base = interpolated(batch, method.scale(batch), 10, getattr(method, "mode", "bilinear"))
    marked = base.clone()
    marked[:, :, 12:18, 5:25] += 2
    plain, same, changed = (predicted(method, replace(batch, base=each)) for each in (None, base, marked))
    torch.testing.assert_close(same, plain)
    rise = (changed - plain).mean((0, 1))
    assert rise[12:18, 5:25].mean() > 0.2 > 4 * rise[:8].abs().mean()
    hidden = torch.tensor([True, True])
    torch.testing.assert_close(
        predicted(method, replace(batch, base=marked).without_lr(hidden)),
        predicted(method, batch.without_lr(hidden)),
    )


@pytest.mark.parametrize("name", LEARNING)
@torch.no_grad()
def test_the_base_of_a_gene_that_was_not_measured_is_its_mean(name, tiles, panel):
    method, batch = model(name, panel), replace(tiles(), image=stripes(2, 3))
    measured = torch.ones(2, len(panel), dtype=torch.bool)
    measured[:, 1] = False
    base = torch.rand_like(batch.hr)
    full = method.completed(replace(batch, measured=measured, base=base))
    expected = (full.lr_mean[:, 1] / 100)[:, None, None].expand(2, 30, 30)
    torch.testing.assert_close(full.base[:, 1], expected)
    assert torch.equal(full.base[:, 2:], base[:, 2:])


def test_a_gene_that_was_not_measured_has_the_depth_of_the_section(panel, tiles):
    batch = tiles()
    method = UNetRegression(
        RegressionConfig(), panel, 2 * batch.lr_mean[0].numpy()
    )  # the section is half as deep
    measured = torch.ones(2, len(panel), dtype=torch.bool)
    measured[0, 2] = False
    full = method.completed(replace(batch, measured=measured))
    assert full.lr_mean[0, 2] == pytest.approx(float(method.reference[2]) / 2, rel=1e-5)
    assert torch.equal(full.lr[0, 2], full.lr_mean[0, 2] * (batch.lr_mask[0, 0] > 0))
    assert torch.equal(full.lr[1], batch.lr[1])
    blind = method.completed(replace(batch, measured=measured).without_lr(torch.tensor([True, True])))
    assert blind.lr_mean[0, 2] == pytest.approx(float(method.reference[2]))
