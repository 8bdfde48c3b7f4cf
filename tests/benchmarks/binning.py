"""Number of transcripts binned per second on one core, and peak memory.

    python tests/benchmarks/binning.py [--transcripts 100000000] [--genes 313] [--file transcripts.parquet]

Writes a Xenium-format file of simulated transcripts (kept if --file is given, and then used again), and prints the
rates of reading and binning (target: 5 million/s, peak under 2 GB), and with all counts built and written.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"):
    os.environ[_name] = "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transcripts", type=int, default=100_000_000)
    parser.add_argument("--genes", type=int, default=313)
    parser.add_argument("--width-um", type=float, default=12_000)
    parser.add_argument("--height-um", type=float, default=22_000)
    parser.add_argument("--spots", choices=["square", "visium"], default="square")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "transcripts.parquet"
        if not file.exists():
            write(file, arguments)
        # In its own process, so that the peak is that of the reader and not of the simulator.
        options = [f"--genes={arguments.genes}", f"--spots={arguments.spots}", f"--file={file}"]
        subprocess.run([sys.executable, __file__, "--measure", *options], check=True)


def write(file: Path, arguments) -> None:
    from stream import write_transcripts  # beside this file

    start = clock()
    write_transcripts(file, arguments.transcripts, arguments.width_um, arguments.height_um, arguments.genes)
    print(f"simulated {arguments.transcripts:,} transcripts in {clock(start)[0]:.0f} s", flush=True)


def measure(arguments) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import dask
    import zarr

    from stsr.platforms import xenium
    from stsr.store import elements
    from stsr.verbs.prepare.counting import count

    dask.config.set(scheduler="synchronous")
    genes = sorted(xenium._names(arguments.file, batches=4))
    start = clock()
    counted = count(xenium._transcripts(arguments.file, genes, 20.0), genes, 10.0, None)
    binned = clock(start)
    read = counted.kept + counted.low_quality + counted.other
    report("read, filtered and binned", read, binned)
    with tempfile.TemporaryDirectory() as folder:
        image = elements.count_image(counted.counter, counted.grid, genes).data
        target = zarr.create_array(
            f"{folder}/hr", shape=image.shape, chunks=image.chunksize, dtype=image.dtype
        )
        image.store(target, lock=False)
        report("and written as a map", read, clock(start))
    if arguments.spots:
        start = clock()
        count(xenium._transcripts(arguments.file, genes, 20.0), genes, 10.0, arguments.spots)
        report(f"binned, with {arguments.spots} spots", read, clock(start))
    print(
        f"{counted.grid.height} x {counted.grid.width} bins x {len(genes)} genes, {counted.kept:,} kept of {read:,}"
    )


def clock(since: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Wall and processor seconds; the latter are hardly affected by other processes."""
    return time.perf_counter() - since[0], time.process_time() - since[1]


def report(what: str, transcripts: int, seconds: tuple[float, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, core = (f"{value:.1f} s = {transcripts / value / 1e6:.1f} million/s" for value in seconds)
    print(f"{what}: {core} of one core ({wall} by the clock), peak so far {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
