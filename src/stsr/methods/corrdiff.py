"""Corrective diffusion: a regression predicts the mean, a diffusion model the residual.

The approach is that of Mardani et al. 2025 (CorrDiff, Commun Earth Environ 6:124) for weather downscaling. Here the
residual has a few directions in which genes vary together, so one draw serves all genes, inside and outside the panel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from stsr.diffusion import Preconditioning, karras_sigmas, lognormal_sigmas
from stsr.diffusion.noise import Noise, TileNoise
from stsr.methods.batch import Batch
from stsr.methods.method import random_normal
from stsr.methods.regression import RegressionConfig, UNetRegression
from stsr.methods.sampling import Sampling
from stsr.nn.blocks import ScalarEmbedding
from stsr.nn.unet import UNet

_SPREAD_MEMORY = 0.99  # decay of the running estimates of spread and growth
_NEWTON_STEPS = 4  # to the mode of a bin's posterior; nearly all bins converge in three
_TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_CALIBRATION_BATCHES = 2
_CALIBRATION_FLOOR = 0.05  # counts per bin; with less expected, bins carry little information on variances
_LEVELS = 7  # levels of the expected total, from e^0 to e^6 counts per bin
_LEAST_BINS = 20  # needed to estimate the spread at a level
_LARGEST_LOG_CHANGE = 3.0  # a draw changes a gene by at most e^3, about the range seen in training


@dataclass(frozen=True)
class CorrDiffConfig(RegressionConfig):
    """Settings of `corrdiff`, in addition to those of its regression.

    Parameters
    ----------
    directions
        Number of directions of joint variation of the genes that the diffusion model samples; at most one per gene.
    denoiser_widths
        Channels of the levels of the denoiser.
    residual_from
        Training progress (0..1) from which the residual is learned; the mean is learned first.
    residual_weight
        Weight of the diffusion term.
    residual_tiles
        Tiles of a minibatch that enter the diffusion term, whose targets cost more than the mean.
    condition_dropout
        Fraction of training tiles whose condition is dropped, for classifier-free guidance.
    sigma_min, sigma_max, p_mean, p_std
        Range of noise levels when sampling, and their log-normal distribution in training; the residual has unit
        spread.
    """

    directions: int = 12
    denoiser_widths: tuple[int, ...] = (32, 64)
    residual_from: float = 0.5
    residual_weight: float = 1.0
    residual_tiles: int = 2
    condition_dropout: float = 0.1
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    p_mean: float = -0.4
    p_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.directions <= self.factors:
            raise ValueError(f"directions must lie in 1..factors ({self.factors}), not {self.directions}")


class CorrDiff(UNetRegression):
    """Expected counts by regression; samples are the expected counts times exp(loadings x residual).

    The residual of a training bin is drawn from its posterior given the bin's counts (`posterior_draw`), so that the
    counting noise of single bins is not mistaken for biology.
    """

    Config = CorrDiffConfig
    config: CorrDiffConfig
    samples = True
    learns_from_spots = False  # its residual is learned from counts per bin
    knows_mean = True

    turn: torch.Tensor
    """(factors, directions): from directions to factors; zero until the residual is first learned."""
    spread: torch.Tensor
    """(levels, directions): standard deviation of the residual at each level of the expected total."""
    growth: torch.Tensor
    """(p,): factor by which exp() of the residual raises a gene's total."""
    followed: torch.Tensor
    """(): steps that entered ``spread`` and ``growth``."""
    temperature: torch.Tensor
    """(levels,): factor of sampled residuals, from `finish`."""

    def __init__(self, config: CorrDiffConfig, panel: tuple[str, ...], reference: np.ndarray | None = None):
        super().__init__(config, panel, reference)
        width = config.denoiser_widths[0]
        self.directions = min(config.directions, len(self.panel))
        self.sampling = Sampling()
        self.precondition = Preconditioning(sigma_data=1.0)
        self.sigma_embedding = nn.Sequential(ScalarEmbedding(32), nn.Linear(32, 2 * width), nn.SiLU())
        self.denoiser = UNet(
            self.directions + config.factors + 1,
            self.directions,
            config.denoiser_widths,
            embedding_channels=2 * width,
        )
        self.register_buffer("turn", torch.zeros(config.factors, self.directions))
        self.register_buffer("spread", torch.full((_LEVELS, self.directions), 0.5))
        self.register_buffer("growth", torch.ones(len(self.panel)))
        self.register_buffer("followed", torch.zeros(()))
        self.register_buffer("temperature", torch.ones(_LEVELS))

    def loss(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Compute the Poisson loss of the mean and, once the mean is learned, the denoising error of the residual."""
        batch = self.hide_spots(batch, generator)
        factors = self.condition(batch)
        poisson = self.poisson(batch, factors, generator)
        if progress < self.config.residual_from:
            return {"loss": poisson, "poisson": poisson.detach()}
        some = slice(0, self.config.residual_tiles)
        diffusion = self.denoising_error(batch.of_tiles(some), factors[some].detach(), generator)
        total = poisson + self.config.residual_weight * diffusion
        return {"loss": total, "poisson": poisson.detach(), "diffusion": diffusion.detach()}

    def denoising_error(
        self, batch: Batch, factors: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Weighted squared error of the denoised residual (EDM: Karras et al. 2022, equation 2 with table 1)."""
        with torch.no_grad():
            rate = self.log_rate(batch, factors).exp()
            if not bool(self.turn.any()):
                self.turn.copy_(leading_directions(self.loadings, self.reference, self.directions))
            loadings = self.loadings @ self.turn  # (p, r)
            spread = self.spread_at(rate)  # (b, r, H, W)
            draw = posterior_draw(batch.truth(), rate, loadings, spread.movedim(1, -1), generator)
            residual = draw / spread
            if self.training:
                self.follow(draw, loadings, rate)
            sigma = lognormal_sigmas(len(batch), generator, self.config.p_mean, self.config.p_std).to(
                residual.device
            )
            noise = random_normal(residual.shape, generator, residual.device)
            noisy = residual + sigma[:, None, None, None] * noise
            chance = torch.rand(len(batch), generator=generator, device=generator.device).to(residual.device)
            keep = (chance >= self.config.condition_dropout).to(residual.dtype)[:, None, None, None]
        denoised = self.precondition.denoised(self.network, noisy, sigma, keep * self.guide(factors, rate))
        weight = self.precondition.loss_weight(sigma)[:, None, None, None]
        return (weight * (denoised - residual) ** 2).mean()

    def spread_at(self, rate: torch.Tensor) -> torch.Tensor:
        """Standard deviation of the residual (b, r, H, W) given the expected counts (b, p, H, W).

        It falls with the expected total, because a bin with hundreds of counts is known far better than an empty one.
        Divided by it, the residual has unit variance everywhere, as a denoiser needs.
        """
        return torch.einsum("byxl,lr->bryx", _level_weights(rate), self.spread)

    def follow(self, draw: torch.Tensor, loadings: torch.Tensor, rate: torch.Tensor) -> None:
        """Update the running estimates of ``spread`` and ``growth``."""
        memory = max(1 - _SPREAD_MEMORY, 1 / (float(self.followed) + 2))  # at first a plain mean
        self.followed += 1
        weights = _level_weights(rate)
        bins = weights.sum((0, 1, 2))[:, None]  # (levels, 1)
        variance = torch.einsum("byxl,bryx->lr", weights, draw**2) / bins.clamp_min(1e-9)
        found = variance.sqrt().clamp(0.05, 1.5)
        self.spread.lerp_(torch.where(bins > _LEAST_BINS, found, self.spread), memory)
        change = torch.einsum("pr,bryx->bpyx", loadings, draw).clamp(
            -_LARGEST_LOG_CHANGE, _LARGEST_LOG_CHANGE
        )
        growth = (rate * change.exp()).sum((0, 2, 3)) / rate.sum((0, 2, 3)).clamp_min(1e-9)
        self.growth.lerp_(growth, memory)

    def guide(self, factors: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        """Condition of the denoiser (b, factors + 1, H, W): factors of the mean, and log of the expected total."""
        return torch.cat([factors, torch.log1p(rate.sum(1, keepdim=True))], 1)

    def network(self, x: torch.Tensor, c_noise: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """The network inside the preconditioning."""
        return self.denoiser(torch.cat([x, guide], 1), self.sigma_embedding(c_noise))

    def draw(self, batch: Batch, features: torch.Tensor, noise: TileNoise) -> torch.Tensor:
        """Sample one residual (b, r, H, W) for all genes; ``batch.genes`` is the panel."""
        height, width = features.shape[-2:]
        names = [f"direction {number}" for number in range(self.directions)]
        source = noise.source(names, height, width, features.device)
        rate = self.log_rate(batch, features).exp()
        guide = self.guide(features, rate)
        nothing = torch.zeros_like(guide)
        residual = self.sampling.walk(
            lambda x, sigma: self.precondition.denoised(self.network, x, sigma, guide),
            lambda x, sigma: self.precondition.denoised(self.network, x, sigma, nothing),
            source,
            lambda steps: karras_sigmas(steps, self.config.sigma_min, self.config.sigma_max),
        )
        temperature = (_level_weights(rate) @ self.temperature)[:, None]  # (b, 1, H, W)
        return residual * self.spread_at(rate) * temperature

    def mean(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Expected counts (b, g, H, W) of the regression, without sampling."""
        return super().predict(batch, None, features)

    def predict(
        self,
        batch: Batch,
        noise: TileNoise | None,
        features: torch.Tensor | None = None,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample the expected counts per bin (b, g, H, W) once."""
        features = self.condition(batch) if features is None else features
        if drawn is None:
            assert noise is not None, "a sample needs noise"
            drawn = self.draw(batch, features, noise)
        return self.vary(batch, self.mean(batch, features), drawn)

    def vary(self, batch: Batch, mean: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Multiply the mean by the effect of the residual on each gene."""
        growth = torch.log(batch.genes @ self.growth + (1 - batch.genes.sum(1)))
        return mean * (self._change(batch, drawn) - growth[None, :, None, None]).exp()

    def _change(self, batch: Batch, drawn: torch.Tensor) -> torch.Tensor:
        """Change of the log counts of each gene (b, g, H, W)."""
        change = torch.einsum("gr,bryx->bgyx", batch.genes @ self.loadings @ self.turn, drawn)
        return change.clamp(-_LARGEST_LOG_CHANGE, _LARGEST_LOG_CHANGE)

    @property
    def dispersion(self) -> None:
        """None: the residual is sampled."""

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> None:
        """Calibrate samples on validation tiles: match their variance to that of the counts beyond Poisson.

        After finite training, sampled residuals have heavier tails than their targets, and exp() amplifies them most
        where expression is high. Each level of the expected total therefore gets a temperature, a factor of its
        residuals. Variances are divided by the gene's mean, so that a few genes do not dominate. ``growth`` is then
        estimated again.
        """
        if not bool(self.turn.any()):
            return
        self.temperature.fill_(1)
        batches = list(islice(batches, _CALIBRATION_BATCHES))
        excess, spread = torch.zeros(_LEVELS), torch.zeros(len(_TEMPERATURES), _LEVELS)
        for batch in batches:
            mean, drawn = self._calibration(batch)
            weights = _level_weights(mean).cpu()
            excess += _at_levels((batch.truth() - mean) ** 2 - mean, mean, weights)
            for number, temperature in enumerate(_TEMPERATURES):
                for one in drawn:
                    sample = mean * self._change(batch, temperature * one).exp()
                    level = (mean.sum((0, 2, 3)) / sample.sum((0, 2, 3)).clamp_min(1e-9))[None, :, None, None]
                    spread[number] += _at_levels((sample * level - mean) ** 2, mean, weights) / len(drawn)
        apart = (spread.clamp_min(1e-9).log() - excess.clamp_min(1e-9).log()).abs()
        self.temperature.copy_(torch.tensor(_TEMPERATURES)[apart.argmin(0)])
        total, grown = torch.zeros_like(self.growth), torch.zeros_like(self.growth)
        for batch in batches:
            mean, drawn = self._calibration(batch)
            total += mean.sum((0, 2, 3))
            sums = [(mean * self._change(batch, one).exp()).sum((0, 2, 3)) for one in drawn]
            grown += sum(sums[1:], start=sums[0]) / len(drawn)
        self.growth.copy_(grown / total.clamp_min(1e-9))

    def _calibration(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = self.condition(batch)
        return self.mean(batch, features), [
            self.draw(batch, features, noise) for noise in _calibration_noises(len(batch))
        ]


def _at_levels(square: torch.Tensor, mean: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums (levels,) of squares relative to the mean (b, p, H, W)."""
    return torch.einsum("byx,byxl->l", (square / (mean + _CALIBRATION_FLOOR)).sum(1).cpu(), weights)


def _calibration_noises(tiles: int) -> list[TileNoise]:
    corners = tuple((0, 1000 * tile) for tile in range(tiles))
    return [TileNoise(Noise(0, sample), corners) for sample in range(2)]


def _level_weights(rate: torch.Tensor) -> torch.Tensor:
    """Linear interpolation weights (b, H, W, levels) of each bin between levels of its expected total (b, p, H, W)."""
    place = torch.log1p(rate.sum(1)).clamp(max=_LEVELS - 1.0)  # a level for every factor of e
    levels = torch.arange(_LEVELS, device=rate.device)
    return (1 - (place[..., None] - levels).abs()).clamp_min(0)


def leading_directions(loadings: torch.Tensor, reference: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal directions (factors, count) along which a typical bin's counts vary most.

    These are the right singular vectors of the loadings (p, factors), with each gene weighted by the square root of its
    mean count (p,): a change then counts relative to the counting noise of the genes it affects.
    """
    _, _, right = torch.linalg.svd(reference.sqrt()[:, None] * loadings, full_matrices=False)
    return right[:count].T


def posterior_draw(
    counts: torch.Tensor,
    rate: torch.Tensor,
    loadings: torch.Tensor,
    spread: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw each bin's residual from its posterior given the bin's counts, in Laplace's approximation.

    The model is counts ~ Poisson(rate exp(W s)), s ~ N(0, diag(spread^2)). Newton's method finds the mode, where the
    posterior has the precision ``diag(1 / spread^2) + W^T diag(rate exp(W s)) W``. A step changes no gene by more than
    a factor of e; otherwise a bin with ten times the expected counts would overshoot.

    Parameters
    ----------
    counts, rate
        (b, p, H, W).
    loadings
        W (p, r).
    spread
        (r,) or (b, H, W, r), standard deviation of the prior.
    generator
        Source of the draw.

    Returns
    -------
    torch.Tensor
        (b, r, H, W).
    """
    pairs = (loadings[:, :, None] * loadings[:, None, :]).flatten(1)  # (p, r * r)
    size = spread.shape[-1]
    prior = spread**-2
    strongest = loadings.norm(dim=1).max()
    state = torch.zeros(*rate.shape[:1], *rate.shape[2:], size, device=rate.device)  # (b, H, W, r)
    for number in range(_NEWTON_STEPS + 1):
        change = torch.einsum("pr,byxr->bpyx", loadings, state)
        current = rate * change.clamp(-_LARGEST_LOG_CHANGE, _LARGEST_LOG_CHANGE).exp()
        information = torch.einsum("bpyx,pq->byxq", current, pairs).unflatten(-1, (size, size))
        factor = torch.linalg.cholesky(information + torch.diag_embed(prior))  # (b, H, W, r, r)
        if number == _NEWTON_STEPS:
            break  # the last round computes the precision at the mode
        slope = torch.einsum("bpyx,pr->byxr", counts - current, loadings) - prior * state
        step = torch.cholesky_solve(slope[..., None], factor)[..., 0]
        length = strongest * step.norm(dim=-1, keepdim=True)
        state = state + step / length.clamp_min(1)
    noise = random_normal((*state.shape, 1), generator, state.device)
    scatter = torch.linalg.solve_triangular(factor.mT, noise, upper=True)[..., 0]
    return (state + scatter).movedim(-1, 1)
