"""celltype(): assign a cell type to each bin or cell of a section."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stsr.errors import StsrError
from stsr.progress import Progress, Report, silent
from stsr.store import catalogue
from stsr.store.places import Places, bins_of, cells_of, newest_cells
from stsr.store.publishing import publish
from stsr.store.section import Section, open_section
from stsr.verbs.celltype import model
from stsr.verbs.celltype.job import MIN_COUNTS, MIN_PROBABILITY, CelltypeJob
from stsr.verbs.celltype.learning import Fit, Learned, fit, learn
from stsr.verbs.celltype.results import Typed, result_names
from stsr.version import __version__


@dataclass(frozen=True)
class Celltypes:
    """What `celltype` wrote.

    Attributes
    ----------
    store
        The section's store.
    element
        The labels (bins) or the table (cells).
    tables
        Names of the tables that go with the labels: one row per type, one row per bin.
    source
        The map or table that was read.
    types
        {type: number of bins or cells}, in the order of the label codes 1, 2, ...
    unassigned
        Number of bins or cells without a type.
    genes
        Number of genes used.
    confidence
        Mean confidence of the assigned bins or cells; None if the standard deviation of the counts is not known.
    seconds
        Run time.
    notes
        Remarks for the user, such as genes that were left out.
    """

    store: Path
    element: str
    tables: list[str]
    source: str
    types: dict[str, int]
    unassigned: int
    genes: int
    confidence: float | None
    seconds: float
    notes: list[str]


def celltype(
    store: str | Path,
    *,
    markers: str | Path | None = None,
    reference: str | Path | None = None,
    label_key: str | None = None,
    source: str | None = None,
    per: str = "bin",
    min_probability: float = MIN_PROBABILITY,
    min_counts: float = MIN_COUNTS,
    draws: int = 10,
    resolution: float = 1.0,
    name: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Celltypes:
    """Assign a cell type to each bin or cell, and write the result into the store.

    Counts are modelled as a Poisson mixture of cell type signatures (`stsr.verbs.celltype.model`): those of a
    reference, corrected for platform effects; flat ones over marker genes; or, with neither, the profiles of Leiden
    clusters.

    Parameters
    ----------
    store
        A section with a map, or for ``per="cell"`` a table of cells x genes.
    markers
        Marker genes: csv (type, gene), gmt or json ({type: [genes]}).
    reference
        Labelled single cells with raw counts (h5ad), or a table of genes x types.
    label_key
        Column of the h5ad's ``obs`` with the types.
    source
        Map (or table, for cells) to read; by default the newest by `superres` (by `singlecell`, else
        ``cells_table``).
    per
        ``"bin"`` or ``"cell"``.
    min_probability, min_counts
        Unassigned are places whose largest share is below the first, or whose (expected) counts of the genes used are
        below the second.
    draws
        Redraws of the counts for the confidence; 0 for none.
    resolution
        Of the Leiden clusters: larger values give more clusters.
    name
        Name of the result; by default ``celltype_x{scale}``, with ``_cells`` for cells.
    seed
        Of redraws and clusters.
    overwrite
        Replace an earlier result of that name.
    progress
        Called with (done, total, label).
    report
        Called with messages for the user.

    Raises
    ------
    UsageError
        For an unusable file, a missing source, or too few shared genes.
    StsrError
        For a section without a map or supported bins, or a store that cannot be written to.
    """
    began = time.monotonic()
    job = CelltypeJob(
        markers=markers,
        reference=reference,
        label_key=label_key,
        source=source,
        per=per,
        min_probability=min_probability,
        min_counts=min_counts,
        draws=draws,
        resolution=resolution,
        name=name,
        seed=seed,
        overwrite=overwrite,
    )
    return _run(open_section(store), job, progress or silent, report or silent, began)


def _run(section: Section, job: CelltypeJob, progress: Progress, report: Report, began: float) -> Celltypes:
    places = _places(section, job)
    outputs = result_names(places, job.name)
    catalogue.check_free(section.catalogue, outputs, job.overwrite)
    learned = learn(places, job)
    signatures = learned.signatures
    for note in signatures.notes:
        report(note)
    found = fit(places, learned, draws=job.draws, seed=job.seed, progress=progress)
    codes = model.assign(found.shares, found.counts, job.min_probability, job.min_counts)
    made = Typed(places, learned, found, codes).elements(outputs, section.frame)
    provenance = _provenance(section, job, places, learned, found)
    publish(section.path, made, dict.fromkeys(made, provenance), job.overwrite)
    numbers = np.bincount(codes, minlength=len(signatures.types) + 1)
    assigned = np.zeros(0) if found.confidence is None else found.confidence[codes > 0]
    return Celltypes(
        store=section.path,
        element=outputs[0],
        tables=outputs[1:3],
        source=places.name,
        types=dict(zip(signatures.types, numbers[1:].tolist(), strict=True)),
        unassigned=int(numbers[0]),
        genes=len(signatures.genes),
        confidence=float(assigned.mean()) if len(assigned) else None,
        seconds=time.monotonic() - began,
        notes=signatures.notes,
    )


def _places(section: Section, job: CelltypeJob) -> Places:
    if job.per == "cell":
        return cells_of(section, job.source or newest_cells(section))
    places = bins_of(section, job.source or section.catalogue.newest_superres())
    if not places.count:
        raise StsrError(
            f"{places.name!r} in {section.path.name} has no bin inside the support; prepare the section again"
        )
    return places


def _provenance(section: Section, job: CelltypeJob, places: Places, learned: Learned, found: Fit) -> dict:
    return {
        "command": "celltype",
        "origin": "predicted",
        "stsr": __version__,
        "source": places.name,
        "source_written": section.provenance.get(places.name, {}).get("written"),
        **job.signature_source(),
        "genes": len(learned.signatures.genes),
        "types": learned.signatures.types,
        "min_probability": job.min_probability,
        "min_counts": job.min_counts,
        "uncertainty": None if found.confidence is None else places.uncertainty,
        "draws": 0 if found.confidence is None else job.draws,
        "seed": job.seed,
        "units": "share of the counts of a bin or cell",
    }
