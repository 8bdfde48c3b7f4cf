"""Visium against Xenium of a serial section: python tests/benchmarks/agreement.py VISIUM.zarr XENIUM.zarr

The default model was trained on `xenium_serial_he`, except for the area of ``--region 140 1050 1140 2074``.

Runs `stsr.superres` on the Visium section for the genes that both have, from raw and from denoised spots, and
interpolations as baselines, and correlates each map with the Xenium counts: per bin of 10 um, and after blurs of 20
and 50 um (serial sections do not match cell by cell). Positions are compared through pixels of their common H&E,
``--um-per-px`` each. Prints a summary, and with ``--csv`` a table per gene at the largest blur.
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

BLURS_UM = (0.0, 20.0, 50.0)

RAW = {"spots": "raw", "consistency": "none", "adapt": "off"}
DENOISED = {"spots": "denoised", "consistency": "none", "adapt": "off"}
RUNS: dict[str, dict] = {
    "bilinear": {"method": "bilinear", **RAW},
    "bilinear, denoised spots": {"method": "bilinear", **DENOISED},
    "kriged, denoised spots": {"method": "kriged", **DENOISED},
    "bicubic + exact consistency": {"method": "bicubic", "spots": "raw", "consistency": "exact"},
    "model, raw spots": RAW,
    "model, raw spots, exact": RAW | {"consistency": "exact"},
    "model, denoised spots": DENOISED,
    "model, denoised spots, adding up to them": DENOISED | {"consistency": "denoised"},
    "model adapted to the slide, denoised spots": DENOISED | {"adapt": "auto"},
    "model, no spots": {"use_lr": False},
}


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
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS, metavar="RUN")
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    xenium = open_section(asked.xenium)
    with tempfile.TemporaryDirectory() as folder:
        store = shutil.copytree(asked.visium, Path(folder) / "visium.zarr")
        section = open_section(store)
        genes = [gene for gene in xenium.hr.genes if gene in set(section.spots.genes)]
        truth, inside, places = reference(xenium, section, genes, asked.um_per_px)
        if asked.region:
            x0, y0, x1, y1 = asked.region
            x, y = np.meshgrid(*xenium.hr.grid.centres_um())
            inside &= (x > x0) & (x < x1) & (y > y0) & (y < y1)
        scores = {}
        print("| | " + " | ".join(f"PCC, blur {blur:g} um" for blur in BLURS_UM) + " | Spearman, last |")
        print("|---|" + "---|" * (len(BLURS_UM) + 1), flush=True)
        for label in asked.only:
            options = RUNS[label]
            with_model = {} if "method" in options else {"model": asked.model}
            made = stsr.superres(store, genes=genes, samples=1, overwrite=True, **options, **with_model)
            found = open_section(store).map(made.element)
            cells = []
            for blur, true in zip(BLURS_UM, truth, strict=True):
                maps = blurred(found, genes, places, blur)
                scores[label] = pearson(maps[:, inside], true[:, inside])
                cells.append(np.nanmean(scores[label]))
            cells.append(np.nanmean(spearman(maps[:, inside], truth[-1][:, inside])))
            print(f"| {label} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)
    table = pd.DataFrame(scores, index=pd.Index(genes, name="gene"))
    table.insert(0, "xenium_counts", xenium.hr.read(genes).sum((1, 2)))
    print(f"{len(genes)} genes, {inside.sum()} bins of 10 um")
    print(
        table.loc[[g for g in ("GATA3", "ERBB2", "LUM", "POSTN", "LYZ") if g in table.index]]
        .round(3)
        .to_string()
    )
    if asked.csv:
        table.round(4).to_csv(asked.csv)


def reference(xenium, section, genes: list[str], um_per_px: float):
    """Xenium counts for each blur, the bins to compare, and those bins' places in the Visium map's um."""
    grid = xenium.hr.grid
    counts = xenium.hr.read(genes).astype(np.float32)
    truth = [
        ndimage.gaussian_filter(counts, (0, blur / grid.bin_um, blur / grid.bin_um)) for blur in BLURS_UM
    ]
    x, y = np.meshgrid(*grid.centres_um())
    scale = section.image.um_per_px / um_per_px
    x, y = x * scale, y * scale
    x0, y0, x1, y1 = section.spots.bounds_um
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1) & xenium.tissue.read(grid)
    return truth, inside, (x, y)


def blurred(maps, genes: list[str], places, blur_um: float) -> np.ndarray:
    """Blurred maps (g, y, x) at places in um."""
    grid = maps.grid
    at = [(places[1] - grid.y0_um) / grid.bin_um - 0.5, (places[0] - grid.x0_um) / grid.bin_um - 0.5]
    found = []
    for gene in genes:
        soft = ndimage.gaussian_filter(maps.read([gene])[0].astype(float), blur_um / grid.bin_um)
        found.append(ndimage.map_coordinates(soft, at, order=1, mode="nearest"))
    return np.stack(found)


if __name__ == "__main__":
    main()
