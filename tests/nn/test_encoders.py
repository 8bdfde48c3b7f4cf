"""Encoders of feature maps, rasters and genes."""

import pytest
import torch

from stsr.nn.encoders import ContextEncoder, GeneEmbedding, Projection, RasterEncoder


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_context_reaches_beyond_a_pixel_and_ends_in_a_unit_vector():
    encoder = ContextEncoder(6, 8, 5, widths=(8, 12)).eval()
    maps = torch.zeros(2, 6, 12, 20)
    maps[1, :, 6, 10] = 1
    features, vectors = encoder(maps)
    assert features.shape == (2, 8, 12, 20)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2))
    changed = (features[1] - features[0]).abs().sum(0) > 1e-6
    assert changed[6, 10] and changed[4, 8]


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
