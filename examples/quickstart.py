"""From a vendor folder to maps, a figure and numbers, in Python.

    python examples/quickstart.py visium_run/ GATA3 LUM

Without arguments, it simulates a small tissue first.
"""

import sys
from pathlib import Path

import numpy as np

import stsr
from stsr.figures import superres_figure


def simulated() -> Path:
    """A Space Ranger folder of 800 x 800 um."""
    from stsr.simulate import simulate_tissue, write_visium

    folder = Path("quickstart-visium")
    return folder if folder.exists() else write_visium(simulate_tissue(800, 800, seed=1), folder)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else simulated()
    genes = sys.argv[2:] or ["GATA3", "LUM"]

    store = Path(f"{folder.resolve().name}.zarr")
    if not store.exists():  # preparing it again would drop its maps
        stsr.prepare(folder, store, warn=print)
    made = stsr.superres(store, scale=10, genes=genes, overwrite=True, report=print)

    section = stsr.open_section(store)
    print(f"{section.name}: {section.spots.counts.shape[0]} spots, {len(section.spots.genes)} genes")
    shown = section.map(made.element)
    for gene, counts in zip(genes, shown.read(genes), strict=True):  # (y, x) expected counts per bin
        row, column = np.unravel_index(counts.argmax(), counts.shape)
        x, y = (axis[index] for axis, index in zip(shown.grid.centres_um(), (column, row), strict=True))
        print(f"{gene}: {counts.sum():.0f} counts, most at x {x:.0f} um, y {y:.0f} um")

    print(superres_figure(section, made.element, genes, f"{section.name}.png"))


if __name__ == "__main__":
    main()
