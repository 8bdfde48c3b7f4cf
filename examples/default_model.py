"""Train the packaged default model: python examples/default_model.py DATA [--output FILE] [--set key=value ...]

DATA is a folder with the public 10x Genomics breast cancer block (Janesick et al. 2023): `xenium_same_he`,
`xenium_serial_he` and `section_h5ad`. The lower right quarter of `xenium_same_he` (1 x 1 mm) is held out of training
and validation in all three sections: `tests/benchmarks/heldout.py` scores it.

An interrupted run resumes when the command is run again. Training took about 40 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import stsr

SECTIONS = ("xenium_same_he", "xenium_serial_he", "section_h5ad")

# um, in the coordinates of each section. All three come from one block: the same tissue appears rotated by 90 degrees
# in the serial section, and shifted by (2440, 3300) um in the whole section.
REGIONS = {
    "xenium_same_he": {"exclude": [[1000, 900, 2000, 1900]], "validation": [[0, 0, 600, 600]]},
    "xenium_serial_he": {"exclude": [[100, 1010, 1180, 2110], [1383, 0, 1990, 640]], "validation": []},
    "section_h5ad": {
        "exclude": [[3440, 4200, 4440, 5200], [2440, 3300, 3040, 3900]],
        "validation": [[5000, 500, 5900, 1400]],
    },
}
SETTINGS = {
    "widths": [48, 72, 96],
    "factors": 48,
    "spots": ["square", "visium"],
    "gap_lr": 1,
    "select": "last",
    "storage": "float16",
}
# First the mean; then the residual around it, while the mean is trained further at a lower learning rate.
STAGES = (
    ("mean", {"steps": 2000, "residual_from": 1.0}),
    ("default", {"steps": 400, "residual_from": 0.0, "learning_rate": 4e-4, "residual_tiles": 3}),
)
PROVENANCE = {
    "data": "10x Genomics, FFPE human breast cancer block, Janesick et al. 2023, Nat Commun 14:8353",
    "data_licence": "CC BY 4.0",
    "weights_licence": "BSD-3-Clause; derived from data under CC BY 4.0, keep the attribution",
    "held_out": "xenium_same_he, 1000 900 2000 1900 um",
    "positions": "transcript positions within cells are drawn at random; the source gives cells and their areas",
}


def main() -> None:
    """Prepare the sections, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for prepared sections")
    parser.add_argument("--output", type=Path, default=Path("runs/default.safetensors"))
    parser.add_argument("--method", default="corrdiff")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    stores = [asked.work / f"{name}.zarr" for name in SECTIONS]
    for store in stores:
        if not store.exists():
            stsr.prepare(asked.data / store.stem, store)
    start = None
    for name, stage in STAGES if asked.method == "corrdiff" else STAGES[:1]:
        settings = SETTINGS | {k: v for k, v in stage.items() if asked.method == "corrdiff" or k == "steps"}
        last = name == "default" or asked.method != "corrdiff"
        output = asked.output if last else asked.output.with_name(f"{asked.output.stem}_{name}.safetensors")
        if start is None and output.exists() and not last:
            start = output
            continue
        stsr.train(
            stores,
            output,
            method=asked.method,
            config=settings,
            settings=asked.settings,
            regions=REGIONS,
            seed=asked.seed,
            init=start,
            provenance=PROVENANCE,
            progress=lambda done, total, label: print(f"{100 * done / total:5.1f} %  {label}", flush=True),
        )
        start = output
    print(asked.output)


if __name__ == "__main__":
    main()
