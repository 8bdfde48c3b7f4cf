"""Tiles and noise that the tests of methods share."""

from collections.abc import Callable

import pytest
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.geometry.grid import add_up
from stsr.methods.batch import Batch

PANEL = ("GATA3", "ERBB2", "LUM", "POSTN", "LYZ")


def make_tiles(count: int = 2, seed: int = 0, side: int = 3) -> Batch:
    """Tiles of ``side`` low-resolution pixels in which image and counts vary together.

    The left of each image has fewer grey levels, so that its patches differ in entropy.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 10 * side
    coarse = torch.rand(count, 3, side + 1, side + 1, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    mix = torch.rand(len(PANEL), 3, generator=generator)
    hr = torch.poisson(0.5 * torch.einsum("gc,bcyx->bgyx", mix, picture), generator=generator)
    picture[..., :10] = picture[..., :10].round(decimals=1)
    lr = add_up(hr, 10)
    return Batch(
        image=(255 * picture).to(torch.uint8),
        lr=lr,
        lr_mask=torch.ones(count, 1, side, side),
        has_lr=torch.ones(count, dtype=torch.bool),
        lr_mean=lr.mean((2, 3)),
        genes=torch.eye(len(PANEL)),
        names=PANEL,
        hr=hr,
    )


def noise_at(batch: Batch, sample: int = 0, seed: int = 0) -> TileNoise:
    """Noise of a batch whose tiles lie side by side."""
    return TileNoise(Noise(seed, sample), tuple((0, 30 * number) for number in range(len(batch))))


@pytest.fixture(scope="session")
def panel() -> tuple[str, ...]:
    return PANEL


@pytest.fixture(scope="session")
def tiles() -> Callable[..., Batch]:
    """`make_tiles`."""
    return make_tiles


@pytest.fixture(scope="session")
def at() -> Callable[..., TileNoise]:
    """`noise_at`."""
    return noise_at
