"""The image encoder: sizes, places, overlap, and patch features."""

import pytest
import torch

from stsr.nn.image import ImageEncoder

RATIOS = [2, 2.5, 5, 10, 20]  # pixels of 5 (or 4 with bins of 8), 4, 2, 1 and 0.5 um


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pixels(bins: int, ratio: float) -> int:
    return round(bins * ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bins", [(20, 40), (70, 30)])  # 70 bins of 5 pixels are not whole at every stage
def test_maps_have_the_size_of_the_bins(ratio, bins):
    encoder = ImageEncoder(ratio, 16)
    maps = encoder(torch.randn(1, 3, *(pixels(side, ratio) for side in bins)))
    assert maps.shape == (1, 16, *bins)
    assert encoder.out_channels == 16


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bins", [24, 30])
def test_a_mark_shows_in_its_bin(ratio, bins):
    """The response to a mark the size of a bin has its centre on that bin, also where tiles are padded inside."""
    encoder = ImageEncoder(ratio, 16).eval()
    row, column = bins - 9, 9
    plain = torch.zeros(1, 3, pixels(bins, ratio), pixels(bins, ratio))
    marked = plain.clone()
    y, x = (slice(pixels(at, ratio), pixels(at + 1, ratio)) for at in (row, column))
    marked[..., y, x] = 1
    # Only convolutions: group norm spreads a mark over the whole tile.
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    change = (encoder(marked) - encoder(plain)).abs().sum(1)[0]  # (bins, bins)
    at = torch.arange(bins) + 0.5
    centre = (change.sum(1) @ at / change.sum(), change.sum(0) @ at / change.sum())
    assert centre[0].item() == pytest.approx(row + 0.5, abs=0.35)
    assert centre[1].item() == pytest.approx(column + 0.5, abs=0.35)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_bin_sees_pixels_around_it(ratio):
    encoder = ImageEncoder(ratio, 16)
    picture = torch.randn(1, 3, pixels(20, ratio), pixels(20, ratio), requires_grad=True)
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    encoder(picture)[0, :, 10, 10].sum().backward()
    seen = picture.grad[0].abs().sum(0) > 0
    first, last = pixels(10, ratio), pixels(11, ratio)
    assert seen[first:last, first:last].all()
    assert seen[first - 1, first] and seen[first, last]
    assert not seen[: pixels(4, ratio)].any()


def test_channels_widen_towards_the_bins():
    strided = [module for module in ImageEncoder(20, 48).modules() if getattr(module, "stride", 0) == (2, 2)]
    assert [module.out_channels for module in strided] == [8, 12, 24, 48]


def test_pixels_as_large_as_bins_pass_as_they_are():
    encoder = ImageEncoder(1, 48)
    picture = torch.randn(1, 3, 7, 9)
    assert encoder(picture) is picture
    assert encoder.out_channels == 3
    assert not list(encoder.parameters())


def test_cells_smaller_than_a_bin_change_the_maps():
    """Stripes of 1 um and of 5 um have the same mean in every bin; only an encoder of pixels sees a difference."""
    encoder = ImageEncoder(10, 16).eval()
    at = torch.arange(200)
    fine, coarse = ((at // width % 2).float().expand(1, 3, 200, 200) for width in (1, 5))
    assert torch.allclose(*(torch.nn.functional.avg_pool2d(each, 10) for each in (fine, coarse)))
    assert (encoder(fine) - encoder(coarse)).abs().mean() > 1e-2


def test_patch_features_are_appended_in_place():
    encoder = ImageEncoder(1, 8, features=5)
    features = torch.zeros(1, 5, 6, 6)
    features[..., 1, 4] = torch.arange(5.0)
    maps = encoder(torch.zeros(1, 3, 12, 12), features)
    assert maps.shape == (1, 11, 12, 12)
    changed = (maps[0, 3:] - maps[0, 3:, :1, :1]).abs().sum(0)
    assert changed.flatten().argmax() in [row * 12 + column for row in (2, 3) for column in (8, 9)]
    assert torch.allclose(encoder(torch.zeros(1, 3, 12, 12), 1000 * features), maps, atol=1e-4)
    with pytest.raises(ValueError, match="needs patch features"):
        encoder(torch.zeros(1, 3, 12, 12))


@pytest.mark.parametrize(("ratio", "reason"), [(0.5, "must not be larger"), (10 / 3.7, "do not line up")])
def test_impossible_pixels_are_refused(ratio, reason):
    with pytest.raises(ValueError, match=reason):
        ImageEncoder(ratio)
