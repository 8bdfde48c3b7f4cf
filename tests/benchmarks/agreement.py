"""Visium against Xenium of a serial section: python tests/benchmarks/agreement.py VISIUM.zarr XENIUM.zarr

The default model was trained on `xenium_serial_he`, except for the area of ``--region 140 1050 1140 2074``.

Runs `stsr.superres` on the Visium section for the genes that both have, and interpolations as baselines, and
correlates each map with the Xenium counts after a blur of 50 um (serial sections do not match cell by cell).
Positions are compared through pixels of their common H&E, ``--um-per-px`` each. Prints a summary, and
with ``--csv`` a table per gene.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

import stsr
from stsr.metrics import pearson, spearman
from stsr.store.section import open_section

BLUR_UM = 50.0


def main() -> None:
    """Run the methods, correlate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("visium", type=Path)
    parser.add_argument("xenium", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--um-per-px", type=float, default=2.0, help="of the shared H&E, in the Xenium's um")
    parser.add_argument(
        "--region", type=float, nargs=4, help="x0 y0 x1 y1 in the Xenium's um; all by default"
    )
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    xenium = open_section(asked.xenium)
    with tempfile.TemporaryDirectory() as folder:
        store = shutil.copytree(asked.visium, Path(folder) / "visium.zarr")
        section = open_section(store)
        genes = [gene for gene in xenium.hr.genes if gene in set(section.spots.genes)]
        runs = {
            "stsr": {"model": asked.model},
            "stsr, no consistency": {"model": asked.model, "consistency": False},
            "stsr, no spots": {"model": asked.model, "use_lr": False},
            "bicubic + consistency": {"method": "bicubic"},
            "bilinear": {"method": "bilinear", "consistency": False},
        }
        truth, inside, places = reference(xenium, section, genes, asked.um_per_px)
        if asked.region:
            x0, y0, x1, y1 = asked.region
            x, y = np.meshgrid(*xenium.hr.grid.centres_um())
            inside &= (x > x0) & (x < x1) & (y > y0) & (y < y1)
        scores = {}
        for label, options in runs.items():
            made = stsr.superres(store, genes=genes, overwrite=True, **options)
            maps = blurred(open_section(store).map(made.element), genes, places)
            scores[label] = pearson(maps[:, inside], truth[:, inside])
            rank = np.nanmean(spearman(maps[:, inside], truth[:, inside]))
            print(
                f"{label:24s} mean PCC {np.nanmean(scores[label]):.3f}  mean Spearman {rank:.3f}", flush=True
            )
    table = pd.DataFrame(scores, index=pd.Index(genes, name="gene"))
    table.insert(0, "xenium_counts", xenium.hr.read(genes).sum((1, 2)))
    print(f"{len(genes)} genes, {BLUR_UM:g} um blur, {inside.sum()} bins of 10 um")
    print(
        table.loc[[g for g in ("GATA3", "ERBB2", "LUM", "POSTN", "LYZ") if g in table.index]]
        .round(3)
        .to_string()
    )
    if asked.csv:
        table.round(4).to_csv(asked.csv)


def reference(xenium, section, genes: list[str], um_per_px: float):
    """Blurred Xenium counts, the bins to compare, and those bins' places in the Visium map's um."""
    grid = xenium.hr.grid
    truth = np.stack(
        [ndimage.gaussian_filter(one.astype(float), BLUR_UM / grid.bin_um) for one in xenium.hr.read(genes)]
    )
    x, y = np.meshgrid(*grid.centres_um())
    scale = section.image.um_per_px / um_per_px
    x, y = x * scale, y * scale
    x0, y0, x1, y1 = section.spots.bounds_um
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1) & xenium.tissue.read(grid)
    return truth, inside, (x, y)


def blurred(maps, genes: list[str], places) -> np.ndarray:
    """Blurred maps (g, y, x) at places in um."""
    grid = maps.grid
    at = [(places[1] - grid.y0_um) / grid.bin_um - 0.5, (places[0] - grid.x0_um) / grid.bin_um - 0.5]
    found = []
    for gene in genes:
        soft = ndimage.gaussian_filter(maps.read([gene])[0].astype(float), BLUR_UM / grid.bin_um)
        found.append(ndimage.map_coordinates(soft, at, order=1, mode="nearest"))
    return np.stack(found)


if __name__ == "__main__":
    main()
