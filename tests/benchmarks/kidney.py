"""What a finer image adds, on another organ: python tests/benchmarks/kidney.py VISIUM_HD RUNS [--only LABEL,...]

VISIUM_HD is a Visium HD folder of a human kidney with its H&E (10x Genomics, CC BY 4.0). `stsr prepare` makes
RUNS/kidney.zarr: spots of Visium's lattice from one binomial half of the counts, and the other half as truth. The
right 2 mm are kept out of training and validation, with a gap; models are trained on the rest, with pixels of 10 and
of 2 um, and predict the right part from spots and image, without consistency. Scored are the 200 genes with the most
counts elsewhere (without mitochondrial ones), in bins of 20, 40 and 80 um.

`unet breast` and `unet kidney and breast` show a foreign and a second organ (`--breast DATA`); without an own gene, a
model maps a gene like the genes of its panel with similar spots.

It may be interrupted and run again: models and the rows of RUNS/kidney/scores.csv are reused. `--print` only prints.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from halves import most_counted
from skimage.transform import resize

import stsr
from stsr import metrics
from stsr.geometry.grid import Grid, add_up
from stsr.store.section import open_section

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from default_model import REGIONS as breast_regions

UNSEEN_UM = (4800.0, 0.0, 6700.0, 3700.0)  # ends where bins were measured
REGIONS = {"kidney": {"exclude": [UNSEEN_UM], "validation": [[3800, 0, 4400, 1200]]}}
FACTORS = (2, 4, 8)
SETTINGS = {"gap_lr": 2, "select": "last", "validation_tiles": 16, "storage": "float16"}
STEPS = {"unet": 1200, "c3diff": 600, "diffst": 600}
DENOISED = ", denoised spots"
KRIGED = ", denoised spots, kriged base"
ADAPTED = {"adapt": "auto", "adapt_minutes": 60.0}
OWN = {"unet": {"factors": 64}}

IMAGES = {"coarse": "H&E of 10 um", "white": "no H&E"}
BREAST = ("xenium_same_he", "xenium_serial_he")

# label -> (method, settings, organs)
VARIANTS: dict[str, tuple[str, dict, str]] = (
    {
        f"{method} {image_um} um": (method, {"image_um": float(image_um), **OWN.get(method, {})}, "kidney")
        for method in STEPS
        for image_um in (10, 2)
    }
    | {
        f"unet {label}": ("unet", {"image_um": 2.0, **OWN["unet"], **own}, "kidney")
        for label, own in {
            "4 um": {"image_um": 4.0},
            "1 um": {"image_um": 1.0},
            "2 um wide": {"widths": [48, 72, 96]},
            "2 um narrow encoder": {"image_channels": 24},
            "2 um wide encoder": {"image_channels": 96},
        }.items()
    }
    | {
        f"c3diff {image_um} um with 16 genes per tile": (
            "c3diff",
            {"image_um": float(image_um), "genes_per_tile": 16},
            "kidney",
        )
        for image_um in (10, 2)
    }
    | {
        f"unet {organs}": ("unet", {"image_um": 2.0, **OWN["unet"]}, organs)
        for organs in ("kidney and breast", "breast")
    }
)


def main() -> None:
    """Prepare, train and score what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--breast", type=Path, help="folder with the Xenium sections of the default model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="LABEL[,LABEL]")
    parser.add_argument("--steps", type=int, help="instead of the steps of each method")
    parser.add_argument(
        "--model", action="append", default=[], metavar="LABEL=FILE", help="score another model"
    )
    parser.add_argument("--features", type=Path, help="patch features or their encoder, for all trainings")
    parser.add_argument("--images", nargs="+", default=[], choices=IMAGES, help="score also with another H&E")
    parser.add_argument("--denoised", action="store_true", help="score each model also from denoised spots")
    parser.add_argument(
        "--adapt", action="store_true", help="score each --model also adapted to the slide's spots"
    )
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--print", action="store_true", help="only print the table of what is scored")
    asked = parser.parse_args()
    labels = list(VARIANTS) if asked.only is None else [label.strip() for label in asked.only]
    if unknown := set(labels) - set(VARIANTS) - {""}:
        parser.error(f"no variant is called {', '.join(unknown)}; there are: {'; '.join(VARIANTS)}")
    bench = Bench(asked.folder, asked.runs, asked.breast)
    if not asked.print:
        bench.score("bilinear", 0, method="bilinear")
        bench.score(f"bilinear{DENOISED}", 0, method="bilinear", spots="denoised")
        bench.score(f"kriged{DENOISED}", 0, method="kriged", spots="denoised")
        for label, file in (entry.split("=", 1) for entry in asked.model):
            bench.score(label, 0, model=file)
            if asked.denoised:
                bench.score(f"{label}{DENOISED}", 0, model=file, spots="denoised")
            if asked.adapt:
                bench.score(f"{label}, adapted", 0, model=file, spots="denoised", **ADAPTED)
        for seed in asked.seeds:
            for label in filter(None, labels):
                name = f"{label} {asked.features.stem}" if asked.features else label
                model = bench.trained(label, name, seed, asked.steps, asked.settings, asked.features)
                bench.score(name, seed, model=model)
                if asked.denoised:
                    bench.score(f"{name}{DENOISED}", seed, model=model, spots="denoised")
                    bench.score(f"{name}{KRIGED}", seed, model=model, spots="denoised", base="kriged")
                for kind, label in IMAGES.items():
                    if kind in asked.images:
                        bench.score(f"{name}, {label}", seed, store=bench.altered_store(kind), model=model)
    bench.print()


