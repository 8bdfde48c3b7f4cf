"""One run of singlecell, decided and checked before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import shapely

from stsr.errors import StsrError, UsageError
from stsr.genes import genes_of
from stsr.geometry.grid import LR_UM, Grid
from stsr.progress import Progress
from stsr.store import catalogue, names
from stsr.store.parts import Cells, Map
from stsr.store.places import Region
from stsr.store.section import Section
from stsr.verbs.singlecell.areas import shares
from stsr.verbs.singlecell.nuclei import DOUBTFUL_UM_PER_PX, find_nuclei
from stsr.verbs.singlecell.scores import Measured, measured_counts
from stsr.verbs.singlecell.segmentation import imported, stored


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of one run; `stsr.singlecell` describes them."""

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
class Job:
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


def make_job(section: Section, request: Request, progress: Progress) -> Job:
    """Decide and check everything; parameters and errors are those of `stsr.singlecell`.

    Raises
    ------
    UsageError, StsrError
        As `stsr.singlecell`.
    """
    source = _source(section, request.source)
    bins = section.map(source)
    genes = _genes(request, bins.genes, source)
    element = names.check_name(request.name or names.result_name("cells", LR_UM / bins.grid.bin_um))
    is_new = request.segmentation is not None or request.segment
    if sum([request.cells is not None, request.segmentation is not None, request.segment]) > 1:
        raise UsageError("--cells, --segmentation and --segment exclude each other; give only one of them")
    new_shapes = f"{element}_shapes" if is_new else None
    catalogue.check_free(
        section.catalogue, [element, new_shapes] if new_shapes else [element], request.overwrite
    )
    notes: list[str] = []
    cells = _find_cells(section, bins.grid, request, progress, notes)
    measured = measured_counts(section, cells)
    _check_scores(request, measured)
    job = Job(
        section=section,
        source=source,
        bins=bins,
        genes=genes,
        element=element,
        new_shapes=new_shapes,
        cells=cells,
        shares=shares(cells.polygons, bins.grid),
        supported=np.ones(len(cells)),
        measured=measured,
        notes=notes,
    )
    return _with_support(_on_the_map(job))


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


def _genes(request: Request, available: list[str], source: str) -> list[str]:
    chosen = genes_of(request.genes, available, source)
    genes_of(request.including, available, source)
    missing = set(request.including) - set(chosen)
    if missing:
        raise UsageError(
            f"{min(missing)!r} is not among the {len(chosen)} genes of this table; add it to --genes"
        )
    return chosen


def _find_cells(
    section: Section, grid: Grid, request: Request, progress: Progress, notes: list[str]
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


def _check_scores(request: Request, measured: Measured | None) -> None:
    """Refuse scores without measured counts, and a file that cannot be written."""
    if measured is None and (request.scores is not None or request.score_region is not None):
        raise UsageError(
            "there are no measured counts of these cells to score against; leave out --scores and --score-region"
        )
    if request.scores is not None:
        folder = Path(request.scores).resolve().parent
        if Path(request.scores).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"no file can be written at {request.scores}; choose another path for --scores")


def _on_the_map(job: Job) -> Job:
    """Drop cells beyond the map: their counts are unknown, not 0."""
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


def _with_support(job: Job) -> Job:
    """Find the fraction of each cell inside the support of a predicted map; measured maps are valid everywhere."""
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
