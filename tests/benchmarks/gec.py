"""Memory and time of `stsr gec` on a large map read from disk.

    python tests/benchmarks/gec.py [--genes 5000] [--side 1000] [--store FOLDER]

Writes a section whose map of expected counts has genes x side x side bins (20 GB for the defaults; kept if --store is
given, and then used again), correlates it in a separate process on one core, and prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

FIELDS = 20  # patterns that genes are mixtures of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--side", type=int, default=1000, help="bins")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.store = arguments.store or Path(folder) / "large.zarr"
        if not arguments.store.exists():
            write(arguments)
        # In its own process, so that the peak is not that of the writer.
        command = [sys.executable, __file__, "--measure", f"--store={arguments.store}"]
        subprocess.run(command, check=True)


def write(arguments) -> None:
    """A section with tissue everywhere and a map of mixtures of smooth patterns, each bin with independent noise."""
    import numpy as np
    from scipy import ndimage
    from spatialdata import SpatialData

    from stsr.geometry.grid import Grid
    from stsr.store.elements import labels
    from stsr.store.publishing import create
    from stsr.store.writer import CHUNKS, MapWriter

    began = time.perf_counter()
    side, rng = arguments.side, np.random.default_rng(0)
    grid = Grid(0.0, 0.0, 10.0, side, side)
    tissue = labels(np.ones(grid.shape, bool), grid)
    create(arguments.store, SpatialData.init_from_elements({"tissue": tissue}), {"tissue": {}})
    fields = rng.standard_normal((FIELDS, side, side), np.float32)
    fields = np.stack([np.exp(20 * ndimage.gaussian_filter(field, 6)) for field in fields])
    genes = [f"GENE{number}" for number in range(arguments.genes)]
    made = {"superres_x10": {"command": "superres", "method": "none", "units": "expected counts per bin"}}
    with MapWriter(arguments.store, ["superres_x10"], genes, grid, made) as writer:
        for start in range(0, len(genes), CHUNKS[0]):
            part = slice(start, min(start + CHUNKS[0], len(genes)))
            shares = rng.dirichlet(np.full(FIELDS, 0.2), part.stop - part.start).astype(np.float32)
            maps = np.tensordot(shares, fields, 1)
            maps *= rng.random(maps.shape, np.float32) + 0.5
            writer.write("superres_x10", part, slice(0, side), slice(0, side), maps)
    print(f"wrote {len(genes):,} genes x {side**2:,} bins in {time.perf_counter() - began:.0f} s", flush=True)


def measure(store: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from stsr.verbs.gec.verb import gec

    stages: dict[str, float] = {}
    state = {"label": None, "since": time.process_time()}

    def progress(done, total, label) -> None:
        now = time.process_time()
        stages[label] = stages.get(label, 0.0) + now - state["since"]
        state.update(label=label, since=now)

    made = gec(store, overwrite=True, progress=progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    core = time.process_time()
    parts = ", ".join(f"{label} {seconds:.0f} s" for label, seconds in stages.items())
    print(
        f"{made.genes:,} genes x {made.places:,} bins: peak {peak:.2f} GB, {core:.0f} s of one core ({parts})"
    )
    print(f"by the clock {made.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
