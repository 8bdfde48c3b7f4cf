"""Sampling settings of a diffusion method: chosen when predicting, independent of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stsr.diffusion import guided, sampler
from stsr.diffusion.precond import Denoise
from stsr.diffusion.samplers import Draw


@dataclass(frozen=True)
class Sampling:
    """A sampler, its number of steps and the guidance weight.

    A method keeps one as ``method.sampling``; assign another to change how it predicts.

    Parameters
    ----------
    sampler
        A name in `stsr.diffusion.SAMPLERS`.
    steps
        Steps from the largest sigma to 0.
    guidance
        Weight w of classifier-free guidance, ``w D(x | c) + (1 - w) D(x)``. 1 and 0 need one denoiser evaluation per
        step, other weights two.

    Raises
    ------
    ValueError
        If no sampler has this name, steps is below 1, or guidance is negative or not finite.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 8
    guidance: float = 1.0

    def __post_init__(self) -> None:
        sampler(self.sampler)  # raises for an unknown name
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a finite number, at least 0 (1: off), not {self.guidance}")

    def walk(
        self,
        conditional: Denoise,
        unconditional: Denoise,
        draw: Draw,
        schedule: Callable[[int], torch.Tensor],
    ) -> torch.Tensor:
        """Draw one sample.

        Parameters
        ----------
        conditional, unconditional
            ``denoise(x, sigma) -> x0`` with and without the condition; the second is only called if guidance needs it.
        draw
            ``step -> noise``, shaped like the sample; sampling starts from step 0.
        schedule
            ``steps -> sigmas (steps + 1,)`` in units of the data, decreasing to 0.

        Returns
        -------
        torch.Tensor
            x0, like ``draw(0)``.
        """
        sigmas = schedule(self.steps)
        denoise = guided(conditional, unconditional, self.guidance)
        return sampler(self.sampler)(denoise, float(sigmas[0]) * draw(0), sigmas, draw)
