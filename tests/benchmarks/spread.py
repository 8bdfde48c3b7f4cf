"""Fit the spread of a model on maps: python tests/benchmarks/spread.py MODEL OUTPUT --area STORE X0 Y0 X1 Y1

Training fits the spread on whole validation tiles of 600 um. Where few fit into the validation areas, this script
does it on finished maps of areas of any shape that the model was not trained on (`--area` may be repeated). The stores
hold spots from one half of the counts and the other half as ``hr_*um_unseen``: Visium HD sections by `stsr prepare`, or
what `tests/benchmarks/halves.py` makes of a Xenium section. OUTPUT is the model with this spread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import stsr
from stsr import checkpoint
from stsr.spread.fitting import Moments, fit
from stsr.store.section import open_section


def main() -> None:
    """Predict the areas, fit, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--area", nargs=5, action="append", required=True, metavar="VALUE")
    asked = parser.parse_args()
    loaded = checkpoint.load(asked.model)
    panel, bin_um = loaded.method.panel, loaded.method.config.bin_um
    moments = Moments(len(panel))
    for store, *bounds in asked.area:
        add(moments, Path(store), tuple(float(value) for value in bounds), asked.model, panel)
    found = fit(moments, panel, bin_um)
    if found is None:
        sys.exit("nothing to fit the spread to")
    loaded.method.set_dispersion(found)
    for size in (20.0, 40.0, 80.0):
        shared, own = (part.sum() for part in found.of_sums(size))
        print(
            f"{size:g} um: relative variance {shared:.3f} shared, {own:.3f} of a typical gene",
            file=sys.stderr,
        )
    areas = [[Path(store).stem, *map(float, bounds)] for store, *bounds in asked.area]
    provenance = {**loaded.provenance, "spread_from": areas}
    checkpoint.save(asked.output, loaded.method, loaded.name, provenance, "float16")


def add(moments: Moments, store: Path, region: tuple, model: Path, panel: tuple[str, ...]) -> None:
    """Add the errors of a map of an area."""
    section = open_section(store)
    assert section.unseen is not None
    assert section.spots is not None
    genes = [gene for gene in panel if gene in set(section.unseen.genes)]
    made = stsr.superres(
        store,
        model=model,
        genes=genes,
        region=region,
        spots="denoised",
        consistency="none",
        adapt="off",
        name="fitted",
        overwrite=True,
    )
    area = section.unseen.grid.crop_um(*region)
    known = np.isin(np.array(panel, str), np.array(genes, str))
    mean, truth = (np.zeros((len(panel), *area.shape), np.float32) for _ in range(2))
    mean[known] = open_section(store).map(made.element).read(genes, window=area)
    truth[known] = section.unseen.read(genes, window=area)
    density = np.asarray(section.spots.select(panel).mean(0)).ravel() / section.spots.area_um2
    moments.add(mean, truth, density * area.bin_um**2, known, section.divided_from_um / area.bin_um)


if __name__ == "__main__":
    main()
