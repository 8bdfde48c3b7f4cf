"""Gene-gene correlation of maps against the measured one: python tests/benchmarks/gec_agreement.py SECTION.zarr

SECTION.zarr is `xenium_same_he` as `stsr prepare` makes it. In a copy of it the default model (map: the mean, not its
samples) and bilinear interpolation super-resolve the whole section unless these maps exist; then
`stsr.gec` compares their matrices, and that of the spots alone, with that of the measured counts, in the rectangle
excluded from all training (a development area: settings were chosen on it). Genes are the 200 with the most counts
outside of it. Prints markdown.

Below: the error that counting noise leaves in the corrected measured matrix itself. Two binomial halves of the counts
share their intensity and no noise, and each has twice the variance of the whole: half of the RMSE between them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

import stsr
from stsr.store.places import bins_of
from stsr.store.section import open_section
from stsr.verbs.gec import matrices
from stsr.verbs.gec.verb import gec

REGION_UM = (1000.0, 900.0, 2000.0, 1900.0)
GENES = 200
BINS_UM = (10, 20, 40)
MAPS = {"superres_x10": {}, "bilinear_x10": {"method": "bilinear"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", type=Path)
    parser.add_argument("--region", type=float, nargs=4, default=REGION_UM)
    parser.add_argument("--genes", type=int, default=GENES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / arguments.section.name
        shutil.copytree(arguments.section, store)
        for name, options in MAPS.items():
            if name not in open_section(store).elements:
                stsr.superres(store, name=name, samples=1, **options)
        genes = most_counted(store, arguments.region, arguments.genes)
        rows = [row for bin_um in BINS_UM for row in compared(store, genes, bin_um, tuple(arguments.region))]
    show(pd.DataFrame(rows))


def most_counted(store: Path, region, number: int) -> list[str]:
    hr = open_section(store).hr
    x, y = hr.grid.centres_um()
    inside = np.outer((y >= region[1]) & (y < region[3]), (x >= region[0]) & (x < region[2]))
    order = np.argsort(-hr.read()[:, ~inside].sum(1), kind="stable")[:number]
    return [hr.genes[index] for index in order]


def compared(store: Path, genes: list[str], bin_um: float, region) -> list[dict]:
    made = gec(
        store,
        source="superres_x10",
        genes=genes,
        bin_um=bin_um,
        region=region,
        truth="hr_10um",
        beside=["bilinear_x10"],
        denoise_truth=True,
        top=1,
        overwrite=True,
    )
    left = counting_error(store, genes, bin_um, region)
    return [{"bin_um": bin_um, "counting_error": left, **row} for row in made.agreement]


def counting_error(store: Path, genes: list[str], bin_um: float, region) -> float:
    counts = bins_of(open_section(store), "hr_10um", bin_um, region).read(genes).astype(np.int64)
    half = np.random.default_rng(0).binomial(counts, 0.5)
    matrices = [
        matrices.without_counting_noise(np.corrcoef(part), part.mean(1), part.var(1, ddof=1))
        for part in (half, counts - half)
    ]
    return matrices.matrix_distance(*matrices)["rmse"] / 2


def show(table: pd.DataFrame) -> None:
    kinds = [("raw", "pearson"), ("noise-corrected", "pearson"), ("raw", "spearman")]
    for bin_um, part in table.groupby("bin_um"):
        places = part["places"].iloc[0]
        print(f"\n**Bins of {bin_um:g} um** ({places:,.0f} of them), RMSE / bias / pattern\n")
        print("| | " + " | ".join(f"{kind.capitalize()}, {noise}" for noise, kind in kinds) + " |")
        print("|---|" + "---|" * len(kinds))
        for label in dict.fromkeys(part["map"]):
            cells = []
            for noise, kind in kinds:
                row = part[(part["map"] == label) & (part["truth"] == noise) & (part["correlation"] == kind)]
                cells.append(cell(row.iloc[0]) if len(row) else "")
            print(f"| {label} | " + " | ".join(cells) + " |")
    errors = table.groupby("bin_um")["counting_error"].first()
    words = ", ".join(f"{error:.3f} at {bin_um:g} um" for bin_um, error in errors.items())
    print(f"\nRMSE that counting noise leaves in the corrected measured matrix: {words}")
    counted = table.groupby(["bin_um", "truth"])["pairs"].max().unstack().to_dict("index")
    print(f"\nPairs compared, by size of bin: {counted}")


def cell(row: pd.Series) -> str:
    return f"{row['rmse']:.3f} / {row['bias']:+.3f} / {row['pattern']:.3f}"


if __name__ == "__main__":
    main()
