from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from stsr import checkpoint
from stsr.diffusion.noise import Noise, TileNoise
from stsr.methods.batch import Batch
from stsr.methods.corrdiff import CorrDiff, CorrDiffConfig, leading_directions, posterior_draw
from stsr.methods.interpolation import Bicubic, Bilinear
from stsr.methods.method import configured, fill_unmeasured
from stsr.methods.regression import RegressionConfig, UNetRegression

PANEL = ("A", "B", "C", "D", "E", "F")
SMALL = {"widths": (8, 12), "factors": 5, "lr_channels": 8, "genes_per_step": 6, "lr_dropout": 0.0}


def make_batch(tiles=3, seed=0, side=3):
    """Dark bins hold the first three genes, light ones the others; hidden patches, unseen in the image, shift both."""
    generator = torch.Generator().manual_seed(seed)
    dark = torch.rand(tiles, 1, side * 10, side * 10, generator=generator).gt(0.5).float()
    patches = torch.randn(tiles, 1, side * 2, side * 2, generator=generator)
    hidden = 0.7 * torch.nn.functional.interpolate(patches, scale_factor=5, mode="bilinear")
    first, last = (3 * dark + 0.1) * hidden.exp(), (3 * (1 - dark) + 0.1) * (-hidden).exp()
    rate = torch.cat([first] * 3 + [last] * 3, 1)
    hr = torch.poisson(rate, generator=generator)
    lr = hr.reshape(tiles, 6, side, 10, side, 10).sum((3, 5))
    image = (255 * (1 - 0.7 * dark)).to(torch.uint8).repeat(1, 3, 1, 1)
    return Batch(
        image, lr, torch.ones(tiles, 1, side, side), torch.ones(tiles, dtype=torch.bool), lr.mean((2, 3)),
        torch.eye(6), PANEL, hr,
    )  # fmt: skip


@torch.enable_grad()
def trained(method, steps=80, rate=5e-3, late=1.0):
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(method.parameters(), rate)
    losses = []
    for step in range(steps):
        terms = method.loss(make_batch(seed=step % 7), late * step / steps, generator)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        losses.append({name: float(term.detach()) for name, term in terms.items()})
    return method.eval(), losses


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    batch = make_batch()
    return trained(UNetRegression(RegressionConfig(**SMALL), PANEL, batch.lr.mean((0, 2, 3)).numpy()))


@pytest.fixture(scope="module")
def corrdiff():
    torch.manual_seed(0)
    batch = make_batch()
    config = CorrDiffConfig(**SMALL, directions=2, denoiser_widths=(8, 12), residual_from=0.3)
    return trained(CorrDiff(config, PANEL, batch.lr.mean((0, 2, 3)).numpy()), steps=120)


def noise(seed=0, tiles=3, sign=1.0):
    return TileNoise(Noise(seed, sign=sign), tuple((0, 30 * tile) for tile in range(tiles)))


def correlation(prediction, truth):
    return float(np.corrcoef(prediction.flatten().numpy(), truth.flatten().numpy())[0, 1])


@torch.no_grad()
def test_the_regression_learns_what_the_image_tells(unet):
    method, losses = unet
    assert losses[-1]["poisson"] < losses[0]["poisson"] - 1
    batch = make_batch(seed=100)
    learned = correlation(method.predict(batch, None), batch.hr)
    plain = correlation(Bilinear(panel=PANEL).predict(batch, None), batch.hr)
    assert learned > plain + 0.3


@torch.no_grad()
def test_image_and_spots_matter(unet):
    method, _ = unet
    batch = make_batch(seed=100)
    base = method.predict(batch, None)
    assert not torch.allclose(base, method.predict(replace(batch, image=255 - batch.image), None), rtol=0.1)
    assert not torch.allclose(base, method.predict(replace(batch, lr=batch.lr.flip(1)), None), rtol=0.1)


@torch.no_grad()
def test_turning_the_tile_turns_the_prediction(unet):
    method, _ = unet
    batch = make_batch(seed=100)
    parts = {name: getattr(batch, name).flip(-1).rot90(1, (-2, -1)) for name in ("image", "lr", "lr_mask")}
    turned = method.predict(replace(batch, **parts), None)
    np.testing.assert_allclose(turned, method.predict(batch, None).flip(-1).rot90(1, (-2, -1)), rtol=1e-3)


@torch.no_grad()
def test_without_spots_the_reference_sets_the_level(unet):
    method, _ = unet
    batch = make_batch(tiles=1, seed=100).without_lr(torch.tensor([True]))
    rate = method.predict(batch, None)
    assert rate.isfinite().all()
    assert rate.mean() == pytest.approx(float(method.reference.mean()) / 100, rel=0.5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["unet", "corrdiff"])
