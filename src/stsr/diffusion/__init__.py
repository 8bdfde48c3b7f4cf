"""The diffusion engine: noise, preconditioning and samplers, independent of genes and tissue.

Everything is in sigma space: ``x = x0 + sigma * noise``, and every network is used as ``denoise(x, sigma) -> x0``.
"""

from stsr.diffusion.noise import Noise
from stsr.diffusion.precond import (
    Preconditioning,
    beta_sigmas,
    epsilon_denoiser,
    guided,
    linear_betas,
    lognormal_sigmas,
    uniform_sigmas,
)
from stsr.diffusion.samplers import SAMPLERS, ddpm_sigmas, karras_sigmas, sampler

__all__ = [
    "SAMPLERS",
    "Noise",
    "Preconditioning",
    "beta_sigmas",
    "ddpm_sigmas",
    "epsilon_denoiser",
    "guided",
    "karras_sigmas",
    "linear_betas",
    "lognormal_sigmas",
    "sampler",
    "uniform_sigmas",
]