class Bench:
    """The section, its unseen part, and the scores so far."""

    def __init__(self, folder: Path, runs: Path, breast: Path | None):
        self.runs, self.breast = runs, breast
        self.store = runs / "kidney.zarr"
        self.work = runs / "kidney"
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.store.exists():
            stsr.prepare(folder, self.store, spots="visium", organ="kidney")
        section = open_section(self.store)
        assert section.hr is not None
        self.area: Grid = section.hr.grid.crop_um(*UNSEEN_UM)
        self.genes = most_counted(section, UNSEEN_UM)
        self.truth = section.map("hr_10um_unseen").read(self.genes, window=self.area).astype(float)
        self.other = section.hr.read(self.genes, window=self.area).astype(float) - self.truth

    @property
    def scores(self) -> pd.DataFrame:
        """The rows so far: label, seed, bin_um, pcc, deviance_explained."""
        path = self.work / "scores.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["label", "seed"])

    def trained(
        self, label: str, name: str, seed: int, steps: int | None, settings: list[str], features: Path | None
    ) -> Path:
        """Train a variant, unless it is there."""
        method, own, organs = VARIANTS[label]
        model = self.work / f"{name.replace(' ', '_')}_{seed}.safetensors"
        if not model.exists():
            began = time.monotonic()
            sections = [self.store] if "kidney" in organs else []
            genes = self.genes if "kidney" in organs else []
            if "breast" in organs:
                sections, genes = self._with_breast(sections, genes)
            used = {section.stem for section in sections}
            regions = {name: own for name, own in (REGIONS | breast_regions).items() if name in used}
            if (
                organs == "breast"
            ):  # nothing of the breast is left to validate on, and the last weights are kept anyway
                regions = {name: {"exclude": own["exclude"]} for name, own in regions.items()}
            stsr.train(
                sections,
                model,
                method=method,
                config={**SETTINGS, **own, "genes": genes},
                settings=settings,
                steps=steps or STEPS[method],
                regions=regions,
                val=0 if organs == "breast" else 0.15,
                seed=seed,
                features=[features] if features else (),
                progress=lambda done, total, text: print(f"{name} {seed}: {text}", file=sys.stderr),
            )
            print(f"{name} {seed}: {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr)
        return model

    def _with_breast(self, sections: list[Path], genes: list[str]) -> tuple[list[Path], list[str]]:
        """Add the breast sections, prepared if they are not, and their panel."""
        if self.breast is None:
            sys.exit("give the folder with the breast sections: --breast DATA")
        stores = [self.runs / f"{name}.zarr" for name in BREAST]
        for store in stores:
            if not store.exists():
                stsr.prepare(self.breast / store.stem, store, organ="breast")
        hr = open_section(stores[0]).hr
        assert hr is not None
        return [*sections, *stores], list(dict.fromkeys([*genes, *hr.genes]))

    def altered_store(self, kind: str) -> Path:
        """A copy of the section with another H&E: ``coarse`` as a scan of 10 um per pixel, or ``white``."""
        store = self.work / kind / self.store.name
        if not store.exists():
            shutil.copytree(self.store, store)
            image = open_section(store).image
            assert image is not None
            small = image.overview(10.0).levels[0]  # (3, y, x)
            for _, level in zarr.open_group(store / "images" / "he", mode="r+").arrays():
                level[:] = 255 if kind == "white" else _resized(small, level.shape[1:])
        return store

    def score(self, label: str, seed: int, store: Path | None = None, **options) -> None:
        """Predict the unseen part and add a row per bin size, unless they are there."""
        store = store or self.store
        before = self.scores
        if ((before["label"] == label) & (before["seed"] == seed)).any():
            return
        print(label, file=sys.stderr)
        made = stsr.superres(
            store,
            genes=self.genes,
            region=UNSEEN_UM,
            samples=1,
            consistency="none",
            overwrite=True,
            progress=lambda done, total, text: print(text, done, total, file=sys.stderr),
            report=lambda text: print(text, file=sys.stderr),
            **{"spots": "raw", "adapt": "off"} | options,
        )
        found = open_section(store).map(made.element).read(self.genes, window=self.area).astype(float)
        self._add(label, seed, found)

    def _add(self, label: str, seed: int, found: np.ndarray) -> None:
        rows = [{"label": label, "seed": seed, **row} for row in self._rows(found)]
        pd.concat([self.scores, pd.DataFrame(rows)]).to_csv(self.work / "scores.csv", index=False)

    def _rows(self, found: np.ndarray) -> list[dict]:
        rows = []
        for factor in FACTORS:
            height, width = (side // factor * factor for side in found.shape[1:])
            mean, truth = (add_up(maps[:, :height, :width], factor) for maps in (found, self.truth))
            rows.append(
                {
                    "bin_um": 10 * factor,
                    "pcc": np.nanmean(metrics.pearson(mean, truth)),
                    "deviance_explained": np.nanmean(metrics.deviance_explained(mean, truth)),
                }
            )
        return rows

    def ceiling(self, factor: int) -> float:
        """PCC that the true expected counts would reach: root of the correlation of the two halves."""
        height, width = (side // factor * factor for side in self.truth.shape[1:])
        halves = (add_up(maps[:, :height, :width], factor) for maps in (self.truth, self.other))
        return float(np.sqrt(np.maximum(metrics.pearson(*halves), 0)).mean())

    def print(self) -> None:
        """A markdown table: mean over seeds, and their largest difference from it."""
        sizes = [10 * factor for factor in FACTORS]
        print("| | seeds | " + " | ".join(f"PCC {size} µm" for size in sizes) + " | ", end="")
        print(" | ".join(f"deviance {size} µm" for size in sizes) + " |")
        print("|---|---|" + "---|" * 2 * len(sizes))
        for label, part in self.scores.groupby("label", sort=False):
            cells = [
                _cell(part[part["bin_um"] == size][score].to_numpy())
                for score in ("pcc", "deviance_explained")
                for size in sizes
            ]
            print(f"| {label} | {part['seed'].nunique()} | " + " | ".join(cells) + " |")
        ceilings = " | ".join(f"{self.ceiling(factor):.3f}" for factor in FACTORS)
        print(f"| noise ceiling | | {ceilings} | " + " | " * len(FACTORS))


def _resized(planes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Colour planes (3, y, x) interpolated to another shape, uint8."""
    return np.stack([resize(plane, shape, order=1, preserve_range=True) for plane in planes]).astype(np.uint8)


def _cell(values: np.ndarray) -> str:
    mean = values.mean()
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {np.abs(values - mean).max():.3f}"


if __name__ == "__main__":
    main()
