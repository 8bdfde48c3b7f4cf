"""Compare both papers, their ablations and the baselines at one compute budget: python tests/benchmarks/methods.py RUNS

RUNS holds the sections that `examples/default_model.py` prepared; models and scores go to RUNS/methods. Every training
gets `--budget` seconds of one core: a method's seconds per step are measured once and kept in steps.json, and its
ablations and seeds all make the steps that fit. The scored area is the upper right of `xenium_same_he`, which is
excluded from these trainings and apart from the area used for earlier choices. Genes are the most expressed elsewhere.

It may be interrupted and run again: models and the rows of scores.csv are reused (remove RUNS/methods when a method
has changed). A second process with other labels (`--only`) may run beside it. `--print` only prints the
scores as markdown.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import stsr
from stsr import metrics
from stsr.methods.batch import Requirements
from stsr.store.section import open_section
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.heldout import Rectangle
from stsr.verbs.train.tiles import TrainingTiles

SECTIONS = ("xenium_same_he", "xenium_serial_he", "section_h5ad")
BLIND_UM = (1000.0, 0.0, 1990.0, 800.0)  # of xenium_same_he
MARGIN_UM = 100.0  # predicted around it, so that its border has neighbours

# um, in each section's own coordinates. Kept out are the blind area and, below it, the area that default models were
# chosen on, wherever their tissue appears. Checked by the cells: all 8,976 of xenium_same_he have a twin with the same
# counts in the serial section, and the 3,045 of the blind area lie within 1209..2044 x 1026..1998 um there.
# section_h5ad has other cells of the same tissue: their gene maps fit best when shifted by (2440, 3300) um, to 10 um.
REGIONS = {
    "xenium_same_he": {"exclude": [[1000, 0, 1990, 1900]], "validation": [[0, 0, 600, 600]]},
    "xenium_serial_he": {"exclude": [[100, 1000, 2120, 2110], [1383, 0, 1990, 640]], "validation": []},
    "section_h5ad": {
        "exclude": [[3420, 3260, 4480, 5200], [2440, 3250, 3040, 3900]],
        "validation": [[5000, 500, 5900, 1400]],
    },
}
SETTINGS = {
    "gap_lr": 1,
    "select": "last",
    "validation_tiles": 8,
    "storage": "float16",
    "prefetch": 0,  # tiles are made by the same core
}
PAPERS_SAMPLES = 4  # number of samples averaged for models without a mean

# label -> (method, settings). The papers' ablations are settings: C3-Diff's Table 3, Diff-ST's Table 2.
VARIANTS: dict[str, tuple[str, dict]] = {
    "unet": ("unet", {}),
    "c3diff": ("c3diff", {}),
    "diffst": ("diffst", {}),
    "c3diff without augmentation": ("c3diff", {"hypersphere_noise": 0.0}),
    "c3diff without modal": ("c3diff", {"modal_weight": 0.0}),
    "c3diff without content": ("c3diff", {"content_weight": 0.0}),
    "c3diff without inter": ("c3diff", {"inter_weight": 0.0}),
    "c3diff missing LR: dropout": ("c3diff", {"imputation": "none"}),
    "c3diff missing LR: zero padding": ("c3diff", {"imputation": "zero"}),
    "c3diff missing LR: arithmetic mean": ("c3diff", {"imputation": "mean"}),
    "c3diff as the papers sample": ("c3diff", {"mean_share": 0.0}),
    "diffst without cell attention": ("diffst", {"cell_attention": False}),
    "diffst without curriculum": ("diffst", {"curriculum": False}),
    "diffst without modulation": ("diffst", {"modulation": False}),
    "diffst without disentangling": ("diffst", {"disentangling_weight": 0.0}),
    "diffst without graph": ("diffst", {"graph_weight": 0.0}),
    "diffst as the papers sample": ("diffst", {"mean_share": 0.0}),
}
INTERPOLATIONS = ("bilinear", "bicubic")
CONSTANTS = ("all zero", "gene mean")  # need neither spots nor image, and stand in every table
# title, with LR, with consistency
TABLES = (
    ("With spots, with consistency", True, True),
    ("With spots, without consistency", True, False),
    ("Without spots", False, False),
)
BINS_UM = (10, 20, 40)
LEAST_STEPS = 20
CALIBRATIONS = 3  # dry runs, of which the quickest counts: other processes can only slow them down


def main() -> None:
    """Train and score what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of one core per training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="LABEL[,LABEL]")
    parser.add_argument("--genes", type=int, default=50, help="the panel: the most expressed")
    parser.add_argument(
        "--steps", action="append", default=[], metavar="METHOD=N", help="instead of the budget"
    )
    parser.add_argument("--csv", type=Path, help="RUNS/methods/scores.csv by default")
    parser.add_argument("--print", action="store_true", help="only print the tables of what is scored")
    asked = parser.parse_args()
    labels = asked.only or list(VARIANTS)
    if unknown := set(labels) - set(VARIANTS):
        parser.error(f"no variant is called {', '.join(unknown)}; there are: {', '.join(VARIANTS)}")
    work = asked.runs / "methods"
    csv = asked.csv or work / "scores.csv"
    if not asked.print:
        torch.set_num_threads(1)
        work.mkdir(exist_ok=True)
        fixed = {method: int(steps) for method, _, steps in (entry.partition("=") for entry in asked.steps)}
        run(asked.runs, work, csv, labels, asked.seeds, asked.budget, asked.genes, fixed)
    scores = pd.read_csv(csv)
    print_tables(scores[scores["genes"] == asked.genes])


