"""Train the packaged default model: python examples/default_model.py DATA [--output FILE] [--set key=value ...]

DATA is a folder with public data of 10x Genomics: `breast` with one breast cancer block (Janesick et al. 2023:
`xenium_same_he`, `xenium_serial_he` and `section_h5ad`), and `kidney/visium_hd`, a kidney with its H&E. Two areas are
held out of training and validation: the lower right quarter of `xenium_same_he` (1 x 1 mm), in all three sections of
that block, which `tests/benchmarks/heldout.py` scores, and the right 2 mm of the kidney
(`tests/benchmarks/kidney.py`).

An interrupted run resumes when the command is run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import stsr
from stsr.store.section import open_section

BREAST = ("xenium_same_he", "xenium_serial_he", "section_h5ad")
KIDNEY = "visium_hd"
KIDNEY_GENES = 400  # the most counted outside the part that is held out, beside the panel of the breast

# um, in the coordinates of each section. The sections of the breast come from one block: the same tissue appears
# rotated by 90 degrees in the serial section, and shifted by (2440, 3300) um in the whole section.
REGIONS = {
    "xenium_same_he": {"exclude": [[1000, 900, 2000, 1900]], "validation": [[0, 0, 700, 700]]},
    "xenium_serial_he": {"exclude": [[100, 1010, 1180, 2110], [1383, 0, 1990, 640]], "validation": []},
    "section_h5ad": {
        "exclude": [[3440, 4200, 4440, 5200], [2440, 3300, 3040, 3900]],
        "validation": [[5000, 500, 5900, 1400]],
    },
    "visium_hd": {"exclude": [[4800, 0, 6700, 3700]], "validation": [[3800, 0, 4400, 1200]]},
}
SETTINGS = {
    "steps": 4000,
    "widths": [48, 72, 96],
    "factors": 64,
    "genes_per_step": 200,
    "image_um": 2.0,
    "views": 1,
    "gap_lr": 1,
    "spots": ["square", "visium"],
    "spot_counts": 1000,
    "denoised": 0.5,
    "coarse": 0.2,
    "validate_every": 250,
    "storage": "float16",
    "spread_from": ["xenium_same_he", "visium_hd"],  # the whole section holds a random part of its cells
}
PROVENANCE = {
    "data": "10x Genomics: FFPE human breast cancer block, Janesick et al. 2023, Nat Commun 14:8353; "
    "FFPE human kidney, Visium HD",
    "data_licence": "CC BY 4.0",
    "weights_licence": "BSD-3-Clause; derived from data under CC BY 4.0, keep the attribution",
    "held_out": "xenium_same_he, 1000 900 2000 1900 um; visium_hd, 4800 0 6700 3700 um",
    "positions": "transcript positions within cells of the breast are drawn at random; the source gives cells and "
    "their areas",
}


def main() -> None:
    """Prepare the sections, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for prepared sections")
    parser.add_argument("--output", type=Path, default=Path("runs/default.safetensors"))
    parser.add_argument("--method", default="unet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    stores = sections(asked.data, asked.work)
    stsr.train(
        stores,
        asked.output,
        method=asked.method,
        config={**SETTINGS, "genes": panel(stores)},
        settings=asked.settings,
        regions=REGIONS,
        seed=asked.seed,
        provenance=PROVENANCE,
        progress=lambda done, total, label: print(f"{100 * done / total:5.1f} %  {label}", flush=True),
    )
    print(asked.output)


def sections(data: Path, work: Path) -> list[Path]:
    """The stores of the breast and of the kidney, prepared if they are not there."""
    breast = [prepared(data / "breast" / name, work, organ="breast") for name in BREAST]
    return [*breast, prepared(data / "kidney" / KIDNEY, work, organ="kidney", spots="visium")]


def prepared(folder: Path, work: Path, *, organ: str, spots: str | None = None) -> Path:
    """The store of a section, prepared if it is not there."""
    store = work / f"{folder.name}.zarr"
    if not store.exists():
        stsr.prepare(folder, store, organ=organ, spots=spots)
    return store


def panel(stores: list[Path]) -> list[str]:
    """The genes of the Xenium sections, and those that the kidney has most of outside its held-out part."""
    hr, spots = open_section(stores[0]).hr, open_section(stores[-1]).spots
    assert hr is not None
    assert spots is not None
    (x0, y0, x1, y1), (x, y) = REGIONS[KIDNEY]["exclude"][0], spots.centres_um.T
    totals = np.asarray(spots.counts[(x < x0) | (x > x1) | (y < y0) | (y > y1)].sum(0)).ravel()
    order = (spots.genes[index] for index in np.argsort(-totals, kind="stable"))
    nuclear = [gene for gene in order if not gene.startswith("MT-")]
    return list(dict.fromkeys([*hr.genes, *nuclear[:KIDNEY_GENES]]))


if __name__ == "__main__":
    main()
