"""Noise for the whole plane, drawn from (seed, key, sample, step) and cut by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

BLOCK = 64
"""Side of the squares, in bins, that are drawn at once. Another size would give other noise."""


@dataclass(frozen=True)
class Noise:
    """Standard normal noise on an unbounded grid of bins.

    The value at a bin depends on ``(seed, key, sample, step)`` and the bin's place, and on nothing else. So
    tiles agree where they overlap, and a result depends neither on batch size, nor on the order of keys,
    nor on the device.

    Parameters
    ----------
    seed
        The user's seed.
    sample
        Number of the sample; another number is independent noise.
    sign
        1, or -1 for the antithetic partner: averaging a sample with its partner cancels the noise to first
        order.

    Raises
    ------
    ValueError
        If the sign is neither 1 nor -1.
    """

    seed: int
    sample: int = 0
    sign: float = 1.0

    def __post_init__(self):
        if self.sign not in (1, -1):
            raise ValueError(f"the sign of noise is 1 or -1, not {self.sign}")

    def window(
        self, keys: Sequence[str], y0: int, x0: int, height: int, width: int, step: int = 0
    ) -> torch.Tensor:
        """Noise of a window of the grid.

        Parameters
        ----------
        keys
            One name (a gene) per channel.
        y0, x0
            First row and column, bins; may be negative, for a window that overhangs the grid.
        height, width
            Size, bins.
        step
            Step of the sampler; another step is independent noise. Step 0 is where sampling starts.

        Returns
        -------
        torch.Tensor
            (len(keys), height, width), float32, on the CPU.
        """
        bits = np.empty((len(keys), height, width), dtype=np.uint64)
        for block_y, rows, block_rows in _pieces(y0, height):
            for block_x, columns, block_columns in _pieces(x0, width):
                for channel, key in enumerate(keys):
                    block = _block(self.seed, key, self.sample, step, block_y, block_x)
                    bits[channel, rows, columns] = block[block_rows, block_columns]
        return torch.from_numpy(float(self.sign) * _normal(bits))

    def source(
        self,
        keys: Sequence[str],
        corners: Sequence[tuple[int, int]],
        height: int,
        width: int,
        device: torch.device | str = "cpu",
    ) -> Callable[[int], torch.Tensor]:
        """Noise of a batch of windows as a function of the step, which is what a sampler asks for.

        Parameters
        ----------
        keys
            One name per channel.
        corners
            ``(y0, x0)`` of each window of the batch, bins.
        height, width
            Size of the windows, bins.
        device
            Where the noise goes once drawn (always on the CPU, so that devices agree).

        Returns
        -------
        callable
            ``step -> (len(corners), len(keys), height, width)`` float32. Step 0 is for the sampler's start;
            samplers ask for 1, 2, ... while they walk.
        """

        def draw(step: int) -> torch.Tensor:
            windows = [self.window(keys, y0, x0, height, width, step) for y0, x0 in corners]
            return torch.stack(windows).to(device)  # (b, k, height, width)

        return draw


@dataclass(frozen=True)
class TileNoise:
    """Noise for a batch of tiles: `Noise` with the tiles' places filled in.

    Parameters
    ----------
    noise
        Where the numbers come from.
    corners
        ``(y0, x0)`` of each tile, bins of the section's grid.
    """

    noise: Noise
    corners: tuple[tuple[int, int], ...]

    def source(
        self, keys: Sequence[str], height: int, width: int, device: torch.device | str = "cpu"
    ) -> Callable[[int], torch.Tensor]:
        """``step -> (tiles, keys, height, width)``, as `Noise.source`."""
        return self.noise.source(keys, self.corners, height, width, device)


def _pieces(start: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Cut ``[start, start + size)`` at block edges: (block number, slice of window, slice of block) each."""
    position = start
    while position < start + size:
        number, within = divmod(position, BLOCK)  # floors, so negative positions need no care
        length = min(BLOCK - within, start + size - position)
        first = position - start
        yield number, slice(first, first + length), slice(within, within + length)
        position += length


def _block(seed: int, key: str, sample: int, step: int, block_y: int, block_x: int) -> np.ndarray:
    """(BLOCK, BLOCK) words of 64 random bits, by Philox (Salmon et al. 2011) keyed by a hash of the names."""
    # the key comes last: the numbers before it hold no "/", so no two tuples give one name
    name = f"{int(seed)}/{int(sample)}/{int(step)}/{block_y}/{block_x}/{key}"
    digest = blake2b(name.encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))
    return philox.random_raw(BLOCK**2).reshape(BLOCK, BLOCK)


def _normal(bits: np.ndarray) -> np.ndarray:
    """Standard normals from words of 64 random bits, by Box and Muller (1958); any shape, float32.

    By hand, as numpy promises the raw bits of Philox for ever, but not ``Generator.standard_normal``.
    """
    radius = ((bits >> np.uint64(32)) + 0.5) * 2.0**-32  # in (0, 1), both ends excluded
    angle = (bits & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32)
    return (np.sqrt(-2 * np.log(radius)) * np.cos(angle)).astype(np.float32)
