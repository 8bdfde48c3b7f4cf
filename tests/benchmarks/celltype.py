"""Compare cell types of predicted and measured maps: python tests/benchmarks/celltype.py SECTION.zarr REFERENCE.csv

SECTION.zarr is `xenium_same_he` as `stsr prepare` makes it, with `superres_x10` and its spread by the default model and
`bilinear_x10` (stsr superres --method bilinear --name bilinear_x10), both of all its genes. A copy is typed by the same
reference from: the measured counts of each cell, the measured counts of each bin, the predicted map, bilinear
interpolation, and spots alone (each bin gets its part of its spot's counts). Bins are scored inside the rectangle
1000 900 2000 1900 um only, which the default model was not trained on (a development area: scored before, see
docs/experiments.md). Prints markdown. Platform effects are estimated per layer, from its totals in the section.

With `--speed SIDE` instead of a section: time and memory of a random map of SIDE x SIDE bins x 375 genes and 13 types.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
from spatialdata import SpatialData

from stsr.geometry.grid import Grid
from stsr.store import publishing
from stsr.store.elements import labels
from stsr.store.section import open_section
from stsr.store.writer import MapWriter
from stsr.verbs.celltype.model import UNASSIGNED
from stsr.verbs.celltype.verb import celltype

REGION_UM = (1000.0, 900.0, 2000.0, 1900.0)
MARKERS = [
    "EPCAM", "KRT7", "ERBB2", "KRT14", "POSTN", "LUM", "PDGFRB", "PTPRC", "CD3E", "CD8A",
    "NKG7", "MS4A1", "MZB1", "LYZ", "CD68", "CD163", "ITGAX", "PECAM1", "VWF",
]  # fmt: skip
LINEAGES = {
    "Malignant": "epithelial", "Epithelial": "epithelial",
    "Fibroblast": "fibroblast", "Pericyte": "pericyte", "Endothelial": "endothelial",
    "T_cell": "T, NK", "NK_cell": "T, NK", "B_cell": "B, plasma", "Plasmablast": "B, plasma",
    "Macrophage": "myeloid", "Monocyte": "myeloid", "Myeloid": "myeloid", "Dendritic": "myeloid",
    UNASSIGNED: UNASSIGNED,
}  # fmt: skip
LAYERS = {
    "measured bins": "hr_10um",
    "predicted": "superres_x10",
    "bilinear": "bilinear_x10",
    "spots only": "spots_x10",
}


def main() -> None:
    """Type a copy of the section from every layer and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", type=Path, nargs="?")
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("--speed", type=int, metavar="SIDE")
    parser.add_argument("--region", type=float, nargs=4, default=REGION_UM)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.speed:
            return print_speed(Path(folder), asked.speed)
        store = shutil.copytree(asked.section, Path(folder) / asked.section.name)
        add_spots(store)
        celltype(store, reference=asked.reference, source="cells_table", per="cell", name="of_cells", draws=0)
        for layer in LAYERS.values():
            print(f"typing {layer}", file=sys.stderr)
            draws = 10 if layer == "superres_x10" else 0
            celltype(store, reference=asked.reference, source=layer, name=f"of_{layer}", draws=draws)
        section = open_section(store)
        print_markers(section)
        print_scores(section, tuple(asked.region))


