"""Time and peak memory of `stsr prepare` on a Visium HD slide of 2 um bins.

    python tests/benchmarks/visium_hd.py [--side-mm 6.5] [--genes 18000] [--per-bin 18] [--spots visium] [--folder DIR]

Writes a folder in Space Ranger's layout with random counts (kept if --folder is given, and then used again), and
prepares it in a process of its own. The whole slide, 6.5 mm, has 10.6 million bins and 190 million counts.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BIN_UM, UM_PER_PX = 2, 2.0
_ROWS = 100  # rows of bins written at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side-mm", type=float, default=6.5)
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--per-bin", type=float, default=18.0, help="counts per bin of 2 um")
    parser.add_argument("--spots", choices=["visium", "square", "bins"], default="visium")
    parser.add_argument("--bin-um", type=float, default=10.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "slide"
        if not folder.exists():
            start = time.perf_counter()
            counts = write(
                folder, round(arguments.side_mm * 1000 / BIN_UM), arguments.genes, arguments.per_bin
            )
            print(f"simulated {counts:,} counts in {time.perf_counter() - start:.0f} s", flush=True)
        # In its own process, so that the peak is that of prepare and not of the simulator.
        options = [f"--folder={folder}", f"--spots={arguments.spots}", f"--bin-um={arguments.bin_um}"]
        subprocess.run([sys.executable, __file__, "--measure", *options], check=True)


def write(folder: Path, side: int, genes: int, per_bin: float) -> int:
    """A folder of ``side`` x ``side`` bins; returns the number of counts."""
    from stsr.simulate.formats import write_rgb_tiff

    square = folder / "binned_outputs" / "square_002um"
    (square / "spatial").mkdir(parents=True)
    rng = np.random.default_rng(0)
    counts = _write_matrix(square / "filtered_feature_bc_matrix.h5", side, genes, per_bin, rng)
    _write_positions(square / "spatial" / "tissue_positions.parquet", side)
    factors = {"microns_per_pixel": UM_PER_PX, "bin_size_um": float(BIN_UM)}
    (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    pixels = round(side * BIN_UM / UM_PER_PX)
    image = rng.integers(120, 220, (pixels, pixels, 3), dtype=np.uint8)
    write_rgb_tiff(folder / "he_fullres.tif", image, UM_PER_PX, ome=False)
    return counts


def _write_matrix(file: Path, side: int, genes: int, per_bin: float, rng: np.random.Generator) -> int:
    import h5py

    from stsr.simulate.formats import write_features

    share = rng.lognormal(0, 2, genes)
    upto = np.cumsum(share / share.sum())
    total, ends = 0, [np.zeros(1, np.int64)]
    options = {"maxshape": (None,), "chunks": (1 << 18,), "compression": "gzip", "compression_opts": 1}
    with h5py.File(file, "w") as h5:
        group = h5.create_group("matrix")
        data, indices = (
            group.create_dataset(key, (0,), dtype, **options)
            for key, dtype in (("data", "i4"), ("indices", "i8"))
        )
        barcodes = group.create_dataset("barcodes", (0,), "S21", **options)
        for top in range(0, side, _ROWS):
            bins = min(_ROWS, side - top) * side
            place = np.repeat(np.arange(bins), rng.poisson(per_bin, bins))
            gene = np.searchsorted(upto, rng.random(len(place))).clip(max=genes - 1)
            key, number = np.unique(place * genes + gene, return_counts=True)
            for dataset, values in (
                (data, number),
                (indices, key % genes),
                (barcodes, _barcodes(top, bins, side)),
            ):
                dataset.resize((len(dataset) + len(values),))
                dataset[-len(values) :] = values
            ends.append(ends[-1][-1] + np.cumsum(np.bincount(key // genes, minlength=bins)))
            total += int(number.sum())
        group["indptr"] = np.concatenate(ends)
        group["shape"] = np.array([genes, side * side])
        write_features(group, [f"GENE{number}" for number in range(genes)])
    return total


def _barcodes(top: int, bins: int, side: int) -> np.ndarray:
    """``s_002um_00012_00345-1`` of some rows of bins."""
    row, column = np.divmod(np.arange(bins), side)
    letters = np.tile(np.frombuffer(b"s_002um_00000_00000-1", np.uint8), (bins, 1))
    for first, values in ((8, row + top), (14, column)):
        letters[:, first : first + 5] += (values[:, None] // 10 ** np.arange(4, -1, -1) % 10).astype(np.uint8)
    return letters.view("S21").ravel()


def _write_positions(file: Path, side: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for top in range(0, side, _ROWS):
        row, column = np.divmod(np.arange(min(_ROWS, side - top) * side), side)
        table = pa.table(
            {
                "barcode": pa.array(_barcodes(top, len(row), side).astype(str)),
                "in_tissue": np.ones(len(row), np.int64),
                "array_row": row + top,
                "array_col": column,
                "pxl_row_in_fullres": (row + top + 0.5) * BIN_UM / UM_PER_PX,
                "pxl_col_in_fullres": (column + 0.5) * BIN_UM / UM_PER_PX,
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure(arguments) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    from stsr.store.section import open_section
    from stsr.verbs.prepare.verb import prepare

    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as folder:
        wall, core = time.perf_counter(), time.process_time()
        store = prepare(
            arguments.folder,
            Path(folder) / "s.zarr",
            spots=arguments.spots,
            bin_um=arguments.bin_um,
            refine=False,
        )
        wall, core = time.perf_counter() - wall, time.process_time() - core
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        section = open_section(store)
        made, grid = section.provenance[section.catalogue.hr_elements[0]], section.hr.grid
        size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) / 2**30
    print(
        f"{made['counts']:,} counts of {len(section.hr.genes):,} genes into {grid.height} x {grid.width} bins and "
        f"{arguments.spots} spots: {wall:.0f} s by the clock, {core:.0f} s of a core, peak {peak:.2f} GB, store "
        f"{size:.2f} GB",
        flush=True,
    )


if __name__ == "__main__":
    main()
