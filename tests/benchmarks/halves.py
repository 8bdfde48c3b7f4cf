"""Maps and their samples against counts that spots did not see: python tests/benchmarks/halves.py SECTION.zarr RUNS

Spots and truth never share counting noise. A section of Visium HD by `stsr prepare --spots visium` has both halves of
its counts. Of a Xenium section, half of the transcripts give spots (`--spots disc` of 55 um, 100 um apart, or
`--spots square` of 100 um), and the other half the truth; the store with these spots is made in RUNS.

Scored are the 200 genes with the most counts outside the region, in the region (`--region`; by default the part that
the default model never saw), without consistency: bilinear and kriged spots, and each `--model LABEL=FILE`, from
denoised spots and with `--raw` from raw ones; with `--adapt` also adapted to the slide. `--samples N` draws N samples
of each map with a spread, and scores sums over bins, and over genes as well, against Poisson counts around the map.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scores as sample_scores
import spatialdata
from anndata import AnnData
from scipy import sparse
from spatialdata.models import Image2DModel

import stsr
from stsr import checkpoint, metrics
from stsr.errors import UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.geometry.measurement import Measurement
from stsr.methods import method_class
from stsr.store import elements
from stsr.store.section import Section, open_section

REGIONS = {"breast": (1000.0, 900.0, 2000.0, 1900.0), "kidney": (4800.0, 0.0, 6700.0, 3700.0)}
GENES = 200
FACTORS = (1, 2, 4, 8)
DISC_UM = 55.0


def main() -> None:
    """Make the store, predict, score, print markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--spots", choices=["disc", "square"], default="disc")
    parser.add_argument("--region", type=float, nargs=4)
    parser.add_argument("--model", action="append", default=[], metavar="LABEL=FILE")
    parser.add_argument("--raw", action="store_true", help="predict from raw spots, too")
    parser.add_argument("--adapt", action="store_true", help="predict with adapted models, too")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--sample-genes", type=int, default=50, help="of the genes, evenly by their counts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    section = open_section(asked.section)
    region = asked.region or REGIONS[section.organ or "breast"]
    asked.runs.mkdir(parents=True, exist_ok=True)
    store = asked.section if section.unseen else halved(section, asked.runs, asked.spots, asked.seed)
    bench = Bench(store, tuple(region), asked.samples, asked.sample_genes)
    bench.run("bilinear, raw spots", method="bilinear", spots="raw")
    bench.run("bilinear", method="bilinear")
    bench.run("kriged", method="kriged")
    for label, file in (entry.split("=", 1) for entry in asked.model):
        if asked.raw:
            bench.run(f"{label}, raw spots", model=file, spots="raw")
        bench.run(label, model=file)
        if asked.adapt:
            bench.run(f"{label}, adapted", model=file, adapt="auto", adapt_minutes=60.0)
    bench.print()


def halved(section: Section, runs: Path, shape: str, seed: int) -> Path:
    """A copy of a Xenium section with spots from one half of its counts; the other half is ``hr_10um_unseen``."""
    path = runs / f"{section.path.stem}_{shape}_{seed}.zarr"
    if path.exists():
        return path
    assert section.hr is not None
    grid, genes, rng = section.hr.grid, section.hr.genes, np.random.default_rng(seed)
    counts = np.rint(section.hr.read()).astype(np.int64)
    seen = rng.binomial(counts, 0.5)
    square = shape == "square"
    measurement, _ = (Measurement.squares(grid) if square else Measurement.hexagonal(grid)).of_seeing_spots()
    covered = np.asarray(measurement.matrix.max(0).todense()).reshape(grid.shape)
    inside = rng.binomial(seen, np.clip(covered, 0, 1)).reshape(
        len(genes), -1
    )  # positions within bins are unknown
    spots = (measurement.matrix > 0).astype(np.int64) @ inside.T  # (spots, g)
    kept = measurement.in_tissue(section.tissue.read(grid) if section.tissue else np.ones(grid.shape, bool))
    annotation = AnnData(sparse.csr_matrix(spots[kept].astype(np.float32)))
    annotation.obs_names = [f"spot_{number}" for number in range(len(kept))]
    annotation.var_names = genes
    centres, size = measurement.centres_um[kept], 100.0 if square else DISC_UM
    shutil.copytree(section.path, path)
    sdata = spatialdata.read_zarr(path)
    for name in ("spots_table", "spots"):
        sdata.delete_element_from_disk(name)
        del sdata[name]
    sdata["spots"] = elements.spot_shapes(centres, shape, size, list(annotation.obs_names))
    sdata["spots_table"] = elements.table(annotation, "spots", centres)
    sdata["hr_10um_unseen"] = Image2DModel.parse(
        (counts - seen).astype(np.float32),
        dims=("c", "y", "x"),
        c_coords=genes,
        transformations=elements.placed(grid.bin_to_um),
    )
    for name in ("spots", "spots_table", "hr_10um_unseen"):
        sdata.write_element(name)
        sdata.attrs["stsr"][name] = {"origin": "simulated", "depth": 0.5, "seed": seed}
    sdata.write_attrs()
    sdata.write_consolidated_metadata()
    return path


