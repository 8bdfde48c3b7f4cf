"""singlecell(): sum the bins of a map over cells into a table in the section's store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
import shapely

from stsr.errors import StsrError, UsageError
from stsr.files import replacing
from stsr.genes import genes_of
from stsr.geometry.grid import LR_UM, Grid
from stsr.progress import Progress, Report, silent
from stsr.store import catalogue, elements, names, publishing
from stsr.store.parts import Cells, Map
from stsr.store.section import Section, open_section
from stsr.verbs.singlecell import areas
from stsr.verbs.singlecell.nuclei import DOUBTFUL_UM_PER_PX, find_nuclei
from stsr.verbs.singlecell.scores import Measured, bilinear_values, measured_counts, spot_values
from stsr.verbs.singlecell.scores import scores as scores_of
from stsr.verbs.singlecell.segmentation import imported, stored
from stsr.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

SPREAD = "sd"
"""Layer of the table with the standard deviation of each count over samples of the model."""

_DENSE_FROM = 0.5  # fraction of nonzero counts above which a dense matrix is smaller

Region = tuple[float, float, float, float]


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


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the user asked for; see `singlecell`."""

    source: str | None
    genes: Sequence[str] | None
    including: Sequence[str]
    cells: str | None
    segmentation: str | Path | None
    coordinates: str | None
    segment: bool
    expand_um: float
    name: str | None
    scores: str | Path | None
    score_region: Region | None
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything decided and checked before bins are summed."""

    section: Section
    source: str
    bins: Map
    genes: list[str]
    element: str
    new_shapes: str | None
    cells: Cells
    shares: sp.csr_matrix  # (cells, bins)
    supported: np.ndarray  # (cells,) fraction of each cell's area on the map where the map is supported
    measured: Measured | None
    notes: list[str] = field(default_factory=list)

    @property
    def annotates(self) -> str:
        """The shapes or labels that the table annotates."""
        name = self.new_shapes or self.cells.element
        assert name is not None
        return name


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
    request = _Request(
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
    job = _job(open_section(store), request, progress or silent)
    for note in job.notes:
        (report or silent)(note)
    return _run(job, request, progress or silent, began)


def _job(section: Section, request: _Request, progress: Progress) -> _Job:
    source = _source(section, request.source)
    bins = section.map(source)
    genes = _genes(request, bins.genes, source)
    element = names.check_name(request.name or names.cells_name(LR_UM / bins.grid.bin_um))
    is_new = request.segmentation is not None or request.segment
    if sum([request.cells is not None, request.segmentation is not None, request.segment]) > 1:
        raise UsageError("--cells, --segmentation and --segment exclude each other; give only one of them")
    new_shapes = f"{element}_shapes" if is_new else None
    catalogue.check_free(section.path, [element, new_shapes] if new_shapes else [element], request.overwrite)
    notes: list[str] = []
    cells = _find_cells(section, bins.grid, request, progress, notes)
    measured = measured_counts(section, cells)
    _check_scores(request, measured)
    job = _Job(
        section=section,
        source=source,
        bins=bins,
        genes=genes,
        element=element,
        new_shapes=new_shapes,
        cells=cells,
        shares=areas.shares(cells.polygons, bins.grid),
        supported=np.ones(len(cells)),
        measured=measured,
        notes=notes,
    )
    return _with_support(_on_the_map(job))


def _run(job: _Job, request: _Request, progress: Progress, began: float) -> SingleCell:
    counts, outside, totals = areas.add_up(job.bins, job.genes, job.shares, progress)
    spread = _spread(job, progress)
    compared = None if job.measured is None else _compare(job, job.measured, counts, request.score_region)
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


# ---------------------------------------------------------------------------------------- decided before the work


def _source(section: Section, asked: str | None) -> str:
    """The map to read."""
    if asked is None:
        try:
            return section.catalogue.newest_superres()
        except StsrError as error:
            measured = section.catalogue.hr_elements
            raise StsrError(f"{error}, or add --from {measured[0]}" if measured else str(error)) from None
    spread_of = asked.removesuffix(names.spread_name(""))
    if spread_of != asked and spread_of in section.elements:
        raise UsageError(f"{asked!r} holds standard deviations of a map, not counts; give --from {spread_of}")
    if section.map(asked).genes == ["r", "g", "b"]:
        raise UsageError(f"{asked!r} is an RGB image, not counts of genes per bin; name a map with --from")
    return asked


def _genes(request: _Request, available: list[str], source: str) -> list[str]:
    chosen = genes_of(request.genes, available, source)
    genes_of(request.including, available, source)
    missing = set(request.including) - set(chosen)
    if missing:
        raise UsageError(
            f"{min(missing)!r} is not among the {len(chosen)} genes of this table; add it to --genes"
        )
    return chosen


def _find_cells(
    section: Section, grid: Grid, request: _Request, progress: Progress, notes: list[str]
) -> Cells:
    if request.segment:
        if section.image is None:
            raise StsrError(
                f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE, or import cells "
                f"with --segmentation FILE"
            )
        found = find_nuclei(section.image, _extent(section, grid), request.expand_um, progress)
        if section.image.um_per_px > DOUBTFUL_UM_PER_PX:
            notes.append(
                f"at {section.image.um_per_px:.2g} um per pixel many nuclei are missed or merged; use an image of "
                f"{DOUBTFUL_UM_PER_PX:g} um per pixel or finer"
            )
    elif request.segmentation is not None:
        found = imported(request.segmentation, section, _extent(section, grid), request.coordinates)
    else:
        return stored(section, request.cells)
    diameter = np.median(2 * np.sqrt(shapely.area(found.polygons) / np.pi))
    notes.append(f"{len(found):,} cells ({found.source}), median diameter {diameter:.1f} um")
    return found


def _extent(section: Section, grid: Grid) -> Region:
    """Extent of the section; of the map if the section has neither spots nor an image."""
    try:
        return section.extent_um
    except StsrError:
        return grid.bounds_um


def _check_scores(request: _Request, measured: Measured | None) -> None:
    """Refuse scores without measured counts, and a file that cannot be written."""
    if measured is None and (request.scores is not None or request.score_region is not None):
        raise UsageError(
            "there are no measured counts of these cells to score against; leave out --scores and --score-region"
        )
    if request.scores is not None:
        folder = Path(request.scores).resolve().parent
        if Path(request.scores).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"no file can be written at {request.scores}; choose another path for --scores")


def _on_the_map(job: _Job) -> _Job:
    """Drop cells beyond the map: nothing is known of them, which is not a count of 0."""
    kept = np.asarray(job.shares.sum(1)).ravel() > 0
    if not kept.any():
        raise StsrError(
            f"no cell lies on {job.source}; choose another map with --from, or other cells with --cells"
        )
    if kept.all():
        return job
    return replace(
        job,
        cells=job.cells.take(kept),
        shares=job.shares[kept],
        supported=job.supported[kept],
        measured=None if job.measured is None else job.measured.among(kept),
        notes=[*job.notes, f"{(~kept).sum():,} cells lie outside of {job.source} and are left out"],
    )


def _with_support(job: _Job) -> _Job:
    """Find out how much of each cell lies where a predicted map is supported; measured maps are, everywhere."""
    if not catalogue.is_result(job.section.provenance.get(job.source, {})):
        return job
    bins = job.section.support(job.bins.grid).ravel().astype(np.float64)
    supported = (job.shares @ bins) / (job.shares @ np.ones(len(bins)))
    notes, outside = job.notes, int((supported == 0).sum())
    if outside:
        notes = [
            *notes,
            f"{outside:,} cells lie entirely outside the support of {job.source} (H&E, tissue and spots nearby): their "
            f"counts are not meaningful",
        ]
    return replace(job, supported=supported, notes=notes)


# ---------------------------------------------------------------------------------------------------- the table


def _spread(job: _Job, progress: Progress) -> np.ndarray | None:
    """Standard deviation of the counts (n, g) float32, if the map has one.

    The standard deviations of bins are summed, as if their errors were fully correlated: an upper bound.
    """
    element = names.spread_name(job.source)
    if job.section.elements.get(element) != "images":
        return None
    spread = job.section.map(element)
    if spread.grid != job.bins.grid or not set(job.genes) <= set(spread.genes):
        return None
    return areas.add_up(spread, job.genes, job.shares, progress)[0]


def _table(job: _Job, counts: np.ndarray, spread: np.ndarray | None) -> AnnData:
    from anndata import AnnData

    area = shapely.area(job.cells.polygons)
    inside = shapely.area(shapely.intersection(job.cells.polygons, shapely.box(*job.bins.grid.bounds_um)))
    facts = {"area_um2": area, "outside_map": (1 - inside / area * job.supported).clip(0)}
    obs = pd.DataFrame(facts, index=job.cells.ids.astype(str))
    table = AnnData(_compact(counts), obs, pd.DataFrame(index=job.genes))
    table.obsm["spatial"] = job.cells.centres_um
    if spread is not None:
        table.layers[SPREAD] = _compact(spread)
    return elements.annotating(table, job.annotates, job.cells.ids)


def _compact(counts: np.ndarray) -> np.ndarray | sp.csr_matrix:
    """Dense or sparse, whichever is smaller."""
    return counts if np.count_nonzero(counts) >= _DENSE_FROM * counts.size else sp.csr_matrix(counts)


# ------------------------------------------------------------------------------------------------------- scores


def _compare(job: _Job, measured: Measured, counts: np.ndarray, region: Region | None) -> pd.DataFrame:
    """Score the counts, and what the spots alone would give, over cells whose centroid lies in the region."""
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
        grid.at(LR_UM)
    except ValueError:
        return False
    return True