def run(runs: Path, work: Path, csv: Path, labels, seeds, budget: float, genes: int, fixed: dict) -> None:
    """Every label and seed that has no scores yet; whole methods first, so that an interruption leaves a table."""
    trainer = Trainer([runs / f"{name}.zarr" for name in SECTIONS], work, budget, genes)
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(runs / f"{SECTIONS[0]}.zarr", Path(folder), trainer.panel)
        if not is_scored(csv, CONSTANTS[0], 0, 0, genes):
            append(csv, scorer.baselines())
        for seed in seeds:
            for label in labels:
                method, settings = VARIANTS[label]
                steps = fixed.get(method) or trainer.steps(method)
                if is_scored(csv, label, seed, steps, genes):
                    continue
                model = trainer.train(label, seed, steps)
                samples = PAPERS_SAMPLES if settings.get("mean_share") == 0 else 1
                rows = scorer.model(model, samples).assign(label=label, seed=seed, steps=steps)
                append(csv, rows.assign(train_seconds=seconds_of(model)))


class Trainer:
    """Trains variants at the budget.

    Parameters
    ----------
    stores
        The training sections.
    work
        Where models, the panel and the seconds per step are kept.
    budget
        Seconds of one core per training.
    genes
        Size of the panel.
    """

    def __init__(self, stores: list[Path], work: Path, budget: float, genes: int):
        self.stores, self.work, self.budget, self.genes = stores, work, budget, genes
        self.panel = remembered(work / "panels.json", str(genes), self._choose_panel)

    def steps(self, method: str) -> int:
        """As many steps as the budget holds; the same for every seed and ablation."""
        seconds = remembered(self.work / "steps.json", f"{method} {self.genes}", lambda: self._timed(method))
        return max(LEAST_STEPS, int(self.budget / seconds))

    def train(self, label: str, seed: int, steps: int) -> Path:
        """The model of a label and seed, trained if it does not exist."""
        output = (
            self.work
            / f"{re.sub('[^a-z0-9]+', '_', label.lower())}_g{self.genes}_n{steps}_s{seed}.safetensors"
        )
        if not output.exists():
            print(f"{label}, seed {seed}: {steps} steps", file=sys.stderr, flush=True)
            method, settings = VARIANTS[label]
            common = {"method": method, "regions": REGIONS, "seed": seed, "device": "cpu", "steps": steps}
            stsr.train(self.stores, output, config=self._config(settings, validate_every=steps), **common)
        return output

    def _config(self, settings: dict, **more) -> dict:
        """Names instead of a number of genes: which are most expressed may depend on a method's tiles."""
        return {"train": {**SETTINGS, "genes": list(self.panel), **more}, "method": settings}

    def _timed(self, method: str) -> float:
        """Seconds per step on one core."""
        print(f"timing {method}", file=sys.stderr, flush=True)
        common = {"method": method, "regions": REGIONS, "device": "cpu", "dry_run": True}
        runs = [
            stsr.train(self.stores, self.work / "timed.safetensors", config=self._config({}), **common)
            for _ in range(CALIBRATIONS)
        ]
        return min(one["seconds_per_step"] for one in runs)

    def _choose_panel(self) -> dict[str, float]:
        """The most expressed genes, and their mean counts per 100 um pixel over training tissue."""
        chosen = {key: SETTINGS[key] for key in ("gap_lr", "validation_tiles")}
        config = TrainConfig(genes=self.genes, **chosen)
        tiles = TrainingTiles(
            [open_section(store) for store in self.stores], Requirements(()), config, regions=REGIONS
        )
        return dict(zip(tiles.panel, (tiles.reference / tiles.depth).tolist(), strict=True))


