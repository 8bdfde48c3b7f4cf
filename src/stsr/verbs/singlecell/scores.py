"""Scores of counts per cell against measured counts, with the spots alone as baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from stsr import metrics
from stsr.errors import StsrError
from stsr.geometry.grid import Grid, raster_um
from stsr.store import catalogue, discovery, names
from stsr.store.parts import Cells, Spots
from stsr.store.section import Section


@dataclass(frozen=True)
class Measured:
    """Measured counts of some of the cells.

    Parameters
    ----------
    counts
        Raw counts (m, g), csr.
    genes
        Names (g,).
    rows
        Which cells (m,) they belong to.
    """

    counts: sp.csr_matrix
    genes: list[str]
    rows: np.ndarray

    def among(self, kept: np.ndarray) -> Measured:
        """The measured counts after cells that are not ``kept`` (bool per cell) are removed."""
        there = kept[self.rows]
        return Measured(self.counts[there], self.genes, (np.cumsum(kept) - 1)[self.rows[there]])


def measured_counts(section: Section, cells: Cells) -> Measured | None:
    """Measured counts of cells of the store; None if there are none, or they are not raw counts."""
    sdata, element = section.sdata, cells.element
    if element is None or element not in sdata.shapes:
        return None
    results = {name for name, entry in section.provenance.items() if catalogue.is_result(entry)}
    tables = [
        name
        for name, table in sdata.tables.items()
        if name not in results and element in discovery.regions(table)
    ]
    # The table of the section's cells may annotate a sister element, such as the circles of Xenium.
    own = discovery.find_cells(sdata)
    if not tables and own and own[0] == element and own[1] is not None and own[1] not in results:
        tables = [own[1]]
    if not tables:
        return None
    table = names.table_name(element) if names.table_name(element) in tables else tables[0]
    try:
        geometry, rows = discovery.annotated(sdata, element, table)
        counts, genes = discovery.raw_counts(sdata.tables[table], rows, section.path.name)
    except StsrError:
        return None
    place = {name: number for number, name in enumerate(cells.ids)}
    there = np.array([name in place for name in geometry.index])
    return Measured(
        counts[there], genes, np.array([place[name] for name in geometry.index[there]], dtype=int)
    )


# ------------------------------------------------------------------------------------------------- spots alone


def spot_values(spots: Spots, grid: Grid, shares: sp.csr_matrix, genes: Sequence[str]) -> np.ndarray:
    """Counts per cell (n, g) if each spot's counts were spread evenly over the spot and its surroundings."""
    measurement = spots.measurement(grid)
    spot = measurement.nearest.ravel()  # (bins,)
    covered = np.flatnonzero(spot >= 0)
    seen = np.maximum(measurement.bins_seen, measurement.bins_seen.max(initial=1.0))
    density = sp.csr_matrix(
        (1 / seen[spot[covered]], (covered, spot[covered])), (len(spot), measurement.spots)
    )  # (bins, spots)
    return ((shares @ density) @ spots.select(genes)).toarray()


def bilinear_values(spots: Spots, grid: Grid, shares: sp.csr_matrix, genes: Sequence[str]) -> np.ndarray:
    """Counts per cell (n, g) from bilinear interpolation of the spots.

    Raises
    ------
    ValueError
        If the grid is not a whole number of low-resolution pixels.
    """
    lr_um = raster_um(grid.bin_um)
    lr, mask = spots.measurement(grid).raster(spots.select(genes), lr_um)  # (g, h, w), (1, h, w)
    coarse = grid.at(lr_um)
    factor = grid.height // coarse.height
    lines = sp.kron(_linear(coarse.height, factor), _linear(coarse.width, factor), format="csr")
    pixels = lr.reshape(len(genes), -1)[:, _nearest_known(mask[0] > 0)].T  # (pixels, g)
    return ((shares @ lines) @ pixels) / factor**2


def _linear(coarse: int, factor: int) -> sp.csr_matrix:
    """Linear interpolation (coarse x factor, coarse) between centres of coarse pixels, constant beyond the last."""
    fine = np.arange(coarse * factor)
    place = ((fine + 0.5) / factor - 0.5).clip(0, coarse - 1)
    first = np.floor(place).astype(int)
    second = np.minimum(first + 1, coarse - 1)
    weight = place - first
    entries = np.concatenate([1 - weight, weight]), (np.tile(fine, 2), np.concatenate([first, second]))
    return sp.csr_matrix(entries, (len(fine), coarse))


def _nearest_known(known: np.ndarray) -> np.ndarray:
    """Flat index of the nearest measured pixel, for each pixel (h * w,)."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return (rows * known.shape[1] + columns).ravel()


# ------------------------------------------------------------------------------------------------------ scores


def scores(
    counts: dict[str, np.ndarray], truth: np.ndarray, cells: Sequence[str], genes: Sequence[str]
) -> pd.DataFrame:
    """Correlation and error against measured counts, per gene over cells and per cell over genes.

    Parameters
    ----------
    counts
        {method: counts per cell (n, g)}.
    truth
        Measured counts (n, g).
    cells, genes
        Names (n,) and (g,).

    Returns
    -------
    scores
        One row for each gene and each cell: ``of`` ("gene" or "cell"), ``name``, ``counts`` (measured), for genes
        ``noise_ceiling`` (see `metrics.noise_ceiling`), and for each method ``pcc_METHOD`` and ``rmse_METHOD``, counts
        per cell. Correlations with constant values are NaN.
    """
    parts = []
    for of, labels, transposed in (("gene", genes, True), ("cell", cells, False)):
        measured = truth.T if transposed else truth
        columns = {"of": of, "name": list(labels), "counts": measured.sum(1)}
        if transposed:
            columns["noise_ceiling"] = metrics.noise_ceiling(measured)
        for method, values in counts.items():
            found = values.T if transposed else values
            columns[f"pcc_{method}"] = metrics.pearson(found, measured)
            columns[f"rmse_{method}"] = metrics.rmse(found, measured)
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)