def test_gene_order_and_blocks_do_not_matter(which, request):
    method, _ = request.getfixturevalue(which)
    batch = make_batch(seed=100)
    features = method.condition(batch)
    drawn = method.draw(batch, features, noise())
    whole = method.predict(batch, noise(), features, drawn)
    order = torch.tensor([4, 0, 5])
    np.testing.assert_allclose(
        method.predict(batch.of_genes(order), noise(), features, drawn), whole[:, order], rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("which", ["unet", "corrdiff"])
def test_a_tile_does_not_depend_on_its_batch(which, request):
    method, _ = request.getfixturevalue(which)
    batch = make_batch(seed=100)
    whole = method.predict(batch, noise())
    alone = method.predict(batch.of_tiles(slice(1, 2)), TileNoise(Noise(0), ((0, 30),)))
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_mixed_gene_lies_between_its_parents(unet):
    method, _ = unet
    batch = make_batch(seed=100)
    flat = replace(batch, lr=torch.full_like(batch.lr, 50.0), lr_mean=torch.full_like(batch.lr_mean, 50.0))
    parents = method.predict(flat, None, method.condition(batch))[:, [0, 3]]
    mixed = replace(
        flat.of_genes(torch.tensor([0])), genes=torch.tensor([[0.5, 0, 0, 0.5, 0, 0]]), names=("X",)
    )
    child = method.predict(mixed, None, method.condition(batch))[:, 0]
    np.testing.assert_allclose(child, parents.log().mean(1).exp(), rtol=0.1)


@torch.no_grad()
def test_the_denoiser_learns_the_residual(corrdiff):
    method, _ = corrdiff
    untrained = CorrDiff(method.config, PANEL, np.ones(6))
    untrained.load_state_dict(
        {k: v for k, v in method.state_dict().items() if "denoiser" not in k}, strict=False
    )
    batch = make_batch(tiles=12, seed=100)
    features = method.condition(batch)
    errors = [
        float(one.eval().denoising_error(batch, features, torch.Generator().manual_seed(0)))
        for one in (method, untrained)
    ]
    assert errors[0] < 0.98 * errors[1]


@torch.no_grad()
def test_samples_differ_and_average_to_the_mean(corrdiff):
    method, _ = corrdiff
    batch = make_batch(seed=100)
    features = method.condition(batch)
    draws = torch.stack([method.predict(batch, noise(seed), features) for seed in range(24)])
    assert draws.std(0).mean() > 0.02 * draws.mean()
    assert draws.mean() == pytest.approx(float(method.mean(batch, features).mean()), rel=0.1)
    np.testing.assert_array_equal(draws[3], method.predict(batch, noise(3), features))


@torch.no_grad()
def test_guidance_and_sampler_change_the_draw(corrdiff):
    method, _ = corrdiff
    batch = make_batch(seed=100)
    features = method.condition(batch)
    plain = method.draw(batch, features, noise())
    before = method.sampling
    try:
        for change in ({"guidance": 2.0}, {"sampler": "euler"}, {"steps": 3}):
            method.sampling = replace(before, **change)
            assert not torch.allclose(method.draw(batch, features, noise()), plain, atol=1e-3)
    finally:
        method.sampling = before


def test_the_residuals_gradient_stays_out_of_the_mean():
    torch.manual_seed(0)
    config = CorrDiffConfig(**SMALL, directions=2, denoiser_widths=(8, 12))
    method = CorrDiff(config, PANEL, np.ones(6))
    batch = make_batch()
    features = method.condition(batch)
    method.denoising_error(batch, features.detach(), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None or not p.grad.any() for p in [*method.trunk.parameters(), method.loadings])
    assert any(p.grad is not None and p.grad.any() for p in method.denoiser.parameters())


def test_posterior_draws_have_the_posterior_of_a_single_gene():
    """One gene, loading 1: the mode solves count - rate exp(s) = s / spread^2, the precision is the slope there."""
    counts, rate = torch.full((1, 1, 60, 60), 40.0), torch.full((1, 1, 60, 60), 4.0)
    draws = posterior_draw(
        counts, rate, torch.ones(1, 1), torch.tensor([0.5]), torch.Generator().manual_seed(0)
    )
    mode = brentq(lambda s: 40 - 4 * np.exp(s) - s / 0.25, 0, 5)
    assert draws.mean() == pytest.approx(mode, abs=0.02)
    assert draws.var() == pytest.approx(1 / (4 + 4 * np.exp(mode)), rel=0.1)


def test_draws_spread_as_far_as_the_counts_exceed_poisson():
    generator = torch.Generator().manual_seed(0)
    loadings = torch.tensor([[1.0], [0.8], [-0.6]])
    hidden = 0.5 * torch.randn(4, 1, 60, 60, generator=generator)
    rate = torch.full((4, 3, 60, 60), 6.0)
    counts = torch.poisson(rate * torch.einsum("pr,bryx->bpyx", loadings, hidden).exp(), generator=generator)
    spread = torch.ones(1)
    for _ in range(10):  # as tracked during training
        draws = posterior_draw(counts, rate, loadings, spread, generator)
        spread = draws.std((0, 2, 3))
    assert float(spread) == pytest.approx(0.5, rel=0.1)
    assert correlation(draws, hidden) > 0.6


def test_directions_are_orthonormal_and_lead_with_the_strongest():
    loadings = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]])
    turn = leading_directions(loadings, torch.tensor([1.0, 9.0, 1.0]), 2)
    np.testing.assert_allclose(turn.T @ turn, np.eye(2), atol=1e-6)
    np.testing.assert_allclose(turn.abs().T @ torch.arange(3.0), [1.0, 0.0], atol=1e-6)