class Bench:
    """The section, its region, and the scores so far."""

    def __init__(
        self, store: Path, region: tuple[float, float, float, float], samples: int, sample_genes: int
    ):
        self.store, self.region, self.samples = store, region, samples
        section = open_section(store)
        assert section.hr is not None
        assert section.unseen is not None
        self.area: Grid = section.hr.grid.crop_um(*region)
        self.genes = most_counted(section, region)
        self.sampled = self.genes[:: max(1, len(self.genes) // sample_genes)]
        self.truth = section.unseen.read(self.genes, window=self.area).astype(float)
        self.divided = section.divided_from_um > 0
        self.rows: list[dict] = []
        self.spreads: list[dict] = []

    def run(self, label: str, **options) -> None:
        """Predict the region, and keep the scores."""
        print(label, file=sys.stderr)
        name = checkpoint.describe(options["model"])["method"] if "model" in options else options["method"]
        if self.samples and method_class(name).samples:  # no dispersion to draw from
            options |= {"samples": self.samples, "keep_samples": True}
        made = stsr.superres(
            self.store,
            genes=self.genes,
            region=self.region,
            overwrite=True,
            report=lambda text: print("   ", text, file=sys.stderr),
            **{"spots": "denoised", "consistency": "none", "adapt": "off"} | options,
        )
        found = open_section(self.store).map(made.element).read(self.genes, window=self.area).astype(float)
        row: dict = {"method": label}
        for factor in FACTORS:
            mean, truth = _sums(found, factor), _sums(self.truth, factor)
            row[f"PCC {10 * factor} um"] = np.nanmean(metrics.pearson(mean, truth))
            row[f"deviance {10 * factor} um"] = np.nanmean(metrics.deviance_explained(mean, truth))
        self.rows.append(row)
        if self.samples:
            self.calibrate(label, made.element, found)

    def calibrate(self, label: str, element: str, mean: np.ndarray) -> None:
        """Score samples of sums over bins, and over genes as well; and Poisson counts around the map."""
        chosen = [self.genes.index(gene) for gene in self.sampled]
        rng, truth = np.random.default_rng(0), self.truth[chosen]
        sets = {"Poisson": rng.poisson(mean[chosen], (self.samples, *truth.shape)).astype(np.float32)}
        try:
            drawn = stsr.samples(self.store, element, self.samples, self.region, genes=self.sampled)
            x, y = self.area.centres_um()
            sets["samples"] = drawn.sel(x=x, y=y, method="nearest").values
        except UsageError as error:
            print("   ", error, file=sys.stderr)
        for kind, values in sets.items():
            row: dict = {"method": label, "counts": kind}
            for factor in FACTORS[1:]:
                sums, real = _sums(values, factor), _sums(truth, factor)
                row[f"CRPS {10 * factor} um"] = sample_scores.crps(sums, real).mean()
                row[f"covered {10 * factor} um"] = sample_scores.coverage(sums, real).mean()
                sums, real = sums.sum(1, keepdims=True), real.sum(0, keepdims=True)
                row[f"CRPS of the sum {10 * factor} um"] = sample_scores.crps(sums, real).mean()
                row[f"sum covered {10 * factor} um"] = sample_scores.coverage(sums, real).mean()
            self.spreads.append(row)

    def print(self) -> None:
        """Markdown tables."""
        other = open_section(self.store).hr.read(self.genes, window=self.area).astype(float) - self.truth
        ceiling: dict = {"method": "noise ceiling"}
        for factor in FACTORS:
            halves = metrics.pearson(_sums(other, factor), _sums(self.truth, factor))
            ceiling[f"PCC {10 * factor} um"] = np.sqrt(np.maximum(halves, 0)).mean()
        print_table([*self.rows, ceiling])
        if self.spreads:
            print_table(self.spreads)
        if self.divided:
            print(
                "\nCounts were divided by area: in bins of 10 and 20 um they scatter less than Poisson counts."
            )


def most_counted(section: Section, region: tuple[float, float, float, float]) -> list[str]:
    """The genes with the most counts in spots outside a region, without mitochondrial ones."""
    spots = section.spots
    assert spots is not None
    (x0, y0, x1, y1), (x, y) = region, spots.centres_um.T
    totals = np.asarray(spots.counts[(x < x0) | (x > x1) | (y < y0) | (y > y1)].sum(0)).ravel()
    order = (spots.genes[index] for index in np.argsort(-totals, kind="stable"))
    return [gene for gene in order if not gene.startswith("MT-")][:GENES]


def print_table(rows: list[dict]) -> None:
    """Rows as markdown, numbers with three digits."""
    table = pd.DataFrame(rows)
    print("\n| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns))
    for values in table.itertuples(index=False):
        cells = [
            value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.3f}" for value in values
        ]
        print("| " + " | ".join(cells) + " |")


def _sums(maps: np.ndarray, factor: int) -> np.ndarray:
    """Sums of (..., y, x) over whole blocks of bins."""
    height, width = (side // factor * factor for side in maps.shape[-2:])
    return add_up(maps[..., :height, :width], factor)


if __name__ == "__main__":
    main()