class Scorer:
    """Super-resolves the blind area and its surroundings on a copy of the section, and scores the blind area.

    Parameters
    ----------
    section
        The section with known counts per bin.
    folder
        Where the copy goes.
    panel
        Genes to score, with their mean counts per 100 um pixel in training.
    """

    def __init__(self, section: Path, folder: Path, panel: dict[str, float]):
        self.store = Path(shutil.copytree(section, folder / section.name))
        self.genes = list(panel)
        hr = open_section(self.store).hr
        bounds = np.asarray(hr.grid.bounds_um)
        grown = np.asarray(BLIND_UM) + MARGIN_UM * np.array([-1, -1, 1, 1])
        self.region = (*np.maximum(grown[:2], bounds[:2]), *np.minimum(grown[2:], bounds[2:]))
        blind = Rectangle.of_um(BLIND_UM, hr.grid)
        self.area = hr.grid.window(blind.top, blind.left, blind.bottom - blind.top, blind.right - blind.left)
        self.truth = hr.read(self.genes, self.area).astype(float)  # (g, y, x)
        self.means = np.array(list(panel.values())) * (hr.grid.bin_um / Requirements(()).lr_um) ** 2

    def baselines(self) -> pd.DataFrame:
        """Maps without training: constant maps, and interpolated spots."""
        flat = np.broadcast_to(self.means[:, None, None], self.truth.shape)
        maps = zip(CONSTANTS, (np.zeros_like(flat), flat), strict=True)
        rows = [self.score(map_).assign(label=label, lr=False, consistency=False) for label, map_ in maps]
        for method in INTERPOLATIONS:
            for consistency in (True, False):
                made = self.superres(method=method, consistency="exact" if consistency else "none")
                rows.append(made.assign(label=method, lr=True, consistency=consistency))
        return pd.concat(rows).assign(seed=0, steps=0, train_seconds=0.0)

    def model(self, model: Path, samples: int) -> pd.DataFrame:
        """A model with and without spots and consistency."""
        rows = []
        for _, lr, consistency in TABLES:
            made = self.superres(
                model=model, samples=samples, use_lr=lr, consistency="exact" if consistency else "none"
            )
            rows.append(made.assign(lr=lr, consistency=consistency))
        return pd.concat(rows)

    def superres(self, **options) -> pd.DataFrame:
        """Scores of a map of the area."""
        made = stsr.superres(
            self.store, genes=self.genes, region=self.region, device="cpu", overwrite=True, **options
        )
        mean = open_section(self.store).map(made.element).read(self.genes, self.area).astype(float)
        return self.score(mean)

    def score(self, prediction: np.ndarray) -> pd.DataFrame:
        """A row per bin size: means over genes."""
        table = metrics.table(prediction, self.truth, self.genes)
        flat = np.array(self.genes)[np.ptp(prediction, axis=(1, 2)) == 0]
        table.loc[table["gene"].isin(flat), ["pcc", "spearman"]] = np.nan  # else the sign of rounding errors
        rows = table.drop(columns="gene").groupby("bin_um").mean().reset_index()
        error, correlation = paper_scores(prediction, self.truth)
        fine = rows["bin_um"] == BINS_UM[0]
        rows.loc[fine, ["paper_rmse", "paper_pcc"]] = [_mean(error), _mean(correlation)]
        return rows.assign(genes=len(self.genes))


