"""gec(): which genes go together in a section, written into its store as a table of genes by genes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stsr.errors import UsageError
from stsr.genes import genes_of
from stsr.geometry.grid import LR_UM
from stsr.progress import Progress, Report, silent
from stsr.store import catalogue, elements, names
from stsr.store.gec_places import BinPlaces, CellPlaces, bins_of, cells_of, newest_cells, spots_of
from stsr.store.publishing import publish
from stsr.store.section import Section, open_section
from stsr.verbs.gec.table import compare, correlate, known_pair, shared_genes, varying
from stsr.version import __version__

PLACES = ("bin", "cell")
"""What genes are correlated over."""
LEVEL = 0.05
"""False discovery rate at which a pair counts as correlated in the summary."""
_BASELINES = ("bilinear", "bicubic")


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
        Number of bins or cells, and the size of the bins (None for cells).
    genes
        Number of genes.
    correlated
        Number of pairs at a false discovery rate of 5 %, and of all pairs.
    pairs
        The strongest pairs, a record each.
    truth, agreement
        What was compared with, if anything, and how far each map's matrix is from the measured one, a record each.
    seconds
        Time it took.
    notes
        What the user should know.
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
    region: tuple[float, float, float, float] | None = None,
    truth: str | None = None,
    beside: Sequence[str] | None = None,
    denoise_truth: bool = False,
    lags: Sequence[tuple[str, str]] = (),
    top: int = 100,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Gec:
    """Correlate genes over the tissue's bins, or over cells, and write the matrices into the section.

    Parameters
    ----------
    store
        Any section with a map of genes or a table of cells.
    source
        What to read (``--from``): a map, measured or super-resolved, or with ``per="cell"`` a table of cells. By
        default the newest super-resolved map, or the newest ``cells_x*``, else ``cells_table``.
    per
        ``bin`` or ``cell``.
    genes
        Names; all that the source has by default. Genes that do not vary are left out and noted.
    bin_um
        Bins to add the map's up to first; a multiple of its own.
    region
        (x0, y0, x1, y1), um: places whose centres lie in it.
    truth
        A measured element of the same kind, such as ``hr_10um``: how far the matrices are from its is computed, beside
        those of ``beside`` and of the spots.
    beside
        Other elements to compare with the truth; by default the interpolated maps in the store.
    denoise_truth
        Also compare with the truth's matrix corrected for counting noise.
    lags
        Pairs of genes whose correlation by distance is wanted besides that of the strongest.
    top
        How many of the strongest pairs are listed.
    name
        Name of the table; ``gec_x{100 / bin}`` or ``gec_cells`` by default.
    overwrite
        Replace an earlier result of that name.
    progress
        Called with (done, total, label).
    report
        Called with lines for the user.

    Returns
    -------
    Gec
        Its ``element`` in the store is an AnnData (genes, genes); see ``docs/gec.md``.

    Raises
    ------
    UsageError
        For what this section cannot give: an unknown gene or element, bins that do not nest, a result that exists.
    StsrError
        For a section without a map, or where nothing varies; if the store cannot be written to.
    """
    began = time.monotonic()
    section = open_section(store)
    _check_wishes(per, bin_um, top, truth, beside, denoise_truth)
    places = _places(section, source, per, bin_um, region)
    element = _free_name(section, name, places, overwrite)
    others = _others(section, places, truth, beside)
    genes, moments, notes = _varying(places, _chosen(places, genes))
    lags = [known_pair(genes, pair) for pair in lags]
    shared = shared_genes(genes, others, denoise_truth) if others else None
    table = correlate(places, genes, top, lags, progress or silent)
    table.obs[["mean", "variance"]] = moments
    if shared is not None:
        compare(table, others, shared, places.name, denoise_truth)
    for note in notes:
        (report or silent)(note)
    provenance = _provenance(section, places, table, region, truth)
    publish(section.path, {element: elements.free_table(table)}, {element: provenance}, overwrite)
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
        truth=truth,
        agreement=table.uns["agreement"].to_dict("records") if truth is not None else [],
        seconds=time.monotonic() - began,
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------------- wishes


def _check_wishes(per, bin_um, top, truth, beside, denoise_truth) -> None:
    if per not in PLACES:
        raise UsageError(f"--per {per} is unknown; choose one of {', '.join(PLACES)}")
    if per == "cell" and bin_um is not None:
        raise UsageError("--bin-um is for bins; leave it out with --per cell")
    if top < 1:
        raise UsageError(f"--top must be at least 1, not {top}")
    if truth is None and (denoise_truth or beside):
        option = "--denoise-truth" if denoise_truth else "--beside"
        raise UsageError(f"{option} is about a comparison; name what was measured with --truth hr_10um")


def _places(section: Section, source, per: str, bin_um, region) -> BinPlaces | CellPlaces:
    if per == "cell":
        return cells_of(section, source or newest_cells(section), region)
    return bins_of(section, source or section.catalogue.newest_superres(), bin_um, region)


def _bin_um(places) -> float | None:
    return places.grid.bin_um if isinstance(places, BinPlaces) else None


def _free_name(section: Section, name: str | None, places, overwrite: bool) -> str:
    """The result's name, if it can be written."""
    bin_um = _bin_um(places)
    element = names.check_name(name or ("gec_cells" if bin_um is None else names.gec_name(LR_UM / bin_um)))
    catalogue.check_free(section.path, [element], overwrite)
    return element


