"""Speed and memory of superres: python tests/benchmarks/superres.py [--genes 313] [--size-um 2560] [--device cpu]

Simulates a Visium section of 256 x 256 bins of 10 um with the model's panel, super-resolves it with default settings,
and prints seconds per gene map (reading, sampling, blending, consistency and writing included), and the peak memory.
The released code of C3-Diff takes about 300 CPU seconds for one map of this size.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import stsr
from stsr import checkpoint
from stsr.simulate import simulate_tissue, write_visium


def main() -> None:
    """Simulate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=0, help="how many of the panel; all by default")
    parser.add_argument("--size-um", type=float, default=2560.0)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    panel = checkpoint.describe(asked.model or checkpoint.default_weights())["panel"]
    genes = panel[: asked.genes] if asked.genes else panel
    with tempfile.TemporaryDirectory() as folder:
        write_visium(
            simulate_tissue(asked.size_um, asked.size_um, genes=list(panel)), Path(folder) / "visium"
        )
        store = stsr.prepare(Path(folder) / "visium", Path(folder) / "visium.zarr")
        before = peak_gb()
        began = time.perf_counter()
        stsr.superres(
            store,
            genes=genes,
            model=asked.model,
            samples=asked.samples,
            device=asked.device,
            spots="raw",
            adapt="off",
            report=print,
        )
        seconds = time.perf_counter() - began
        grid = stsr.open_section(store).map("superres_x10").grid
    maps = grid.height * grid.width / 256**2 * len(genes)
    print(f"{len(genes)} genes x {grid.height} x {grid.width} bins in {seconds:.1f} s on {asked.device}")
    print(
        f"{torch.get_num_threads()} threads: {seconds / maps:.3f} s per 256 x 256 map, {maps / seconds:.1f} maps/s"
    )
    print(f"peak memory {peak_gb():.2f} GB ({before:.2f} GB before superres)")


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
