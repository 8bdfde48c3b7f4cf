"""Noise on the whole plane, determined by (seed, key, sample, step), from which windows are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

BLOCK = 64
"""Side of the squares that are drawn at once, bins. Another size would give different noise."""


@dataclass(frozen=True)
class Noise:
    """Standard normal noise on an unbounded grid of bins.

    The value at a bin depends only on ``(seed, key, sample, step)`` and the bin's position. Tiles therefore agree where
    they overlap, and results depend neither on the batch size, nor on the order of keys, nor on the device.

    Parameters
    ----------
    seed
        Seed given by the user.
    sample
        Number of the sample; samples are independent.
    sign
        1, or -1 for the antithetic partner: the mean of a sample and its partner cancels noise to first order.

    Raises
    ------
    ValueError
        If the sign is neither 1 nor -1.
    """

    seed: int
    sample: int = 0
    sign: float = 1.0

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"the sign of noise must be 1 or -1, not {self.sign}")

    def window(
        self, keys: Sequence[str], y0: int, x0: int, height: int, width: int, step: int = 0
    ) -> torch.Tensor:
        """Draw the noise of a window of the grid.

        Parameters
        ----------
        keys
            One name (a gene) per channel.
        y0, x0
            First row and column, bins; negative for a window that reaches beyond the grid.
        height, width
            Size, bins.
        step
            Step of the sampler; steps are independent. Sampling starts from step 0.

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
        """Noise of a batch of windows as a function of the sampler's step.

        Parameters
        ----------
        keys
            One name per channel.
        corners
            ``(y0, x0)`` of each window of the batch, bins.
        height, width
            Size of the windows, bins.
        device
            Where the noise is moved to. It is always drawn on the CPU, so that devices agree.

        Returns
        -------
        callable
            ``step -> (len(corners), len(keys), height, width)`` float32. A sampler starts from step 0 and then calls
            1, 2, ...
        """

        def draw(step: int) -> torch.Tensor:
            windows = [self.window(keys, y0, x0, height, width, step) for y0, x0 in corners]
            return torch.stack(windows).to(device)  # (b, k, height, width)

        return draw


@dataclass(frozen=True)
class TileNoise:
    """Noise for a batch of tiles at given positions.

    Parameters
    ----------
    noise
        Source of the numbers.
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
    """Split ``[start, start + size)`` at block edges: (block number, slice of window, slice of block)."""
    position = start
    while position < start + size:
        number, within = divmod(position, BLOCK)  # rounds down, so negative positions are correct
        length = min(BLOCK - within, start + size - position)
        first = position - start
        yield number, slice(first, first + length), slice(within, within + length)
        position += length


def _block(seed: int, key: str, sample: int, step: int, block_y: int, block_x: int) -> np.ndarray:
    """(BLOCK, BLOCK) words of 64 random bits, by Philox (Salmon et al. 2011) keyed by a hash of the names."""
    # the key comes last and numbers contain no "/", so different tuples give different names
    name = f"{int(seed)}/{int(sample)}/{int(step)}/{block_y}/{block_x}/{key}"
    digest = blake2b(name.encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"))
    return philox.random_raw(BLOCK**2).reshape(BLOCK, BLOCK)


def _normal(bits: np.ndarray) -> np.ndarray:
    """Standard normals from words of 64 random bits, by Box and Muller (1958); any shape, float32.

    numpy guarantees the raw bits of Philox across versions, but not ``Generator.standard_normal``.
    """
    radius = ((bits >> np.uint64(32)) + 0.5) * 2.0**-32  # in (0, 1), both ends excluded
    angle = (bits & np.uint64(0xFFFFFFFF)) * (2 * np.pi * 2.0**-32)
    return (np.sqrt(-2 * np.log(radius)) * np.cos(angle)).astype(np.float32)