def print_speed(folder: Path, side: int) -> None:
    """Type a map of Poisson counts, 50 a bin, without redraws."""
    rng = np.random.default_rng(0)
    genes, types = [f"G{number}" for number in range(375)], [f"type {number}" for number in range(13)]
    profiles = rng.gamma(0.3, size=(375, 13)) + 1e-3
    pd.DataFrame(1e6 * profiles / profiles.sum(0), genes, types).to_csv(folder / "reference.csv")
    grid = Grid(0.0, 0.0, 10.0, side, side)
    sdata = SpatialData.init_from_elements({"tissue": labels(np.ones(grid.shape, bool), grid)})
    publishing.create(folder / "s.zarr", sdata, {})
    profiles = profiles / profiles.sum(0)
    with MapWriter(
        folder / "s.zarr", ["superres_x10"], genes, grid, {"superres_x10": {"command": "superres"}}
    ) as writer:
        for row in range(0, side, 256):
            rows = slice(row, min(row + 256, side))
            kinds = rng.integers(0, 13, (rows.stop - row, side))
            for first in range(0, 375, 16):
                part = slice(first, min(first + 16, 375))
                counts = rng.poisson(50 * profiles[part][:, kinds])
                writer.write("superres_x10", part, rows, slice(0, side), counts)
    before = resource.getrusage(resource.RUSAGE_SELF)
    made = celltype(folder / "s.zarr", reference=folder / "reference.csv", draws=0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime
    print(
        f"{side**2:,} bins x {made.genes} genes: {made.seconds:.0f} s, of one core {cpu_s:.0f} s, "
        f"peak memory {after.ru_maxrss / 2**20:.1f} GB"
    )


def add_spots(store: Path) -> None:
    """Write the map in which each bin gets its part of its spot's counts."""
    section = open_section(store)
    measurement = section.spots.measurement(section.hr.grid)
    nearest = measurement.nearest.ravel()
    bins = np.bincount(nearest[nearest >= 0], minlength=len(section.spots.centres_um))
    counts = section.spots.counts.toarray() / np.maximum(bins, 1)[:, None]
    values = np.where(nearest[:, None] >= 0, counts[nearest], 0).T.reshape(-1, *section.hr.grid.shape)
    genes = section.spots.genes
    with MapWriter(
        store, ["spots_x10"], genes, section.hr.grid, {"spots_x10": {"command": "benchmark"}}
    ) as writer:
        height, width = section.hr.grid.shape
        writer.write("spots_x10", slice(0, len(genes)), slice(0, height), slice(0, width), values)


def print_markers(section) -> None:
    """Mean counts of markers in the cells of each type: are types where their markers are?"""
    table, cells = section.sdata.tables["of_cells"], section.sdata.tables["cells_table"]
    there = [gene for gene in MARKERS if gene in cells.var_names]
    counts = pd.DataFrame(cells[:, there].X.toarray(), columns=there)
    means = counts.groupby(table.obs["celltype"].to_numpy()).mean().round(2)
    means.insert(0, "cells", table.obs["celltype"].value_counts())
    print("\nMean measured counts per cell of markers, by the type given to the cell (whole section):\n")
    show(means.rename_axis("type").reset_index())


def print_scores(section, region) -> None:
    """Every layer against measured bins and against cells, inside the region."""
    tables = {label: section.sdata.tables[f"of_{layer}_bins"] for label, layer in LAYERS.items()}
    truth = tables["measured bins"]
    x, y = truth.obsm["spatial"].T
    inside = (region[0] <= x) & (x < region[2]) & (region[1] <= y) & (y < region[3])
    labels = {label: table.obs["celltype"].astype(str).to_numpy()[inside] for label, table in tables.items()}
    cell = cell_of(section, truth.obsm["spatial"][inside])
    of_cells = section.sdata.tables["of_cells"].obs["celltype"].astype(str).to_numpy()
    by_cell = np.where(cell >= 0, of_cells[cell], UNASSIGNED)
    rows = []
    for label, found in labels.items():
        row = {"layer": label}
        for against, true in (("measured bins", labels["measured bins"]), ("cells", by_cell)):
            if label != against:
                row |= {f"{key}, {against}": value for key, value in scores(true, found).items()}
        rows.append(row)
    area = f"{region[0]:g} {region[1]:g} {region[2]:g} {region[3]:g} um"
    known = int((labels["measured bins"] != UNASSIGNED).sum()), int((by_cell != UNASSIGNED).sum())
    print(
        f"\nInside {area}; {known[0]:,} bins have a type by measured bins, {known[1]:,} lie in a typed cell:\n"
    )
    show(pd.DataFrame(rows))
    for label in ("predicted", "spots only"):
        print(f"\nConfusion: measured bins (rows), {label} (columns):\n")
        pairs = [pd.Series(labels[name]).map(LINEAGES) for name in ("measured bins", label)]
        show(pd.crosstab(*pairs).rename_axis(None, axis=1).rename_axis("measured bins").reset_index())
    print("\nConfusion: cells (rows), measured bins (columns), the ceiling:\n")
    pairs = [pd.Series(values).map(LINEAGES) for values in (by_cell, labels["measured bins"])]
    show(pd.crosstab(*pairs).rename_axis(None, axis=1).rename_axis("cells").reset_index())
    shares = {label: table.X[inside] for label, table in tables.items()}
    kinds = list(truth.var_names)
    show_shares(kinds, shares, labels["measured bins"] != UNASSIGNED)
    show_confidence(tables["predicted"].obs["confidence"].to_numpy()[inside], labels)


def scores(true: np.ndarray, found: np.ndarray) -> dict:
    """Accuracy and macro F1 of types and lineages, over places with a true type; what is unassigned is wrong."""
    known = true != UNASSIGNED
    row = {}
    for level in ("types", "lineages"):
        a, b = true[known], found[known]
        if level == "lineages":
            a, b = (np.array([LINEAGES[name] for name in values]) for values in (a, b))
        f1 = [2 * np.sum((a == k) & (b == k)) / (np.sum(a == k) + np.sum(b == k)) for k in np.unique(a)]
        row |= {f"accuracy {level}": np.mean(a == b), f"macro F1 {level}": np.mean(f1)}
    return row


def cell_of(section, centres_um: np.ndarray) -> np.ndarray:
    """The cell that each point lies in, -1 for none."""
    outlines = section.cells.outlines.geometry.to_numpy()
    point, cell = shapely.STRtree(outlines).query(shapely.points(centres_um), predicate="within")
    found = np.full(len(centres_um), -1)
    found[point] = cell
    return found


def show_shares(kinds: list[str], shares: dict, known: np.ndarray) -> None:
    """Pearson correlation of each type's share with that of measured bins."""
    print("\nCorrelation over bins of each type's share with that of measured bins:\n")
    rows = [
        {"layer": label}
        | {
            k: np.corrcoef(values[known, i], shares["measured bins"][known, i])[0, 1]
            for i, k in enumerate(kinds)
        }
        for label, values in shares.items()
        if label != "measured bins"
    ]
    frame = pd.DataFrame(rows)
    frame["mean"] = frame[kinds].mean(axis=1)
    show(frame)


def show_confidence(confidence: np.ndarray, labels: dict) -> None:
    """How often predicted types agree with measured bins, by the confidence from redraws."""
    known = (labels["measured bins"] != UNASSIGNED) & (labels["predicted"] != UNASSIGNED)
    right = labels["predicted"] == labels["measured bins"]
    print("\nPredicted types by their confidence:\n")
    edges = [0, 0.6, 0.8, 0.95, 1.01]
    parts = [(low, high, known & (low <= confidence) & (confidence < high)) for low, high in pairwise(edges)]
    show(pd.DataFrame([{"confidence": f"{low:g} to {min(high, 1):g}", "bins": int(part.sum()),
                        "as measured": right[part].mean()} for low, high, part in parts]))  # fmt: skip


def show(frame: pd.DataFrame) -> None:
    """A markdown table; numbers with three digits."""

    def text(value) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    print("| " + " | ".join(map(str, frame.columns)) + " |")
    print("|" + "---|" * len(frame.columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(map(text, row)) + " |")


if __name__ == "__main__":
    main()
