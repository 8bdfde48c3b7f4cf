"""Train a small encoder on the H&E of sections, without labels, for ``stsr train --features``.

    python examples/self_supervised.py a.zarr b.zarr --output encoder.pt --minutes 12
    stsr train a.zarr b.zarr --output model.safetensors --method unet --features encoder.pt

A convolutional network reads pixels of 2 um and gives 96 channels every 16 um. Two views of a crop, turned, mirrored,
shifted by less than a patch and stained differently, must agree (VICReg: invariance, variance and covariance terms,
Bardes et al. 2022), patch by patch.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import stsr
from stsr.geometry.grid import Grid

UM_PER_PX, CROP_PX, MARGIN_PX, PATCH_PX = 2.0, 64, 16, 8
CHANNELS, EXPANDED, BATCH, RATE = 96, 256, 16, 2e-3
LIGHT = 0.7, 0.25  # mean and standard deviation of the pixels, about


class Block(nn.Module):
    """A residual block, after halving the raster."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.down = nn.Conv2d(before, channels, 4, 2, 1)
        norms = [nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)]
        convs = [nn.Conv2d(channels, channels, 3, 1, 1) for _ in norms]
        self.body = nn.Sequential(norms[0], nn.SiLU(), convs[0], norms[1], nn.SiLU(), convs[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return x + self.body(x)


def read_tiles(stores: list[str], count: int, rng: np.random.Generator) -> torch.Tensor:
    """Tiles (n, 3, side, side) uint8 centred on tissue, equally many of each section."""
    side, tiles = CROP_PX + 2 * MARGIN_PX, []
    for store in stores:
        section = stsr.open_section(store)
        grid = section.grid(20.0)
        rows, columns = np.nonzero(section.measured(grid) & section.image.covered(grid))
        for place in rng.choice(len(rows), count // len(stores)):
            x, y = grid.x0_um + 20.0 * columns[place], grid.y0_um + 20.0 * rows[place]
            half = side * UM_PER_PX / 2
            tiles.append(section.image.read(Grid(x - half, y - half, UM_PER_PX, side, side)))
    return torch.from_numpy(np.stack(tiles))


def view(tiles: torch.Tensor, turn: int, rng: np.random.Generator) -> torch.Tensor:
    """A crop, shifted by less than half a patch, turned and mirrored, with gains on its optical density."""
    y, x = MARGIN_PX + rng.integers(-PATCH_PX // 2, PATCH_PX // 2 + 1, 2)
    crops = tiles[:, :, y : y + CROP_PX, x : x + CROP_PX].float() / 255
    gains = torch.from_numpy(np.exp(rng.normal(0, 0.2, (len(tiles), 3, 1, 1))).astype(np.float32))
    crops = crops.clamp_min(1 / 255) ** gains
    crops = torch.rot90(crops, turn % 4, (-2, -1))
    crops = ((crops.flip(-1) if turn >= 4 else crops) - LIGHT[0]) / LIGHT[1]
    return crops.contiguous(memory_format=torch.channels_last)


def turned_back(maps: torch.Tensor, turn: int) -> torch.Tensor:
    return torch.rot90(maps.flip(-1) if turn >= 4 else maps, -(turn % 4), (-2, -1))


def vicreg(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Invariance, variance and covariance terms of vectors (n, c)."""
    variance, covariance = a.new_zeros(()), a.new_zeros(())
    for z in (a, b):
        z = z - z.mean(0)
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        cov = z.T @ z / (len(z) - 1)
        covariance = covariance + (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]
    return F.mse_loss(a, b), variance, covariance


def effective_rank(vectors: torch.Tensor) -> float:
    """Exponential of the entropy of the covariance's eigenvalues: 1 if collapsed, c if all directions are equal."""
    part = torch.linalg.eigvalsh(torch.cov(vectors.T.double())).clamp_min(1e-12)
    part = part / part.sum()
    return float(torch.exp(-(part * part.log()).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("encoder.pt"))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--tiles", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    tiles = read_tiles(options.stores, options.tiles, rng)
    encoder = nn.Sequential(Block(3, 24), Block(24, 64), Block(64, CHANNELS), nn.GroupNorm(8, CHANNELS))
    encoder = encoder.to(memory_format=torch.channels_last)
    expander = nn.Sequential(nn.Linear(CHANNELS, EXPANDED), nn.ReLU(), nn.Linear(EXPANDED, EXPANDED))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *expander.parameters()], lr=RATE, weight_decay=0.01)
    print(f"{len(tiles)} tiles, {sum(p.numel() for p in encoder.parameters()):,} parameters")
    start, step, spent = time.monotonic(), 0, 0.0
    while spent < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + np.cos(np.pi * spent)) / 2)
        chosen, turn = tiles[rng.choice(len(tiles), BATCH, replace=False)], int(rng.integers(8))
        maps = encoder(view(chosen, 0, rng)), turned_back(encoder(view(chosen, turn, rng)), turn)
        a, b = (expander(each.permute(0, 2, 3, 1).reshape(-1, CHANNELS)) for each in maps)
        terms = vicreg(a, b)
        loss = 25 * terms[0] + 25 * terms[1] + terms[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, spent = step + 1, (time.monotonic() - start) / (60 * options.minutes)
        if step % 50 == 0:
            shown = ", ".join(f"{float(term.detach()):.3f}" for term in terms)
            rank = effective_rank(maps[0].detach().permute(0, 2, 3, 1).reshape(-1, CHANNELS))
            print(
                f"step {step}: loss {float(loss.detach()):.3f} ({shown}), effective rank {rank:.1f}",
                flush=True,
            )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        part = tiles[torch.from_numpy(rng.permutation(len(tiles))[:512])]
        maps = torch.cat([encoder(view(each, 0, rng)) for each in part.split(BATCH)])
        exported = nn.Sequential(
            encoder, nn.BatchNorm2d(CHANNELS, affine=False)
        ).eval()  # to mean 0, variance 1
        exported[1].running_mean, exported[1].running_var = maps.mean((0, 2, 3)), maps.var((0, 2, 3))
        torch.jit.save(torch.jit.trace(exported, torch.zeros(1, 3, CROP_PX, CROP_PX)), options.output)
        rank = effective_rank(exported[1](maps).permute(0, 2, 3, 1).reshape(-1, CHANNELS))
    colours = {"mean": [LIGHT[0]] * 3, "std": [LIGHT[1]] * 3}
    settings = {"um_per_px": UM_PER_PX, "image_px": 128, "patch_px": PATCH_PX, **colours}
    options.output.with_suffix(".json").write_text(json.dumps(settings))
    print(f"{options.output}: effective rank {rank:.1f} of {CHANNELS}")


if __name__ == "__main__":
    main()
