"""Encoders of pictures, rasters and genes."""

import pytest
import torch

from stsr.nn.encoders import GeneEmbedding, ImageEncoder, Projection, RasterEncoder, prime_factors


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("factor", [1, 2, 5, 6])
def test_image_encoder_lands_on_the_bins(factor):
    encoder = ImageEncoder(8, 5, factor, widths=(8, 12))
    maps, vectors = encoder(torch.randn(2, 3, 12 * factor, 20 * factor))
    assert maps.shape == (2, 8, 12, 20)
    assert vectors.shape == (2, 5)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    (maps.sum() + vectors[:, 0].sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_image_features_follow_the_picture():
    encoder = ImageEncoder(8, 5, 2, widths=(8,)).eval()
    picture = torch.zeros(1, 3, 40, 40)
    moved = picture.clone()
    moved[..., 20:22, 20:22] = 1  # the bin (10, 10)
    change = (encoder(moved)[0] - encoder(picture)[0]).abs().sum(1)[0]  # (20, 20)
    assert change.flatten().argmax() in [10 * 20 + 10, 10 * 20 + 9, 9 * 20 + 10, 11 * 20 + 10, 10 * 20 + 11]


def test_raster_encoder_is_steered_sample_by_sample():
    encoder = RasterEncoder(2, 8, 5, 6)
    raster, steering = torch.randn(3, 2, 6, 7), torch.randn(3, 6)
    maps, vectors = encoder(raster, steering)
    assert maps.shape == (3, 8, 6, 7)
    assert vectors.shape == (3, 5)
    alone, _ = encoder(raster[1:2], steering[1:2])
    assert torch.allclose(alone[0], maps[1], atol=1e-5)
    other, _ = encoder(raster, steering + 1)
    assert not torch.allclose(other, maps, atol=1e-3)


def test_projection_has_unit_length_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        vectors = Projection(4, 3)(torch.randn(2, 4, 5, 5))
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_projection_of_flat_maps_has_a_gradient():
    maps = torch.ones(1, 4, 1, 1, requires_grad=True)
    Projection(4, 3)(maps)[0, 0].backward()
    assert maps.grad.isfinite().all()


def test_gene_embedding_of_mixtures():
    embedding = GeneEmbedding(4, 3, 8)
    scale = torch.full((1, 3), 2.0)
    half = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])
    first, second, mixed = embedding(half, scale)[0]
    assert torch.allclose(
        mixed, (first + second) / 2, atol=1e-6
    )  # the code is linear, the abundance is shared
    assert not torch.allclose(embedding(half, 10 * scale), embedding(half, scale), atol=1e-3)


def test_prime_factors():
    assert prime_factors(1) == []
    assert prime_factors(20) == [2, 2, 5]
    with pytest.raises(ValueError, match="at least 1"):
        prime_factors(0)
