"""Time and memory of `stsr.singlecell`, and its scores against measured cells.

    python tests/benchmarks/singlecell.py [--cells 100000] [--genes 300]

makes a section of random polygons of 24 corners (about 16 um wide, some overlapping) under a map in bins of 10 um,
and prints how long the command took and its peak memory, on at most two cores. The target: 60 s and 4 GB.

    python tests/benchmarks/singlecell.py --section SECTION.zarr --from hr_10um superres_x10

prints correlation and error per gene over cells and per cell over genes, in markdown. For inferred maps only cells in
1000 900 2000 1900 um of `xenium_same_he` are scored: the default model saw the rest. Genes are
the 200 with the most counts in the bins outside of it.

    python tests/benchmarks/singlecell.py --section SECTION.zarr --folder XENIUM_FOLDER

counts the folder's transcripts in bins of 2, 5, 10 and 20 um and scores the cells: the effect of the bin size.

    python tests/benchmarks/singlecell.py --nuclei [--section SECTION.zarr]

finds nuclei on a simulated H&E of several resolutions, and on that of a section with cells.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "2")

import numpy as np  # noqa: E402 - after the threads are set

REGION_UM = (1000.0, 900.0, 2000.0, 1900.0)
GENES = 200
MANY = 2000  # counts of a gene
NAMED = ("GATA3", "TPD52", "SERPINA3")
PITCH_UM, RADIUS_UM, CORNERS = 17.0, (6.0, 10.0), 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--section", type=Path)
    parser.add_argument("--from", dest="layers", nargs="+", default=["hr_10um"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--nuclei", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked.measure)
    elif asked.nuclei:
        find_nuclei(asked.section)
    elif asked.folder and asked.section:
        score_bins(asked.folder, asked.section)
    elif asked.section:
        with tempfile.TemporaryDirectory() as folder:
            score(shutil.copytree(asked.section, Path(folder) / asked.section.name), asked.layers)
    else:
        with tempfile.TemporaryDirectory() as folder:
            store = make(Path(folder) / "speed.zarr", asked.cells, asked.genes)
            # In its own process, so that the peak is that of the command and not of the simulation.
            subprocess.run([sys.executable, __file__, f"--measure={store}"], check=True)


def make(store: Path, cells: int, genes: int) -> Path:
    """A section of random cells under a random map; half of the values are 0, as in measured maps."""
    import dask.array as da
    import geopandas as gpd
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel

    from stsr.geometry.grid import Grid
    from stsr.store import elements, publishing

    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(cells)))
    x, y = (np.indices((side, side)).reshape(2, -1)[:, :cells] + 0.5) * PITCH_UM + rng.uniform(
        -3, 3, (2, cells)
    )
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = rng.uniform(*RADIUS_UM, (cells, 1)) * rng.uniform(0.85, 1.15, (cells, CORNERS))
    corners = np.stack([x[:, None] + radius * np.cos(angle), y[:, None] + radius * np.sin(angle)], -1)
    outlines = gpd.GeoDataFrame(geometry=shapely.polygons(corners), index=[f"cell{i}" for i in range(cells)])
    bins = int(np.ceil(side * PITCH_UM / 100)) * 10
    grid = Grid(0, 0, 10, bins, bins)
    counts = da.random.default_rng(0).poisson(0.7, (genes, bins, bins), chunks=elements.COUNT_CHUNKS)
    image = Image2DModel.parse(
        counts.astype(np.float32),
        dims=("c", "y", "x"),
        c_coords=[f"g{number}" for number in range(genes)],
        transformations=elements.placed(grid.bin_to_um),
    )
    parts = {"superres_x10": image, "cells": elements.cell_shapes(outlines)}
    return publishing.create(store, SpatialData.init_from_elements(parts), {})


def measure(store: Path) -> None:
    """Run the command and print its time and memory."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    from stsr.verbs.singlecell.verb import singlecell

    began, worked = time.perf_counter(), time.process_time()
    made = singlecell(store)
    wall, core = time.perf_counter() - began, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lost = abs(made.counts_in_cells + made.counts_outside - made.counts_in_map) / made.counts_in_map
    print(
        f"{made.cells:,} cells x {made.genes} genes: {wall:.0f} s ({core:.0f} s of processor), peak {peak:.2f} GB"
    )
    print(f"{made.counts_in_cells / made.counts_in_map:.1%} of the counts lie in cells, {lost:.0e} are lost")


