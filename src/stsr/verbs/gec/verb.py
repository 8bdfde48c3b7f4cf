"""gec(): correlate the genes of a section over its bins or cells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stsr.errors import UsageError
from stsr.genes import genes_of
from stsr.geometry.grid import LR_UM
from stsr.progress import Progress, Report, silent
from stsr.store import catalogue, elements, names
from stsr.store.places import (
    LEAST_PLACES,
    BinPlaces,
    Places,
    Region,
    SpotPlaces,
    bins_of,
    cells_in,
    newest_cells,
    spots_of,
)
from stsr.store.publishing import publish
from stsr.store.section import Section, open_section
from stsr.verbs.gec.agreement import compare, shared_genes
from stsr.verbs.gec.job import TOP, GecJob
from stsr.verbs.gec.table import correlate, known_pair, varying
from stsr.verbs.gec.values import Values, values_of
from stsr.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData

LEVEL = 0.05
"""False discovery rate below which a pair counts as correlated in the summary."""
_BASELINES = ("bilinear", "bicubic", "kriged")


INFERRED = (
    "the counts are inferred: expected counts correlate more strongly than measured ones, and p-values of inferred "
    "counts are no evidence that two genes are related; test measured counts"
)
"""Note on the result of anything that was not measured."""


@dataclass(frozen=True)
class Gec:
    """What `gec` wrote.

    Attributes
    ----------
    store
        The section's store.
    element
        Name of the table (genes, genes): X Pearson, ``layers`` spearman, effective_places, p, q.
    source
        The map or table of cells that was read.
    places, bin_um
        Number of bins or cells, and bin size in um (None for cells).
    genes
        Number of genes.
    correlated
        Number of pairs below a false discovery rate of 5 %, and number of all pairs.
    pairs
        The strongest pairs, one record each.
    truth, agreement
        The measured element, if any, and the distance of each map's matrix from its matrix, one record each.
    seconds
        Run time.
    notes
        Remarks for the user, such as genes that were left out.
    """

    store: Path
    element: str
    source: str
    places: int
    bin_um: float | None
    genes: int
    correlated: tuple[int, int]
    pairs: list[dict]
    truth: str | None
    agreement: list[dict]
    seconds: float
    notes: list[str] = field(default_factory=list)


def gec(
    store: str | Path,
    *,
    source: str | None = None,
    per: str = "bin",
    genes: Sequence[str] | None = None,
    bin_um: float | None = None,
    region: Region | None = None,
    truth: str | None = None,
    beside: Sequence[str] | None = None,
    denoise_truth: bool = False,
    lags: Sequence[tuple[str, str]] = (),
    top: int = TOP,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Gec:
    """Correlate genes over the bins of the support, or over cells, and write the matrices into the store.

    Parameters
    ----------
    store
        Any section with a map of genes or a table of cells.
    source
        Element to read (``--from``): a measured or super-resolved map, or with ``per="cell"`` a table of cells. By
        default the newest super-resolved map, or the newest ``cells_x*``, else ``cells_table``.
    per
        ``bin`` or ``cell``.
    genes
        Names; all genes of the source by default. Genes that do not vary are left out, with a note.
    bin_um
        Bin size to sum the map's bins to first; a multiple of the map's bin size.
    region
        (x0, y0, x1, y1), um: only bins or cells whose centres lie in it.
    truth
        A measured element of the same kind, such as ``hr_10um``. The distance of the matrices from its matrices is
        computed, and also that of ``beside`` and of the spots.
    beside
        Other elements to compare with the truth; the interpolated maps in the store by default.
    denoise_truth
        Also compare with the truth corrected for counting noise.
    lags
        Pairs of genes to compute the correlation by distance for, besides the strongest pairs.
    top
        Number of strongest pairs to list.
    name
        Name of the table; ``gec_x{100 / bin}`` or ``gec_cells`` by default.
    overwrite
        Replace an earlier result of that name.
    progress
        Called with (done, total, label).
    report
        Called with messages for the user.

    Returns
    -------
    Gec
        Its ``element`` in the store is an AnnData (genes, genes); see ``docs/gec.md``.

    Raises
    ------
    UsageError
        For an unknown gene or element, bins that do not nest, or a result that already exists.
    StsrError
        For a section without a map, genes that do not vary, or a store that cannot be written to.
    """
    began = time.monotonic()
    job = GecJob(
        source=source,
        per=per,
        genes=genes,
        bin_um=bin_um,
        region=region,
        truth=truth,
        beside=beside,
        denoise_truth=denoise_truth,
        lags=lags,
        top=top,
        name=name,
        overwrite=overwrite,
    )
    return _run(open_section(store), job, progress or silent, report or silent, began)


def _run(section: Section, job: GecJob, progress: Progress, report: Report, began: float) -> Gec:
    places = _places(section, job)
    element = _free_name(section, job, places)
    others = _others(section, job, places)
    asked = _chosen(places, job.genes)
    values, *layers = values_of([places, *others], asked)
    genes, moments, notes = _varying(values, asked)
    if not names.is_measured_name(places.name):
        notes = [*notes, INFERRED]
    lags = [known_pair(genes, pair) for pair in job.lags]
    shared = shared_genes(genes, layers, job.denoise_truth) if layers else None
    table = correlate(values, places, genes=genes, top=job.top, lags=lags, progress=progress)
    table.obs[["mean", "variance"]] = moments
    if shared is not None:
        compare(table, layers, shared, own=places.name, denoise=job.denoise_truth)
    for note in notes:
        report(note)
    provenance = _provenance(section, job, places, table)
    publish(section.path, {element: _element(section, places, table)}, {element: provenance}, job.overwrite)
    above = table.layers["q"][np.triu_indices(table.n_obs, 1)]
    return Gec(
        store=section.path,
        element=element,
        source=places.name,
        places=places.count,
        bin_um=_bin_um(places),
        genes=table.n_obs,
        correlated=(int((above < LEVEL).sum()), len(above)),
        pairs=table.uns["pairs"].to_dict("records"),
        truth=job.truth,
        agreement=table.uns["agreement"].to_dict("records") if job.truth is not None else [],
        seconds=time.monotonic() - began,
        notes=notes,
    )


def _places(section: Section, job: GecJob) -> Places:
    if job.per == "cell":
        return cells_in(section, job.source or newest_cells(section), job.region)
    source = job.source or section.catalogue.newest_superres()
    places = bins_of(section, source, job.bin_um, job.region)
    if places.count < LEAST_PLACES:
        raise UsageError(
            f"only {places.count} whole bins of {places.grid.bin_um:g} um of {source} lie inside the support; "
            "give a larger --region or a smaller --bin-um"
        )
    return places


def _bin_um(places: Places) -> float | None:
    return places.grid.bin_um if isinstance(places, BinPlaces) else None


def _free_name(section: Section, job: GecJob, places: Places) -> str:
    """The result's name, if it can be written."""
    bin_um = _bin_um(places)
    usual = "gec_cells" if bin_um is None else names.result_name("gec", LR_UM / bin_um)
    element = names.check_name(job.name or usual)
    catalogue.check_free(section.catalogue, [element], job.overwrite)
    return element