def _others(section: Section, places, truth: str | None, beside) -> list:
    """Truth first, then what stands beside at the same places, then the spots there."""
    if truth is None:
        return []
    if beside is None:
        beside = _interpolated(section, places) if isinstance(places, BinPlaces) else []
    wanted = [truth, *dict.fromkeys(beside)]
    if places.name in wanted:
        raise UsageError(f"{places.name} cannot be compared with itself; name another --truth or --from")
    if isinstance(places, BinPlaces):
        found = [BinPlaces(other, section.map(other), places.grid, places.number) for other in wanted]
    else:
        found = [cells_of(section, other, None).like(places) for other in wanted]
    spots = spots_of(section, places)
    return found if spots is None else [*found, spots]


def _interpolated(section: Section, places: BinPlaces) -> list[str]:
    """Maps by interpolation that can stand beside: they nest in the bins and cover them."""
    found = []
    for name in section.catalogue.superres_elements:
        if section.provenance.get(name, {}).get("method") in _BASELINES and name != places.name:
            try:
                BinPlaces(name, section.map(name), places.grid, places.number)
            except UsageError:
                continue
            found.append(name)
    return found


def _chosen(places, genes: Sequence[str] | None) -> list[str]:
    """The genes asked for, in the source's order, which is quickest to read."""
    wanted = set(genes_of(genes, places.genes, places.name))
    return [gene for gene in places.genes if gene in wanted]


def _varying(places, genes: list[str]):
    """Genes that vary, their moments, and notes about the others."""
    kept, moments = varying(places, genes)
    left = [gene for gene in genes if gene not in moments.index]
    few = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
    return (
        kept,
        moments,
        [f"{len(left)} of {len(genes)} genes do not vary here: left out {few}"] if left else [],
    )


def _provenance(section: Section, places, table, region, truth: str | None) -> dict:
    made = section.provenance.get(places.name, {})
    measured = names.is_measured_name(places.name)
    return {
        "command": "gec",
        "origin": "derived",
        "stsr": __version__,
        "source": places.name,
        "source_written": made.get("written"),
        # A map's samples are not kept: correlations are of its mean, which is smoother than any of them.
        "values": "measured counts" if measured else "mean map: expected counts, not samples",
        "per": "bin" if isinstance(places, BinPlaces) else "cell",
        "bin_um": _bin_um(places),
        "places": places.count,
        "genes": table.n_obs,
        "region_um": region,
        "truth": truth,
        "units": "correlation, -1 to 1",
        "test": "modified t-test (Clifford, Richardson and Hemon 1989), Benjamini-Hochberg over all pairs",
    }