def paper_scores(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The papers' RMSE and |PCC| (g,): each gene's map (g, y, x) and its truth scaled by their own minimum and maximum.

    They scale tiles of 2.6 mm; here the whole scored area is one tile. A constant map is scaled to zeros.
    """

    def scaled(maps):
        low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        return np.divide(maps - low, high - low, out=np.zeros_like(maps), where=high > low)

    prediction, truth = scaled(np.array(prediction)), scaled(truth)
    return metrics.rmse(prediction, truth), np.abs(metrics.pearson(prediction, truth))


# ------------------------------------------------------------------------------------------------ what is kept


def remembered(path: Path, key: str, make):
    """The value of a key in a JSON file, computed if missing; other processes wait meanwhile."""
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = json.loads(file.read() or "{}")
        if key not in known:
            known[key] = make()
            file.truncate(0)
            file.write(json.dumps(known, indent=1))
        return known[key]


def append(csv: Path, rows: pd.DataFrame) -> None:
    """Append all rows of a run at once; other processes may write too."""
    columns = ["label", "seed", "genes", "steps", "train_seconds", "lr", "consistency", "bin_um"]
    rows = rows[columns + [name for name in rows if name not in columns]]
    with open(csv, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(rows.to_csv(index=False, header=os.fstat(file.fileno()).st_size == 0))


def is_scored(csv: Path, label: str, seed: int, steps: int, genes: int) -> bool:
    """Whether the rows of a run exist."""
    if not csv.exists():
        return False
    rows = pd.read_csv(csv)[["label", "seed", "steps", "genes"]]
    return bool((rows == [label, seed, steps, genes]).all(axis=1).any())


def seconds_of(model: Path) -> float:
    """How long a training took, from the last line of its log."""
    return json.loads((model.with_suffix(".run") / "log.jsonl").read_text().splitlines()[-1])["seconds"]


# --------------------------------------------------------------------------------------------------- the tables


def print_tables(table: pd.DataFrame) -> None:
    """Markdown: mean over genes and seeds, and the seeds' largest difference from it."""
    ceiling = table.groupby("bin_um")["noise_ceiling"].first()
    print(f"Noise ceiling of PCC: {' / '.join(f'{ceiling[bin_um]:.3f}' for bin_um in BINS_UM)}")
    for title, lr, consistency in TABLES:
        part = table[(table["lr"] == lr) & (table["consistency"] == consistency)]
        part = pd.concat([table[table["label"].isin(CONSTANTS)], part]).drop_duplicates()
        names = [f"PCC {bin_um} µm" for bin_um in BINS_UM] + ["RMSE 10 µm", "paper RMSE", "paper \\|PCC\\|"]
        print(f"\n**{title}**\n\n| method | seeds | steps | train s | " + " | ".join(names) + " |")
        print("|---|" + "---|" * (len(names) + 3))
        for (label, steps), rows in sorted(
            part.groupby(["label", "steps"]), key=lambda item: _place(*item[0])
        ):
            fine = rows[rows["bin_um"] == BINS_UM[0]]
            cells = [_cell(rows.loc[rows["bin_um"] == bin_um, "pcc"]) for bin_um in BINS_UM]
            cells += [_cell(fine[column]) for column in ("rmse", "paper_rmse", "paper_pcc")]
            trained = f"{len(fine)} | {steps} | {fine['train_seconds'].mean():.0f}" if steps else "- | - | -"
            print(f"| {label} | {trained} | " + " | ".join(cells) + " |")


def _place(label: str, steps: int) -> tuple[int, int]:
    """Baselines first, then as listed above."""
    return [*CONSTANTS, *INTERPOLATIONS, *VARIANTS].index(label), steps


def _mean(values: np.ndarray) -> float:
    """Mean over the genes that have a value; nan if none has."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _cell(values: pd.Series) -> str:
    mean = values.mean()
    if np.isnan(mean):
        return "-"
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {(values - mean).abs().max():.3f}"


if __name__ == "__main__":
    main()
