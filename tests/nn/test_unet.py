"""The U-Net and its pieces."""

import math

import pytest
import torch

from stsr.nn.blocks import ConvBlock, ScalarEmbedding, fourier_features, frequencies, group_norm
from stsr.nn.unet import UNet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 1), (3, 5), (60, 60)])
@pytest.mark.parametrize("widths", [(8,), (8, 16), (8, 12, 16, 20)])
def test_any_size(size, widths):
    net = UNet(3, 5, widths=widths, zero_out=False)
    result = net(torch.randn(2, 3, *size))
    assert result.shape == (2, 5, *size)
    assert result.isfinite().all()


def test_padding_does_not_move_the_picture():
    # an odd window gives what the same window gives once its last row and column are repeated by hand
    net = UNet(1, 1, widths=(8, 8), zero_out=False).eval()
    x = torch.randn(1, 1, 9, 11, generator=generator())
    repeated = torch.cat([x, x[..., -1:, :]], dim=-2)
    repeated = torch.cat([repeated, repeated[..., -1:]], dim=-1)
    assert torch.allclose(net(x), net(repeated)[..., :9, :11], atol=1e-6)


def test_starts_at_zero_unless_told_otherwise():
    x = torch.randn(1, 2, 8, 8)
    assert UNet(2, 3, widths=(8, 8))(x).abs().max() == 0
    assert UNet(2, 3, widths=(8, 8), zero_out=False)(x).abs().max() > 0


def test_embedding_matters_and_each_sample_has_its_own():
    net = UNet(1, 1, widths=(8, 16), embedding_channels=6, zero_out=False).eval()
    x = torch.randn(1, 1, 12, 12).expand(2, -1, -1, -1)
    embedding = torch.randn(2, 6)
    both = net(x, embedding)
    assert (both[0] - both[1]).abs().max() > 1e-3
    assert torch.allclose(both[1:], net(x[1:], embedding[1:]), atol=1e-5)


def test_embedding_must_be_what_the_net_was_made_for():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="embedding_channels=6"):
        UNet(1, 1, widths=(8,), embedding_channels=6)(x)
    with pytest.raises(ValueError, match="embedding_channels=0"):
        UNet(1, 1, widths=(8,))(x, torch.zeros(1, 6))


def test_gradient_reaches_every_parameter():
    net = UNet(2, 2, widths=(8, 12, 16), blocks=2, embedding_channels=4)
    with torch.no_grad():  # initially the last layer is 0 and passes no gradient
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    net(torch.randn(2, 2, 16, 16), torch.randn(2, 4)).pow(2).sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_sees_far_and_near():
    # with three levels one bin must affect bins 16 away, and the finest level must carry single bins
    net = UNet(1, 1, widths=(8, 8, 8), zero_out=False).eval()
    x = torch.randn(1, 1, 48, 48, generator=generator()).requires_grad_()
    net(x)[0, 0, 24, 24].backward()
    reach = x.grad[0, 0].abs()
    assert reach[24, 24] > 0
    assert reach[24, 24 + 16] > 0


def test_skip_connections_carry_single_bins():
    net = UNet(1, 1, widths=(8, 8, 8), zero_out=False).eval()
    for up in net.ups:  # remove the contribution of the coarser levels
        torch.nn.init.zeros_(up.weight)
    x = torch.randn(1, 1, 16, 16, generator=generator())
    changed = x.clone()
    changed[..., 5, 5] += 1
    moved = (net(changed) - net(x)).abs()[0, 0]
    assert moved[5, 5] > 5 * moved[12:, 12:].max() > 0  # GroupNorm has a small effect everywhere


def test_overfits_a_checkerboard():
    target = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(6, 6)[None, None]
    x = torch.cat([target.roll(1, -1), torch.randn(1, 1, 12, 12, generator=generator())], dim=1)
    net = UNet(2, 1, widths=(8, 16))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(80):
        loss = (net(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01


def test_dropout_acts_in_training_only():
    net = UNet(1, 1, widths=(8,), dropout=0.5, zero_out=False)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_channels_last_is_kept_and_agrees():
    net = UNet(2, 3, widths=(8, 16), embedding_channels=4, zero_out=False).eval()
    x, embedding = torch.randn(2, 2, 12, 12), torch.randn(2, 4)
    plain = net(x, embedding)
    net = net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), embedding)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain, last, atol=1e-4)


@pytest.mark.parametrize("arguments", [{"widths": ()}, {"blocks": 0}])
def test_needs_a_level_and_a_block(arguments):
    with pytest.raises(ValueError, match="needs at least one level"):
        UNet(1, 1, **arguments)


def test_block_modulates_as_film_says():
    block = ConvBlock(4, 8, embedding_channels=3)
    with torch.no_grad():
        block.film.weight.zero_()
        block.film.bias.copy_(torch.cat([torch.full((8,), -1.0), torch.zeros(8)]))  # scale by 0, shift by 0
        block.conv2.bias.zero_()
    x = torch.randn(1, 4, 6, 6)
    assert torch.allclose(block(x, torch.randn(1, 3)), block.skip(x))  # the branch contributes nothing


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (8, 2), (12, 3), (32, 8), (34, 2), (96, 8)])
def test_group_norm_has_groups_that_divide(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_fourier_features_by_hand():
    features = fourier_features(torch.tensor([0.0, 1.0]), frequencies(4, 0.5, 2.0))
    assert features[0].tolist() == [1, 1, 0, 0]
    assert features[1].tolist() == pytest.approx([math.cos(0.5), math.cos(2.0), math.sin(0.5), math.sin(2.0)])
    assert frequencies(6, 1.0, 16.0).tolist() == pytest.approx([1, 4, 16])
    with pytest.raises(ValueError, match="even"):
        frequencies(5)


def test_scalar_embedding_tells_noise_levels_apart():
    embed = ScalarEmbedding(16)
    values = embed(torch.linspace(-1.5, 1.1, 14))  # ln(sigma) / 4, each sigma 2.2 times the one before
    assert values.shape == (14, 16)
    distances = torch.cdist(values, values) + 1e9 * torch.eye(14)
    assert distances.min() > 0.02
    assert "radians" not in embed.state_dict()
