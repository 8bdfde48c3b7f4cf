"""How a diffusion method walks from noise to a map: a choice of whoever predicts, not of whoever trained."""

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
    """A sampler, its steps and the weight of guidance.

    A method holds one as ``method.sampling``; put another there to predict otherwise.

    Parameters
    ----------
    sampler
        A name in `stsr.diffusion.SAMPLERS`.
    steps
        Steps from the largest sigma to 0.
    guidance
        Weight w of classifier-free guidance, ``w D(x | c) + (1 - w) D(x)``: 1 is the conditional denoiser itself
        and costs half of any other weight but 0.

    Raises
    ------
    ValueError
        If no sampler has this name, there is no step, or guidance is negative or not finite.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 8
    guidance: float = 1.0

    def __post_init__(self):
        sampler(self.sampler)  # raises for an unknown name
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number from 0 up (1: off), not {self.guidance}")

    def walk(
        self,
        conditional: Denoise,
        unconditional: Denoise,
        draw: Draw,
        schedule: Callable[[int], torch.Tensor],
    ) -> torch.Tensor:
        """One sample.

        Parameters
        ----------
        conditional, unconditional
            ``denoise(x, sigma) -> x0`` with and without the condition; the second is only called where guidance
            asks for it.
        draw
            ``step -> noise``, shaped like the sample; step 0 is the start.
        schedule
            ``steps -> sigmas (steps + 1,)`` in the data's units, descending to 0.

        Returns
        -------
        torch.Tensor
            x0, like ``draw(0)``.
        """
        sigmas = schedule(self.steps)
        denoise = guided(conditional, unconditional, self.guidance)
        return sampler(self.sampler)(denoise, float(sigmas[0]) * draw(0), sigmas, draw)
