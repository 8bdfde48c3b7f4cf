"""Scores on the development area: python tests/benchmarks/heldout.py SECTION.zarr --model LABEL=FILE[,FILE ...]

SECTION.zarr is `xenium_same_he` as `stsr prepare` makes it. Its lower right quarter (1 x 1 mm) was kept out of the
training of every model by `examples/default_model.py`. Spots are simulated from the section's own transcripts, every
method super-resolves the whole section from the same spots and image, and the held-out area is scored. Genes are the
200 with the most counts outside of it. Several files of one label are seeds: the table gives
their mean and their largest difference from it. Prints markdown.

`--ablations` adds, for the first model: no image, the image of another area, a shifted image, no spots.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import scores as calibration_scores

import stsr
from stsr import checkpoint, metrics
from stsr.methods import method_class
from stsr.store.section import open_section

REGION_UM = (1000.0, 900.0, 2000.0, 1900.0)
GENES = 200
SCORES = ["pcc", "spearman", "rmse", "deviance_explained", "ssim"]
SHIFTS_UM = (10, 20, 50)


def main() -> None:
    """Score the requested models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="LABEL=FILE[,FILE]")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--region", type=float, nargs=4, default=REGION_UM)
    asked = parser.parse_args()
    models = [(entry.split("=")[0], entry.split("=")[1].split(",")) for entry in asked.model]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(asked.section, Path(folder), tuple(asked.region), asked.samples)
        for method in ("bilinear", "bicubic"):
            bench.run(method, method=method, consistency="none")
            bench.run(f"{method} + consistency", method=method)
        for label, files in models:
            for file in files:
                bench.run(f"{label}, no consistency", model=file, consistency="none")
                bench.run(f"{label} + consistency", model=file)
        if asked.ablations and models:
            bench.ablate(models[0][1][0])
        bench.print()


class Bench:
    """Runs `stsr.superres` on a copy of the section and scores the held-out area."""

    def __init__(self, section: Path, folder: Path, region, samples: int):
        self.store = folder / section.name
        shutil.copytree(section, self.store)
        self.samples = samples
        hr = open_section(self.store).hr
        counts = hr.read()
        area = hr.grid.crop_um(*region)
        row, column = hr.grid.offset_of(area)
        outside = np.ones(hr.grid.shape, bool)
        outside[row : row + area.height, column : column + area.width] = False
        order = np.argsort(-counts[:, outside].sum(1), kind="stable")[:GENES]
        self.genes = [hr.genes[index] for index in order]
        self.truth = counts[order][:, row : row + area.height, column : column + area.width].astype(float)
        self.area = area
        self.rows: list[pd.DataFrame] = []
        self.spreads: list[dict] = []

    def run(self, label: str, store: Path | None = None, **options) -> None:
        """Super-resolve the area and keep the scores."""
        store = store or self.store
        if "model" in options and method_class(checkpoint.describe(options["model"])["method"]).samples:
            options["samples"] = self.samples if "+ consistency" in label else 1
        print(label, file=sys.stderr)
        made = stsr.superres(store, genes=self.genes, overwrite=True, **options)
        section = open_section(store)
        mean = section.map(made.element).read(window=self.area).astype(float)
        scores = metrics.table(mean, self.truth, self.genes).drop(columns="gene").groupby("bin_um").mean()
        self.rows.append(scores.reset_index().assign(method=label, error=made.consistency_error))
        if made.spread and "+ consistency" in label:
            self.spreads.append(
                {"method": label, **self.calibration(mean, section.map(made.spread).read(window=self.area))}
            )

    def ablate(self, model: str) -> None:
        """Scores of a model without, or with a wrong, image or spots."""
        self.run("no spots", model=model, use_lr=False)
        for shift in SHIFTS_UM:
            self.run(f"image shifted by {shift} um", self._moved(shift), model=model)
        self.run("image of another place", self._moved(-700), model=model)
        self.run("no image (white)", self._white(), model=model)

    def calibration(self, mean: np.ndarray, spread: np.ndarray) -> dict:
        """Counts drawn from gamma-Poisson with the map's mean and spread, and from Poisson alone, against the truth."""
        rng = np.random.default_rng(0)
        shape = np.square(mean / np.maximum(spread, 1e-6)).clip(1e-3, 1e6)
        drawn = [rng.poisson(rng.gamma(shape, mean / shape)) for _ in range(39)]
        plain = [rng.poisson(mean) for _ in range(39)]
        found = {}
        for name, samples in (("with spread", drawn), ("Poisson only", plain)):
            found[f"coverage of 90 %, {name}"] = calibration_scores.coverage(
                np.stack(samples), self.truth
            ).mean()
            found[f"CRPS, {name}"] = calibration_scores.crps(np.stack(samples), self.truth).mean()
        return found

    def print(self) -> None:
        """Markdown tables: mean over genes and seeds, and the seeds' largest difference from it."""
        table = pd.concat(self.rows)
        order = list(dict.fromkeys(table["method"]))
        columns = [score for score in SCORES if score in table]
        for bin_um, part in table.groupby("bin_um"):
            ceiling = part["noise_ceiling"].iloc[0] if "noise_ceiling" in part else float("nan")
            print(f"\n**Bins of {bin_um:g} um** (noise ceiling of PCC {ceiling:.3f})\n")
            print("| method | seeds | " + " | ".join(columns) + " |")
            print("|---|---|" + "---|" * len(columns))
            for method in order:
                group = part[part["method"] == method]
                cells = [_cell(group[column].to_numpy()) for column in columns]
                print(f"| {method} | {len(group)} | " + " | ".join(cells) + " |")
        if self.spreads:
            spreads = pd.DataFrame(self.spreads).groupby("method", sort=False).mean()
            print("\n**Spread** (bins of 10 um)\n\n| method | " + " | ".join(spreads.columns) + " |")
            print("|---|" + "---|" * len(spreads.columns))
            for method, row in spreads.iterrows():
                print(f"| {method} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
        print(f"\nLargest consistency error: {table['error'].max():.1e}")

    def _moved(self, shift_um: float) -> Path:
        import spatialdata
        from spatialdata.transformations import Sequence, Translation, get_transformation, set_transformation

        store = self._copy(f"moved{shift_um:g}")
        sdata = spatialdata.read_zarr(store)
        image = sdata.images["he"]
        before = get_transformation(image, "global")
        after = Sequence([before, Translation([shift_um, 0.0], ("x", "y"))])
        set_transformation(image, after, "global", write_to_sdata=sdata)
        return store

    def _white(self) -> Path:
        import zarr

        store = self._copy("white")
        group = zarr.open_group(store / "images" / "he", mode="r+")
        for _, array in group.arrays():
            array[:] = 255
        return store

    def _copy(self, name: str) -> Path:
        target = self.store.parent / name / self.store.name
        return shutil.copytree(self.store, target)


def _cell(values: np.ndarray) -> str:
    mean = values.mean()
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {np.abs(values - mean).max():.3f}"


if __name__ == "__main__":
    main()
