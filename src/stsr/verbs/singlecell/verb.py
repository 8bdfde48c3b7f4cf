"""singlecell(): sum the bins of a map over cells into a table in the section's store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely

from stsr.errors import UsageError
from stsr.files import replacing
from stsr.geometry.grid import Grid, raster_um
from stsr.progress import Progress, Report, silent
from stsr.store import elements, names, publishing
from stsr.store.section import open_section
from stsr.verbs.singlecell.areas import add_up
from stsr.verbs.singlecell.job import Job, Region, Request, make_job
from stsr.verbs.singlecell.scores import Measured, bilinear_values, spot_values
from stsr.verbs.singlecell.scores import scores as scores_of
from stsr.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

_DENSE_FROM = 0.5  # fraction of nonzero counts above which a dense matrix is smaller


@dataclass(frozen=True, kw_only=True)
class SingleCell:
    """What `singlecell` wrote.

    Attributes
    ----------
    store
        The section's store.
    element
        The table (cells, genes).
    annotates
        The shapes or labels that are its cells.
    source
        The map that was summed over cells.
    cells, genes
        Number of cells and genes.
    counts_in_map, counts_in_cells, counts_outside
        Total counts of the map, and how many lie in cells and outside of cells.
    scores
        Scores against measured counts per cell, see `stsr.verbs.singlecell.scores.scores`, or None.
    scored_cells
        Number of cells that were scored.
    seconds
        Run time.
    notes
        Remarks for the user.
    """

    store: Path
    element: str
    annotates: str
    source: str
    cells: int
    genes: int
    counts_in_map: float
    counts_in_cells: float
    counts_outside: float
    scores: pd.DataFrame | None
    scored_cells: int
    seconds: float
    notes: list[str]


def singlecell(
    store: str | Path,
    *,
    source: str | None = None,
    genes: Sequence[str] | None = None,
    including: Sequence[str] = (),
    cells: str | None = None,
    segmentation: str | Path | None = None,
    coordinates: str | None = None,
    segment: bool = False,
    expand_um: float = 5.0,
    name: str | None = None,
    scores: str | Path | None = None,
    score_region: Region | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> SingleCell:
    """Sum the bins of a map over cells, by exact areas, and write a table of cells into the store.

    The counts of a bin are divided between cells by the fraction of its area in each cell. Overlapping areas are split
    evenly between cells, and what lies in no cell is counted as outside. Counts in cells and outside add up to the map.

    Parameters
    ----------
    store
        A section with a map.
    source
        A (gene, y, x) image of counts per bin, inferred or measured; the newest super-resolved map by default.
    genes
        Gene names; all genes of the map by default, or for ``["all"]``.
    including
        Genes that the table must contain, for example to draw them; checked before any work.
    cells
        Shapes or labels of the store; the section's own cells by default.
    segmentation
        A file of cells to import instead; see `stsr.verbs.singlecell.segmentation.imported`.
    coordinates
        Units of that file: ``um`` or ``px``.
    segment
        Segment nuclei on the H&E instead; see `stsr.verbs.singlecell.nuclei.find_nuclei`.
    expand_um
        How far such cells extend beyond their nuclei.
    name
        Name of the table; ``cells_x{scale}`` by default. New shapes are named ``{name}_shapes``.
    scores
        A csv file to write the scores to.
    score_region
        (x0, y0, x1, y1), um: score only cells with their centroid there.
    overwrite
        Replace earlier results of that name.
    progress
        Called with (done, total, label).
    report
        Called with remarks for the user.

    Raises
    ------
    UsageError
        For a map, genes or cells that do not exist, several sources of cells at once, a name that is taken, or scores
        without measured counts.
    StsrError
        For a section without maps or cells, a segmentation that does not match the section, or a store that cannot be
        written to.
    """
    began = time.monotonic()
    request = Request(
        source=source,
        genes=genes,
        including=including,
        cells=cells,
        segmentation=segmentation,
        coordinates=coordinates,
        segment=segment,
        expand_um=expand_um,
        name=name,
        scores=scores,
        score_region=score_region,
        overwrite=overwrite,
    )
    job = make_job(open_section(store), request, progress or silent)
    for note in job.notes:
        (report or silent)(note)
    return _run(job, request, progress or silent, began)


def _run(job: Job, request: Request, progress: Progress, began: float) -> SingleCell:
    counts, outside, totals = add_up(job.bins, job.genes, job.shares, progress)
    spread = _spread(job, progress)
    compared = None if job.measured is None else _scores(job, job.measured, counts, request.score_region)
    facts = {
        "counts_in_map": float(totals.sum()),
        "counts_in_cells": float(counts.sum(dtype=np.float64)),
        "counts_outside": float(outside.sum()),
    }
    made = {job.element: _table(job, counts, spread)}
    if job.new_shapes is not None:
        made = {job.new_shapes: elements.cell_shapes(job.cells.outlines, job.section.frame), **made}
    provenance = {
        "command": "singlecell",
        "origin": "derived",
        "stsr": __version__,
        "from": job.source,
        "cells": job.cells.source,
        "units": "counts per cell",
        "spread": None if spread is None else "added up over bins: an upper bound",
        **facts,
    }
    publishing.publish(job.section.path, made, dict.fromkeys(made, provenance), request.overwrite)
    if request.scores is not None and compared is not None:
        with replacing(request.scores) as temporary:
            compared.to_csv(temporary, index=False, float_format="%.6g")
    return SingleCell(
        store=job.section.path,
        element=job.element,
        annotates=job.annotates,
        source=job.source,
        cells=len(job.cells),
        genes=len(job.genes),
        scores=compared,
        scored_cells=0 if compared is None else int((compared["of"] == "cell").sum()),
        seconds=time.monotonic() - began,
        notes=job.notes,
        **facts,
    )


# ---------------------------------------------------------------------------------------------------- the table


def _spread(job: Job, progress: Progress) -> np.ndarray | None:
    """Standard deviation of the counts (n, g) float32, if the map has one.

    The standard deviations of bins are summed, as if their errors were fully correlated: an upper bound.
    """
    element = names.spread_name(job.source)
    if job.section.elements.get(element) != "images":
        return None
    spread = job.section.map(element)
    if spread.grid != job.bins.grid or not set(job.genes) <= set(spread.genes):
        return None
    return add_up(spread, job.genes, job.shares, progress)[0]


def _table(job: Job, counts: np.ndarray, spread: np.ndarray | None) -> AnnData:
    from anndata import AnnData

    area = shapely.area(job.cells.polygons)
    inside = shapely.area(shapely.intersection(job.cells.polygons, shapely.box(*job.bins.grid.bounds_um)))
    facts = {"area_um2": area, "outside_map": (1 - inside / area * job.supported).clip(0)}
    obs = pd.DataFrame(facts, index=job.cells.ids.astype(str))
    table = AnnData(_compact(counts), obs, pd.DataFrame(index=job.genes))
    table.obsm["spatial"] = job.cells.centres_um
    if spread is not None:
        table.layers[names.SPREAD_LAYER] = _compact(spread)
    return elements.annotating(table, job.annotates, job.cells.ids)


def _compact(counts: np.ndarray) -> np.ndarray | sp.csr_matrix:
    """Dense or sparse, whichever is smaller."""
    return counts if np.count_nonzero(counts) >= _DENSE_FROM * counts.size else sp.csr_matrix(counts)


def _scores(job: Job, measured: Measured, counts: np.ndarray, region: Region | None) -> pd.DataFrame:
    """Score the counts, and the baselines from spots alone, over cells whose centroid lies in the region."""
    grid, spots = job.bins.grid, job.section.spots
    x0, y0, x1, y1 = region or grid.bounds_um
    x, y = job.cells.centres_um[measured.rows].T
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    if not inside.any():
        raise UsageError(
            f"no measured cell lies in {x0:g},{y0:g},{x1:g},{y1:g} um; give another --score-region"
        )
    rows = measured.rows[inside]
    column = {gene: number for number, gene in enumerate(measured.genes)}
    shared = [number for number, gene in enumerate(job.genes) if gene in column]
    if not shared:
        raise UsageError("none of these genes was measured in cells; choose others with --genes")
    genes = [job.genes[number] for number in shared]
    methods = {job.source: counts[np.ix_(rows, shared)]}
    if spots is not None:
        methods["spots"] = spot_values(spots, grid, job.shares[rows], genes)
        if _has_whole_lr_pixels(grid):
            methods["bilinear"] = bilinear_values(spots, grid, job.shares[rows], genes)
    truth = measured.counts[inside][:, [column[gene] for gene in genes]].toarray()
    return scores_of(methods, truth, job.cells.ids[rows].astype(str), genes)


def _has_whole_lr_pixels(grid: Grid) -> bool:
    """Whether the grid is a whole number of low-resolution pixels, as interpolation needs."""
    try:
        grid.at(raster_um(grid.bin_um))
    except ValueError:
        return False
    return True