def test_gaps_are_filled_from_neighbours_then_from_the_scale():
    lr = torch.zeros(1, 1, 7, 7)
    lr[..., 0, 0] = 8
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 0, 0] = 1
    filled = fill_unmeasured(lr, mask, torch.tensor([[3.0]]))
    assert filled[0, 0, 2, 2] == 8 and filled[0, 0, 3, 3] == 3


@torch.no_grad()
def test_interpolations_of_flat_spots_are_flat():
    batch = replace(make_batch(), lr=torch.full((3, 6, 3, 3), 20.0))
    for kind in (Bilinear, Bicubic):
        np.testing.assert_allclose(kind(panel=PANEL).predict(batch, None), 0.2, rtol=1e-5)


def test_configs_are_checked_with_a_sentence():
    from stsr.errors import UsageError

    with pytest.raises(UsageError, match="did you mean factors"):
        configured(RegressionConfig, {"factor": 3})
    with pytest.raises(UsageError, match="directions must lie in"):
        configured(CorrDiffConfig, {"factors": 4, "directions": 5})


def hidden_batch(seed):
    """As `make_batch`, but patches whose effect differs between genes cannot be seen in spots or image."""
    batch = make_batch(tiles=4, seed=seed, side=6)
    generator = torch.Generator().manual_seed(1000 + seed)
    patches = torch.randn(4, 6, 30, 30, generator=generator)
    hidden = 0.5 * torch.nn.functional.interpolate(patches, scale_factor=2)
    return replace(batch, hr=torch.poisson(batch.hr * hidden.exp() / np.exp(0.125), generator=generator))


def test_dispersion_is_fitted_to_what_the_model_cannot_know(unet, tmp_path):
    method, _ = unet
    assert method.dispersion is None
    method.finish(hidden_batch(seed) for seed in range(100, 108))
    found = method.dispersion
    batch = hidden_batch(200)
    mean = method.predict(batch, None).detach().numpy()
    truth = batch.hr.numpy()
    for factor in (2, 5):
        a, b = (
            maps.reshape(4, 6, 60 // factor, factor, 60 // factor, factor).sum((3, 5))
            for maps in (mean, truth)
        )
        sd = np.stack(
            [found.sd(tile, level, PANEL, 10.0 * factor)
             for tile, level in zip(a, (batch.lr_mean / 100).numpy() * factor**2, strict=True)]
        )  # fmt: skip
        standard = ((b - a) ** 2).mean() / (sd**2 + a).mean()
        assert 0.6 < standard < 1.6
        assert ((b - a) ** 2).mean() > 4 * a.mean()  # counting noise alone does not explain it
    again = checkpoint.load(checkpoint.save(tmp_path / "m.safetensors", method, "unet", {})).method
    assert again.dispersion.own == pytest.approx(found.own)
    method.set_dispersion(replace(found, shared=(0.0,) * 4, own=(0.0,) * 4, genes={}))  # for other tests


def test_weights_of_earlier_versions_have_no_dispersion(unet):
    method, _ = unet
    weights = {key: value for key, value in method.state_dict().items() if not key.startswith("dispersion")}
    fresh = UNetRegression(RegressionConfig(**SMALL), PANEL)
    fresh.load_state_dict(weights)
    assert fresh.dispersion is None
    with pytest.raises(RuntimeError, match="offsets"):
        fresh.load_state_dict({key: value for key, value in weights.items() if key != "offsets"})


def test_divided_counts_are_told_to_the_fit(unet):
    """Counts that were divided by area scatter less, which must not hide the dispersion."""
    method, _ = unet
    batches = [hidden_batch(seed) for seed in range(4)]
    method.finish(batches)
    plain = sum(method.dispersion.own)
    method.finish(replace(batch, divided=torch.full((4,), 0.8)) for batch in batches)
    assert sum(method.dispersion.own) > plain
    method.set_dispersion(replace(method.dispersion, shared=(0.0,) * 4, own=(0.0,) * 4, genes={}))
