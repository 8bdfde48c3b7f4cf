"""The whole workflow on a simulated tissue with known truth: what ``stsr demo`` does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stsr.errors import StsrError, UsageError
from stsr.progress import Progress, Report, silent

if TYPE_CHECKING:
    from stsr.simulate import Tissue

GENES = ("ERBB2", "GATA3", "POSTN", "CD3E")
"""Genes in the figures: markers of tumour, epithelium, activated stroma and T cells."""

_MARK = "stsr-demo.json"  # marks a folder that the demo may replace
_SECTIONS = ("xenium", "visium")
_LEAST_UM, _MOST_UM = 400, 6000
_BIN_UM = 10.0


@dataclass(frozen=True)
class Demonstration:
    """What `demo` made.

    Attributes
    ----------
    folder
        Holds all files.
    stores
        {"xenium": path, "visium": path}: sections with super-resolved maps.
    figures
        One for each section.
    scores
        One row per section, method, gene and bin size; also in ``scores.csv``.
    summary
        Means of ``scores`` over genes; also in ``summary.csv``.
    """

    folder: Path
    stores: dict[str, Path]
    figures: dict[str, Path]
    scores: pd.DataFrame
    summary: pd.DataFrame

    @property
    def files(self) -> list[Path]:
        """Stores, figures and tables."""
        tables = [self.folder / "scores.csv", self.folder / "summary.csv"]
        return [*self.stores.values(), *self.figures.values(), *tables]


def demo(
    output: str | Path = "stsr-demo",
    *,
    size_um: float = 1500.0,
    model: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
    say: Report | None = None,
) -> Demonstration:
    """Simulate a tissue as Xenium and Visium data, super-resolve both and compare the maps with the truth.

    Parameters
    ----------
    output
        Folder for all files; the folder of an earlier demo is replaced.
    size_um
        Side of the tissue, um.
    model
        A checkpoint by `stsr.train`; the packaged model by default.
    seed
        Of the tissue and of the maps.
    device
        See `stsr.superres`.
    progress
        Called with (done, total, label).
    say
        Called with a sentence at the start of each step.

    Raises
    ------
    UsageError
        If ``output`` holds other files, or the size is out of range.
    StsrError
        If ``output`` cannot be written.
    """
    from stsr.simulate import simulate_tissue, write_visium, write_xenium
    from stsr.verbs.prepare.verb import prepare

    tell, progress = say or silent, progress or silent
    folder = _folder(Path(output), size_um, seed)
    tell(f"1/4  simulating {size_um:g} x {size_um:g} um of breast tissue, as Xenium and Visium folders")
    tissue = simulate_tissue(size_um, size_um, seed=seed)
    write_xenium(tissue, folder / "xenium", labels=False, mirror=True, turn_deg=5)
    write_visium(tissue, folder / "visium", seed=seed)
    tell("2/4  stsr prepare: checking, aligning, counting")
    stores = {}
    for name in _SECTIONS:
        stores[name] = prepare(folder / name, folder / f"{name}.zarr", overwrite=True, progress=progress)
    tell("3/4  stsr superres: the model and two baselines")
    scores, figures = [], {}
    for name, store in stores.items():
        maps = _superresolve(store, model, seed, device, progress)
        scores += [_scores(name, label, store, element, tissue) for label, element in maps.items()]
        figures[name] = _figure(store, maps["stsr"], folder / f"{name}.png")
    tell("4/4  comparing with the truth")
    table = pd.concat(scores, ignore_index=True)
    summary = summarise(table)
    table.to_csv(folder / "scores.csv", index=False, float_format="%.5g")
    summary.to_csv(folder / "summary.csv", index=False, float_format="%.5g")
    return Demonstration(folder, stores, figures, table, summary)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Average scores over genes: one row per section, bin size and method, in the order of scoring."""
    keys = ["section", "bin_um", "method"]
    means = scores.drop(columns="gene").groupby(keys, sort=False).mean().reset_index()
    return means.sort_values(["section", "bin_um"], kind="stable", ascending=[False, True], ignore_index=True)


def _folder(folder: Path, size_um: float, seed: int) -> Path:
    """Make the output folder, or clear that of an earlier demo."""
    if not _LEAST_UM <= size_um <= _MOST_UM:
        raise UsageError(
            f"a tissue of {size_um:g} um is too small or too large; give --size-um {_LEAST_UM} to {_MOST_UM}"
        )
    ours = (folder / _MARK).is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} holds files that are not from stsr demo; choose another folder with --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that a demo that was killed can be run again.
        (folder / _MARK).write_text(json.dumps({"size_um": size_um, "seed": seed}))
        for name in _SECTIONS:
            shutil.rmtree(folder / name, ignore_errors=True)
    except OSError as error:
        raise StsrError(
            f"{folder} cannot be written ({error.strerror}); choose another folder with --output"
        ) from None
    return folder


def _superresolve(
    store: Path, model: str | Path | None, seed: int, device: str, progress: Progress
) -> dict[str, str]:
    """Super-resolve a section with the model and with baselines: {label: element}."""
    from stsr.verbs.superres.verb import superres

    def steps(done: float, total: float, label: str) -> None:
        progress(done, total, f"{store.name}: {label}")

    def run(**options: Any) -> str:
        return superres(
            store,
            scale=100 / _BIN_UM,
            overwrite=True,
            seed=seed,
            device=device,
            progress=steps,
            **options,
        ).element

    return {
        "stsr": run(model=model),
        "bicubic + consistency": run(method="bicubic", name="bicubic_x10"),
        "bilinear": run(method="bilinear", name="bilinear_x10", consistency="none"),
    }


def _scores(section: str, label: str, store: Path, element: str, tissue: Tissue) -> pd.DataFrame:
    """Score one map against the simulated transcripts."""
    from stsr.metrics import table
    from stsr.store.section import open_section

    shown = open_section(store).map(element)
    grid = shown.grid
    everything = tissue.counts(grid.bin_um, grid.x0_um, grid.y0_um, grid.width, grid.height)
    place = {gene: number for number, gene in enumerate(tissue.genes)}
    truth = everything[[place[gene] for gene in shown.genes]].astype(np.float64)
    scores = table(shown.read().astype(np.float64), truth, shown.genes, bin_um=grid.bin_um)
    scores.insert(0, "section", section)
    scores.insert(1, "method", label)
    return scores


def _figure(store: Path, element: str, path: Path) -> Path:
    from stsr.figures import superres_figure
    from stsr.store.section import open_section

    section = open_section(store)
    drawn = [gene for gene in GENES if gene in section.map(element).genes]
    return superres_figure(section, element, drawn or section.map(element).genes[:4], path, truth=True)
