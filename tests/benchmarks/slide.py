"""Memory and time of training and superres on a slide of 20 x 20 mm: python tests/benchmarks/slide.py

Simulates 2 x 2 mm of tissue with its H&E at 0.5 um per pixel, repeats the image over the slide, adds random counts of
`--genes` genes and Visium spots, and writes the section chunk by chunk (5 GB of disk for 20 mm, some minutes). Then
`stsr train` and `stsr superres` run in processes of their own, whose peak memory is measured: a few training steps,
whose time is compared with that of preparing their tiles; the map of a region with all genes; and the map of one gene.
Prints markdown. `--method c3diff --set image_um=0.5` and the like choose what is trained.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from stsr.geometry.grid import Grid
from stsr.geometry.lattice import VISIUM_SPOT_UM, hexagonal_lattice
from stsr.histology.image import Image, scaling
from stsr.methods import method_class
from stsr.simulate import render_he, simulate_tissue
from stsr.store import elements, publishing
from stsr.store.section import open_section
from stsr.verbs.train.config import resolve
from stsr.verbs.train.tiles import TrainingTiles

UM_PER_PX, BIN_UM, PIECE_UM = 0.5, 10.0, 2000.0
MEAN_COUNT = 0.05  # per bin and gene
LIMIT_GB = 4.0


def main() -> None:
    """Write the slide unless it is there, then measure each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mm", type=float, default=20.0, help="side of the slide")
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--store", type=Path, help="keep the slide here, or use the one that is there")
    parser.add_argument("--method", default="unet")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = asked.store or Path(folder) / "slide.zarr"
        if not store.exists():
            began = time.monotonic()
            write_slide(store, asked.mm * 1000, asked.genes)
            print(f"wrote {store} in {time.monotonic() - began:.0f} s", file=sys.stderr)
        settings = [*asked.settings]
        if not settings and "image_um" in method_class(asked.method).Config.__dataclass_fields__:
            settings = ["image_um=0.5"]
        print("| command | seconds | peak memory, GB |\n|---|---|---|")
        for name, command in commands(asked, store, Path(folder) / "m.safetensors", settings).items():
            seconds, gb = measured(command)
            print(
                f"| {name} | {seconds:.0f} | {gb:.2f}{'' if gb < LIMIT_GB else ' (too much)'} |", flush=True
            )
    print_tiles(asked, store, settings) if asked.store else None


def commands(
    asked: argparse.Namespace, store: Path, model: Path, settings: list[str]
) -> dict[str, list[str]]:
    """The commands to measure: {name: arguments of stsr}."""
    short = [f"train.steps={asked.steps}", f"validate_every={asked.steps}", "validation_tiles=8"]
    chosen = [word for setting in (*settings, *short) for word in ("--set", setting)]
    middle = asked.mm * 500
    region = f"{middle},{middle},{middle + 1500},{middle + 1500}"
    return {
        f"train {asked.method} {' '.join(settings)}, {asked.steps} steps": [
            *("train", str(store), "-o", str(model), "--method", asked.method, *chosen)
        ],
        f"superres of 1.5 x 1.5 mm, {asked.genes} genes": [
            *("superres", str(store), "--model", str(model), "--name", "part", "--overwrite"),
            *("--genes", "all", "--region", region),
        ],
        "superres of the slide, 1 gene": [
            *("superres", str(store), "--model", str(model), "--name", "one", "--overwrite"),
            *("--genes", "gene_0"),
        ],
    }


def measured(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak memory, GB, of a command of stsr in its own process."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "stsr", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"stsr {' '.join(arguments)} failed with exit code {process.returncode}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def print_tiles(asked: argparse.Namespace, store: Path, settings: list[str]) -> None:
    """Print the time to prepare one batch of 8 tiles."""
    method = method_class(asked.method)
    config, training = resolve(method, {}, settings)
    tiles = TrainingTiles([open_section(store)], method(config, ("gene",)).requirements, training)
    tiles.batch(8, torch.Generator().manual_seed(0))
    began = time.process_time()
    for seed in range(1, 5):
        tiles.batch(8, torch.Generator().manual_seed(seed))
    print(f"\nPreparing a tile takes {(time.process_time() - began) / 32 * 1000:.0f} ms of CPU.")


# ------------------------------------------------------------------------------------------------- the slide


def write_slide(path: Path, side_um: float, genes: int) -> None:
    """Write a section with H&E, counts, spots and tissue of ``side_um`` x ``side_um``, lazily."""
    grid = Grid.covering((0.0, 0.0, side_um, side_um), BIN_UM)
    names = [f"gene_{number}" for number in range(genes)]
    centres = hexagonal_lattice(grid.bounds_um)
    inside = np.ones(grid.shape, bool)
    spots = [f"spot_{number}" for number in range(len(centres))]
    parts = {
        "he": elements.he_image(Image([_he(side_um)], scaling(UM_PER_PX))),
        "hr_10um": _counts(grid, names),
        "tissue": elements.labels(inside, grid),
        "support": elements.labels(inside, grid),
        "spots": elements.spot_shapes(centres, "disc", VISIUM_SPOT_UM, spots),
        "spots_table": elements.table(_spot_counts(spots, names), "spots", centres),
    }
    publishing.create(path, elements.store_of(parts), {name: {} for name in parts})


def _he(side_um: float):
    """H&E (3, y, x) of simulated tissue, repeated over the slide."""
    import dask.array as da

    tissue = simulate_tissue(PIECE_UM, PIECE_UM, genes=4, seed=0)
    image = render_he(tissue, UM_PER_PX)
    piece = da.from_array(np.ascontiguousarray(np.moveaxis(image, -1, 0)), chunks=(3, 1000, 1000))
    times = int(np.ceil(side_um / PIECE_UM))
    px = round(side_um / UM_PER_PX)
    return da.tile(piece, (1, times, times))[:, :px, :px]


def _counts(grid: Grid, names: list[str]):
    """Random counts (gene, y, x), drawn chunk by chunk."""
    import dask.array as da
    from spatialdata.models import Image2DModel

    random = da.random.default_rng(0)
    shape = (len(names), *grid.shape)
    counts = random.poisson(MEAN_COUNT, shape, chunks=elements.COUNT_CHUNKS).astype(np.uint8)
    return Image2DModel.parse(
        counts, dims=("c", "y", "x"), c_coords=names, transformations=elements.placed(grid.bin_to_um)
    )


def _spot_counts(spots: list[str], names: list[str]):
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    per_spot = MEAN_COUNT * np.pi * (VISIUM_SPOT_UM / 2 / BIN_UM) ** 2
    counts = np.random.default_rng(1).poisson(per_spot, (len(spots), len(names))).astype(np.int32)
    return anndata.AnnData(
        sp.csr_matrix(counts), obs=pd.DataFrame(index=spots), var=pd.DataFrame(index=names)
    )


if __name__ == "__main__":
    main()
