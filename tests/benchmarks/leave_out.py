"""How well hidden spots are predicted from the others, without image: python tests/benchmarks/leave_out.py STORE

Spots of a section with measured spots (`stsr prepare`) are hidden in five random folds. The raw counts of the hidden
ones are compared with what interpolation and kriging make of the visible ones; denoising and the choice of length and
nugget see these alone. Scored are the genes with at least --least counts; the table is mean over genes.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from stsr import metrics
from stsr.geometry.grid import Grid
from stsr.methods.batch import Batch, lr_mean
from stsr.methods.method import interpolated
from stsr.spots.denoising import denoise
from stsr.spots.kriging import PLAIN, Kriging, choose, krige
from stsr.store.parts import Spots
from stsr.store.section import open_section

FOLDS = 5
BLOCK = 50  # genes interpolated at once


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--least", type=int, default=500, help="fewest counts of a gene that is scored")
    asked = parser.parse_args()
    section = open_section(asked.store)
    spots, grid = section.spots, section.grid(10.0)
    if spots is None:
        sys.exit(f"no measured spots in {asked.store}")
    genes = np.flatnonzero(np.asarray(spots.counts.sum(0)).ravel() >= asked.least)
    fold = np.random.default_rng(0).permutation(len(spots.centres_um)) % FOLDS
    truth = spots.counts[:, genes].toarray()
    made: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(truth.shape, np.float32))
    for number in range(FOLDS):
        hidden, visible = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        for label, found in predictions(spots, grid, genes, visible, hidden).items():
            made[label][hidden] = found
    print(f"{len(genes)} genes, {len(truth)} spots\n")
    print("| spots from the others | PCC | deviance explained | total |\n|---|---|---|---|")
    for label, found in made.items():
        pcc = np.nanmean(metrics.pearson(found.T, truth.T))
        explained = np.nanmean(metrics.deviance_explained(found.T, truth.T))
        print(f"| {label} | {pcc:.3f} | {explained:.3f} | {found.sum() / truth.sum():.3f} |")


def predictions(
    spots: Spots, grid: Grid, genes: np.ndarray, visible: np.ndarray, hidden: np.ndarray
) -> dict[str, np.ndarray]:
    """Counts (hidden, genes) of hidden spots by each method, from the visible ones."""
    raw = spots.counts[visible]
    denoised = denoise(raw, genes=genes).expected()
    counts, centres = raw[:, genes].toarray(), spots.centres_um[visible]
    area_um2 = spots.size_um**2 * (np.pi / 4 if spots.shape == "disc" else 1)
    chosen = choose(counts, denoised, centres, area_um2)
    plain = Kriging(centres, PLAIN[0] * spots.pitch_um, PLAIN[1])
    print(f"length {chosen.length_um:.0f} um, nugget {chosen.nugget:g}", file=sys.stderr)

    def kriged(kriging: Kriging, values: np.ndarray) -> np.ndarray:
        return krige(kriging, values, area_um2).predict(kriging.weights(spots.centres_um[hidden]))

    return {
        "mean": np.broadcast_to(counts.mean(0), (len(hidden), len(genes))),
        "raw, bilinear": bilinear(spots, grid, counts, visible, hidden),
        "denoised, bilinear": bilinear(spots, grid, denoised, visible, hidden),
        "raw, kriged": kriged(plain, counts),
        "denoised, kriged": kriged(plain, denoised),
        "denoised, kriged, length and nugget chosen": kriged(chosen, denoised),
    }


def bilinear(
    spots: Spots, grid: Grid, counts: np.ndarray, visible: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """Hidden spots as sums over maps that are interpolated from the raster of visible ones."""
    measurement = spots.measurement(grid)
    found = []
    for first in range(0, counts.shape[1], BLOCK):
        lr, mask = measurement.of_spots(visible).raster(counts[:, first : first + BLOCK])
        tile = Batch(
            image=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
            lr=torch.from_numpy(lr)[None],
            lr_mask=torch.from_numpy(mask)[None],
            has_lr=torch.ones(1, dtype=torch.bool),
            lr_mean=torch.from_numpy(lr_mean(lr, mask))[None],
            genes=torch.eye(len(lr)),
            names=tuple(map(str, range(len(lr)))),
        )
        maps = interpolated(tile, tile.lr_mean, grid.height // lr.shape[1])[0].numpy()
        found.append(measurement.of_spots(hidden).add_up(maps))
    return np.concatenate(found, axis=1)


if __name__ == "__main__":
    main()
