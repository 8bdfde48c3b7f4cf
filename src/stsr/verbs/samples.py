"""samples(): draw maps that could be true, so that sums over bins, cells or regions get an honest spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stsr.diffusion.noise import Noise
from stsr.errors import UsageError
from stsr.genes import wanted_genes
from stsr.geometry.grid import Grid
from stsr.spread.dispersion import Dispersion
from stsr.spread.drawing import drawn_rates
from stsr.store import names
from stsr.store.section import Section, open_section

if TYPE_CHECKING:
    import xarray

_GENES_AT_ONCE = 16  # bounds the memory of a draw


def samples(
    store: str | Path | Section,
    element: str | None = None,
    n: int = 20,
    region: tuple[float, float, float, float] | None = None,
    *,
    genes: Sequence[str] | None = None,
    counts: bool = True,
    seed: int | None = None,
) -> xarray.DataArray:
    """Draw samples of a map, with errors that are correlated between bins and genes.

    Add up bins, cells or genes first, then take the spread over samples: errors of neighbouring bins are similar, so
    the spread of a sum does not follow from those of its bins. Samples come from the dispersion that the model's errors
    had on validation tissue (`stsr.spread.dispersion`), or are those that ``superres --keep-samples`` wrote.

    Parameters
    ----------
    store
        A section with a map by `stsr.superres`.
    element
        The map; the newest one by default.
    n
        Number of samples.
    region
        (x0, y0, x1, y1), um: bins that touch it; all by default.
    genes
        Names, comma lists or ``all``; all genes of the map by default.
    counts
        True draws the counts that an instrument as sensitive as the spots would measure. False draws the expected
        counts, without counting noise.
    seed
        By default that of the map. The same seed gives the same samples, and a region those of the whole map, up to
        counting noise.

    Returns
    -------
    xarray.DataArray
        (sample, c, y, x) float32 counts per bin, with gene names and the bins' centres in um as coordinates.

    Raises
    ------
    UsageError
        If the map does not exist, has no spread, lacks a gene, or keeps fewer samples.
    """
    import xarray

    section = store if isinstance(store, Section) else open_section(store)
    element = section.catalogue.newest_superres() if element is None else element
    made = section.provenance.get(element, {})
    found = section.map(element)
    chosen = wanted_genes(genes, found.genes, found.genes)
    window = found.grid if region is None else _window(found.grid, region)
    seed = int(made.get("seed", 0)) if seed is None else seed
    if n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    if int(made.get("samples_kept", 0)):
        drawn = _kept(section, element, made, n, chosen, window)
    else:
        drawn = _drawn(section, element, n, chosen, window, seed)
    if counts:
        rng = np.random.default_rng([seed, 3])
        for number in range(n):
            drawn[number] = rng.poisson(drawn[number])
    x, y = window.centres_um()
    return xarray.DataArray(
        drawn,
        dims=("sample", "c", "y", "x"),
        coords={"c": chosen, "y": y, "x": x},
        name=element,
        attrs={"units": "counts per bin" if counts else "expected counts per bin", "bin_um": window.bin_um},
    )


def _window(grid: Grid, region: tuple[float, float, float, float]) -> Grid:
    """The bins of a map that touch a region."""
    x0, y0, x1, y1 = region
    left, top, right, bottom = grid.bounds_um
    bin_um = grid.bin_um
    first_row, first_column = int(np.floor((y0 - top) / bin_um)), int(np.floor((x0 - left) / bin_um))
    last_row, last_column = int(np.ceil((y1 - top) / bin_um)), int(np.ceil((x1 - left) / bin_um))
    row, column = max(first_row, 0), max(first_column, 0)
    height, width = min(last_row, grid.height) - row, min(last_column, grid.width) - column
    if height < 1 or width < 1:
        raise UsageError(
            f"no bin of the map lies in the region; it spans {left:g} {top:g} {right:g} {bottom:g} um"
        )
    return grid.window(row, column, height, width)


def _kept(
    section: Section, element: str, made: dict[str, Any], n: int, genes: list[str], window: Grid
) -> np.ndarray:
    """Samples (n, g, y, x) that were written with the map."""
    there = int(made["samples_kept"])
    if n > there:
        raise UsageError(
            f"{element} keeps {there} samples, not {n}; ask for fewer, or make it with --samples {n}"
        )
    stored = (section.map(names.sample_name(element, 1 + number)) for number in range(n))
    return np.stack([one.read(genes, window=window) for one in stored]).astype(np.float32)


def _drawn(section: Section, element: str, n: int, genes: list[str], window: Grid, seed: int) -> np.ndarray:
    """Samples (n, g, y, x) from the dispersion around the map."""
    spread = names.spread_name(element)
    dispersion = section.provenance.get(spread, {}).get("dispersion")
    if dispersion is None or spread not in section.elements:
        raise UsageError(
            f"{element} has no spread from which samples follow; make it again with a model that has one, or with "
            "--keep-samples"
        )
    model = Dispersion.from_json(dispersion)
    mean, sd = section.map(element), section.map(spread)
    corner = section.grid(window.bin_um).offset_of(window)
    out = np.empty((n, len(genes), *window.shape), np.float32)
    for start in range(0, len(genes), _GENES_AT_ONCE):
        part = genes[start : start + _GENES_AT_ONCE]
        maps = [values.read(part, window=window).astype(np.float32) for values in (mean, sd)]
        for number in range(n):
            out[number, start : start + len(part)] = drawn_rates(
                maps[0], maps[1], part, model, bin_um=window.bin_um, corner=corner, noise=Noise(seed, number)
            )
    return out