def score(store: Path, layers: list[str]) -> None:
    """Scores of each layer, over all cells where it was measured, over the cells in the rectangle for all."""
    from stsr.store.section import open_section
    from stsr.verbs.singlecell.verb import singlecell

    hr = open_section(store).hr
    counts = hr.read()
    area = hr.grid.crop_um(*REGION_UM)
    row, column = hr.grid.offset_of(area)
    outside = np.ones(hr.grid.shape, bool)
    outside[row : row + area.height, column : column + area.width] = False
    most = [hr.genes[number] for number in np.argsort(-counts[:, outside].sum(1), kind="stable")[:GENES]]
    for layer in layers:
        options = {"source": layer, "name": "scored", "overwrite": True}
        if layer.startswith("hr_"):
            scores = singlecell(store, **options).scores
            of_genes = scores[scores["of"] == "gene"].set_index("name")
            many = of_genes[of_genes["counts"] > MANY]
            good = int((many[f"pcc_{layer}"] > 0.9).sum())
            print(
                f"\n**{layer}, all cells**: PCC above 0.9 for {good} of {len(many)} genes with over {MANY:,} counts"
            )
            show(scores, layer, f"{len(many)} genes with over {MANY:,} counts", many.index)
        made = singlecell(store, genes=most, score_region=REGION_UM, **options)
        print(f"\n**{layer}, {made.scored_cells:,} cells in {REGION_UM} um**")
        show(made.scores, layer, f"{GENES} genes", most)


def score_bins(folder: Path, store: Path) -> None:
    """PCC per gene over all cells, by the size of the bins that transcripts were counted in."""
    from stsr.metrics import pearson
    from stsr.platforms import xenium
    from stsr.store.section import open_section
    from stsr.verbs.prepare.counting import count
    from stsr.verbs.singlecell import areas as cells
    from stsr.verbs.singlecell import segmentation
    from stsr.verbs.singlecell.scores import measured_counts

    found = segmentation.stored(open_section(store))
    measured = measured_counts(open_section(store), found)
    many = np.flatnonzero(np.asarray(measured.counts.sum(0)).ravel() > MANY)
    truth = measured.counts[:, many].toarray().T
    print(
        f"| bins of | genes with over {MANY:,} counts, PCC median | lowest | above 0.9 |\n|---|---|---|---|"
    )
    for bin_um in (2.0, 5.0, 10.0, 20.0):
        transcripts = xenium._transcripts(folder / "transcripts.parquet", measured.genes, 20.0)
        counted = count(transcripts, measured.genes, bin_um, None)
        counter = counted.counter
        values = np.concatenate([counter.block(number, np.uint16) for number in range(counter.blocks)])
        found_counts = (
            cells.shares(found.polygons, counted.grid)[measured.rows] @ values[many].reshape(len(many), -1).T
        )
        pcc = pearson(found_counts.T, truth)
        print(
            f"| {bin_um:g} um | {np.median(pcc):.3f} | {pcc.min():.3f} | {(pcc > 0.9).sum()} of {len(many)} |"
        )


def find_nuclei(store: Path | None) -> None:
    """Nuclei found and true ones."""
    from scipy.spatial import cKDTree

    from stsr.histology.image import Image
    from stsr.simulate import image_frame, render_he, simulate_tissue
    from stsr.store.section import open_section
    from stsr.verbs.singlecell import nuclei

    tissue = simulate_tissue(500, 400, seed=3)
    true = tissue.cells.nucleus_um.mean(1)
    for px_um in (0.25, 0.5, 1.0, 2.0, 2.5):
        image = Image([np.moveaxis(render_he(tissue, px_um), 2, 0)], image_frame(tissue, px_um)[0])
        found = nuclei.find_nuclei(image, (0.0, 0.0, 500.0, 400.0), 3.0, lambda *_: None)
        near = cKDTree(found.centres_um).query(true)[0] < 4
        print(
            f"simulated, {px_um:g} um/px: {len(found.ids)} found of {len(true)}, {near.mean():.0%} within 4 um"
        )
    if store is None:
        return
    section = open_section(store)
    found = nuclei.find_nuclei(section.image, section.extent_um, 5.0, lambda *_: None)
    x0, y0, x1, y1 = section.extent_um
    squares = [np.arange(x0, x1 + 1, 100), np.arange(y0, y1 + 1, 100)]
    counts = [
        np.histogram2d(*each.T, squares)[0].ravel() for each in (found.centres_um, section.cells.centres_um)
    ]
    area_mm2 = (x1 - x0) * (y1 - y0) / 1e6
    print(
        f"{section.name}, {section.image.um_per_px:.2g} um/px: {len(found.ids):,} found of {counts[1].sum():,.0f}, ",
        end="",
    )
    print(f"{len(found.ids) / area_mm2:,.0f} and {counts[1].sum() / area_mm2:,.0f} per mm2, ", end="")
    print(f"correlation of counts per 100 um square {np.corrcoef(*counts)[0, 1]:.2f}")


def show(scores, layer: str, label: str, genes) -> None:
    """Markdown: named genes, quantiles over genes, and the mean over cells."""
    of_genes = scores[scores["of"] == "gene"].set_index("name").loc[genes]
    of_cells = scores[scores["of"] == "cell"]
    columns = [f"{what}_{method}" for what in ("pcc", "rmse") for method in (layer, "spots", "bilinear")]
    print("\n| | " + " | ".join(name.replace("_", " ", 1) for name in columns) + " |")
    print("|---|" + "---|" * len(columns))
    rows = {gene: of_genes.loc[gene, columns] for gene in NAMED if gene in of_genes.index}
    rows[f"{label}, mean"] = of_genes[columns].mean()
    rows[f"{label}, median"] = of_genes[columns].median()
    rows[f"{len(of_cells):,} cells, mean"] = of_cells[columns].mean()
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