def _others(section: Section, job: GecJob, places: Places) -> list[Places | SpotPlaces]:
    """What to compare with at the same places: the truth first, then other maps or cells, then the spots there."""
    if job.truth is None:
        return []
    beside = job.beside
    if beside is None:
        beside = _interpolated(section, places) if isinstance(places, BinPlaces) else []
    wanted = [job.truth, *dict.fromkeys(beside)]
    if places.name in wanted:
        raise UsageError(f"{places.name} cannot be compared with itself; name another --truth or --from")
    found: list[Places | SpotPlaces] = []
    for other in wanted:
        if isinstance(places, BinPlaces):
            found.append(BinPlaces(other, section.map(other), places.grid, places.number))
        else:
            found.append(cells_in(section, other).like(places))
    spots = spots_of(section, places)
    return found if spots is None else [*found, spots]


def _interpolated(section: Section, places: BinPlaces) -> list[str]:
    """Interpolated maps whose bins nest in those of the places and cover them."""
    found = []
    for name in section.catalogue.superres_elements:
        if section.provenance.get(name, {}).get("method") in _BASELINES and name != places.name:
            try:
                BinPlaces(name, section.map(name), places.grid, places.number)
            except UsageError:
                continue
            found.append(name)
    return found


def _chosen(places: Places, genes: Sequence[str] | None) -> list[str]:
    """The requested genes, in the order of the source, which is fastest to read."""
    wanted = set(genes_of(genes, places.genes, places.name))
    return [gene for gene in places.genes if gene in wanted]


def _varying(values: Values, genes: list[str]) -> tuple[list[str], pd.DataFrame, list[str]]:
    """Genes that vary, their moments, and a note about the others."""
    kept, moments = varying(values, genes)
    left = [gene for gene in genes if gene not in moments.index]
    if not left:
        return kept, moments, []
    few = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    return kept, moments, [f"{len(left)} of {len(genes)} genes do not vary here and are left out: {few}"]


def _element(section: Section, places: Places, table: AnnData) -> AnnData:
    """The table as an element.

    Its rows are genes and annotate no instance, but spatial queries of spatialdata 0.7 raise KeyError on a table that
    names no region. So it names the image whose channels the genes are, or for cells any image: queries drop the table
    then, and no plot colours images by tables. Shapes are not suitable: plots by gene name would find two tables.
    """
    kinds = section.elements
    images = sorted(
        (name for name, kind in kinds.items() if kind == "images"), key=lambda name: name != names.HE
    )
    labels = [name for name, kind in kinds.items() if kind == "labels"]
    region = places.name if isinstance(places, BinPlaces) else next(iter([*images, *labels]), None)
    if region is None:
        return elements.free_table(table)
    return elements.annotating(table, region, table.obs_names.to_numpy(dtype=str))


def _provenance(section: Section, job: GecJob, places: Places, table: AnnData) -> dict:
    made = section.provenance.get(places.name, {})
    measured = names.is_measured_name(places.name)
    return {
        "command": "gec",
        "origin": "derived",
        "stsr": __version__,
        "source": places.name,
        "source_written": made.get("written"),
        # Samples of a map are not kept: correlations are those of its mean, which is smoother than any of them.
        "values": "measured counts" if measured else "mean map: expected counts, not samples",
        "per": job.per,
        "bin_um": _bin_um(places),
        "places": places.count,
        "genes": table.n_obs,
        "region_um": job.region,
        "truth": job.truth,
        "units": "correlation, -1 to 1",
        "test": "modified t-test (Clifford, Richardson and Hemon 1989), Benjamini-Hochberg over all pairs",
    }
