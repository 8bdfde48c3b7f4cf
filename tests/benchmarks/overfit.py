"""Overfit a method to one real tile: python tests/benchmarks/overfit.py SECTION.zarr --method c3diff

A tile of 600 um, its most counted genes, nothing dropped: trained on this one tile alone, a correct method reaches
a PCC above 0.95 against the tile's own counts, smoothed by a Gaussian of 20 um. Prints the mean PCC over
genes of the interpolated spots, of the map predicted in one step, and of the mean of four samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from stsr.diffusion.noise import Noise, TileNoise
from stsr.geometry.grid import add_up
from stsr.methods import method_class
from stsr.methods.batch import Batch
from stsr.methods.method import configured, interpolated
from stsr.methods.target import smoothed
from stsr.metrics import pearson
from stsr.store.section import open_section

TILE_LR = 6
SMOOTH_BINS = 2.0  # 20 um
BY_HEART = {"lr_dropout": 0.0, "condition_dropout": 0.0, "smooth_bins": SMOOTH_BINS}
REPORTS = 10
SAMPLES = 4


def main() -> None:
    """Train on the tile, print the scores on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", type=Path)
    parser.add_argument("--method", default="c3diff", choices=("c3diff", "diffst"))
    parser.add_argument("--genes", type=int, default=25)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--corner-um", type=float, nargs=2, default=(200.0, 700.0), metavar=("X", "Y"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    batch = tile_of(asked.section, asked.corner_um, asked.genes)
    truth = smoothed(batch.hr, SMOOTH_BINS)
    torch.manual_seed(asked.seed)
    chosen = method_class(asked.method)
    method = chosen(configured(chosen.Config, BY_HEART), batch.names, batch.lr_mean[0].numpy()).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=asked.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, asked.learning_rate, asked.steps)
    generator = torch.Generator().manual_seed(asked.seed)
    print("| step | seconds | loss | PCC, one step | PCC, mean of samples |\n|---|---|---|---|---|")
    print(f"| interpolated | | | {score(interpolated(batch, method.scale(batch), 10), truth):.3f} | |")
    start = time.monotonic()
    for step in range(1, asked.steps + 1):
        terms = method.loss(batch, step / asked.steps, generator)
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(asked.steps // REPORTS, 1) == 0:
            mean, drawn = predicted(method, batch, SAMPLES if step == asked.steps else 0)
            samples = f"{score(drawn, truth):.3f}" if drawn is not None else ""
            seconds, loss = time.monotonic() - start, float(terms["denoise"].detach())
            print(
                f"| {step} | {seconds:.0f} | {loss:.3f} | {score(mean, truth):.3f} | {samples} |", flush=True
            )


def tile_of(store: Path, corner_um, genes: int) -> Batch:
    """A tile of the section with its most counted genes; square spots."""
    section = open_section(store)
    x, y = corner_um
    side = 100.0 * TILE_LR
    window = section.hr.grid.crop_um(x, y, x + side, y + side)
    window = section.hr.grid.window(*section.hr.grid.offset_of(window), 10 * TILE_LR, 10 * TILE_LR)
    counts = section.hr.read(window=window).astype(np.float32)
    most = np.sort(np.argsort(-counts.sum((1, 2)), kind="stable")[:genes])
    hr = torch.as_tensor(counts[most])[None]
    lr = add_up(hr, 10)
    return Batch(
        image=torch.as_tensor(np.ascontiguousarray(section.image.read(window)))[None],
        lr=lr,
        lr_mask=torch.ones(1, 1, TILE_LR, TILE_LR),
        has_lr=torch.ones(1, dtype=torch.bool),
        lr_mean=lr.mean((2, 3)),
        genes=torch.eye(genes),
        names=tuple(section.hr.genes[index] for index in most),
        hr=hr,
    )


@torch.no_grad()
def predicted(method, batch: Batch, samples: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The map in one step, and the mean of samples."""
    method.eval()
    features = method.condition(batch)
    mean = method.mean(batch, features)
    drawn = [method.predict(batch, TileNoise(Noise(0, n), ((0, 0),)), features) for n in range(samples)]
    method.train()
    return mean, sum(drawn) / samples if samples else None


def score(maps: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean PCC over genes of maps (1, g, H, W)."""
    return float(pearson(maps[0].numpy(), truth[0].numpy()).mean())


if __name__ == "__main__":
    main()
