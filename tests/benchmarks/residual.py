"""Train a diffusion of the residual around a finished mean: python tests/benchmarks/residual.py DATA MEAN OUTPUT

DATA and its sections are those of `examples/default_model.py`, MEAN is the `unet` that it made. A `corrdiff` starts
from these weights and learns the residual for 400 steps, while the mean is trained further at a lower rate. Then
`tests/benchmarks/halves.py --samples` compares its samples with those of the dispersion that `unet` fits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import stsr
from stsr import checkpoint
from stsr.methods.corrdiff import CorrDiff
from stsr.methods.method import config_dict, configured

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import default_model

SETTINGS = {"steps": 400, "residual_from": 0.0, "learning_rate": 4e-4, "residual_tiles": 3, "select": "last"}


def main() -> None:
    """Make the model to start from, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("mean", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    start = started(asked.mean, asked.output.with_name(f"{asked.output.stem}_start.safetensors"), asked.seed)
    stores = default_model.sections(asked.data, asked.work)
    stsr.train(
        stores,
        asked.output,
        method="corrdiff",
        config=default_model.SETTINGS | SETTINGS | {"genes": default_model.panel(stores)},
        regions=default_model.REGIONS,
        seed=asked.seed,
        init=start,
        progress=lambda done, total, label: print(f"{100 * done / total:5.1f} %  {label}", flush=True),
    )


def started(mean: Path, path: Path, seed: int) -> Path:
    """A `corrdiff` with the mean of a `unet`, and new weights of the denoiser."""
    if path.exists():
        return path
    torch.manual_seed(seed)
    regression = checkpoint.load(mean).method
    method = CorrDiff(configured(CorrDiff.Config, config_dict(regression.config)), regression.panel)
    method.load_state_dict(regression.state_dict(), strict=False)
    return checkpoint.save(path, method, "corrdiff", {})


if __name__ == "__main__":
    main()
