"""celltype(): from a section's counts to where cell types are."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stsr.errors import StsrError, UsageError
from stsr.progress import Progress, Report, silent
from stsr.store import catalogue, elements, names
from stsr.store.places import Bins, Cells, newest_cells
from stsr.store.publishing import publish
from stsr.store.section import Section, open_section
from stsr.verbs.celltype import model
from stsr.verbs.celltype.learning import (
    Fit,
    Learned,
    fit,
    learn_clusters,
    learn_markers,
    learn_reference,
)
from stsr.verbs.celltype.model import UNASSIGNED
from stsr.version import __version__

MIN_PROBABILITY = 0.3
MIN_COUNTS = 5.0


@dataclass(frozen=True)
class Celltypes:
    """What `celltype` wrote.

    Attributes
    ----------
    store
        The section's store.
    element
        The labels (bins), or the table (cells).
    tables
        Names of the tables beside it: of the types, of the bins.
    source
        The map or table that was read.
    types
        {type: number of bins or cells}, in the order of the labels' codes 1, 2, ...
    unassigned
        Number of bins or cells without a type.
    genes
        Number of genes that were used.
    confidence
        Mean confidence of what was assigned; None where nobody knows the spread of the counts.
    seconds
        Time it took.
    notes
        What the user should know.
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
    """Say of each bin, or each cell, which type its transcripts are of, and write that into the store.

    Counts are a Poisson mixture of signatures (`stsr.verbs.celltype.model`): those of a reference, times the platform's
    effect on each gene; flat ones over marker genes; or, with neither, the profiles of Leiden clusters.

    Parameters
    ----------
    store
        A section with a map, or for ``per="cell"`` a table of cells x genes.
    markers
        csv (type, gene), gmt or json ({type: [genes]}): each type gets the transcripts of its markers.
    reference
        Labelled cells with raw counts (h5ad), or a table of genes x types.
    label_key
        Column of the h5ad's ``obs`` that holds the types.
    source
        Map (or table, for cells) to read; the newest by `superres` (`singlecell`) by default.
    per
        ``"bin"`` or ``"cell"``.
    min_probability, min_counts
        Unassigned is what has a largest share below the one, or fewer (expected) counts of the genes used than the
        other.
    draws
        Redraws of the counts for the confidence; 0 for none.
    resolution
        Of the clusters: more is finer.
    name
        Name of the result; ``celltype_x{scale}`` by default, and with ``_cells`` for cells.
    seed
        Of redraws and clusters.
    overwrite
        Replace an earlier result of that name.
    progress
        Called with (done, total, label).
    report
        Called with lines for the user.

    Raises
    ------
    UsageError
        For a file that is not what it should be, a source that is not there, too few shared genes.
    StsrError
        For a section without a map, or one that cannot be written to.
    """
    began = time.monotonic()
    _check(markers, reference, label_key, per, min_probability, min_counts, draws, resolution)
    section = open_section(store)
    places = _places(section, source, per)
    outputs = _outputs(places, name)
    catalogue.check_free(section.path, outputs, overwrite)
    learned = _learn(places, markers, reference, label_key, resolution, min_counts, seed)
    signatures = learned.signatures
    for note in signatures.notes:
        (report or silent)(note)
    found = fit(places, learned, draws, seed, progress or silent)
    codes = model.assign(found.shares, found.counts, min_probability, min_counts)
    provenance = {
        "command": "celltype",
        "origin": "predicted",
        "stsr": __version__,
        "source": places.element,
        "source_written": section.provenance.get(places.element, {}).get("written"),
        **_way(markers, reference, label_key, resolution),
        "genes": len(signatures.genes),
        "types": signatures.types,
        "min_probability": min_probability,
        "min_counts": min_counts,
        "uncertainty": None if found.confidence is None else places.uncertainty,
        "draws": 0 if found.confidence is None else draws,
        "seed": seed,
        "units": "share of the counts of a bin or cell",
    }
    made = _made(outputs, places, learned, found, codes, section.frame)
    publish(section.path, made, dict.fromkeys(made, provenance), overwrite)
    numbers = np.bincount(codes, minlength=len(signatures.types) + 1)
    sure = [] if found.confidence is None else found.confidence[codes > 0]
    return Celltypes(
        store=section.path,
        element=outputs[0],
        tables=outputs[1:],
        source=places.element,
        types=dict(zip(signatures.types, numbers[1:].tolist(), strict=True)),
        unassigned=int(numbers[0]),
        genes=len(signatures.genes),
        confidence=float(sure.mean()) if len(sure) else None,
        seconds=time.monotonic() - began,
        notes=signatures.notes,
    )


def _check(markers, reference, label_key, per, min_probability, min_counts, draws, resolution) -> None:
    """Refuse what cannot be, before any work."""
    if markers is not None and reference is not None:
        raise UsageError("--markers and --reference are two ways to type; give one of them")
    if label_key is not None and reference is None:
        raise UsageError("--label-key names a column of the reference; add --reference FILE.h5ad")
    if per not in ("bin", "cell"):
        raise UsageError(f"--per is bin or cell, not {per!r}")
    if not 0 <= min_probability <= 1:
        raise UsageError(f"--min-probability is a share from 0 to 1, not {min_probability:g}")
    if not 0 <= min_counts < math.inf:
        raise UsageError(f"--min-counts is 0 or more, not {min_counts:g}")
    if draws < 0:
        raise UsageError(f"--draws is 0 or more, not {draws}")
    if not 0 < resolution < math.inf:
        raise UsageError(f"--resolution is above 0, not {resolution:g}")


def _places(section: Section, source: str | None, per: str) -> Bins | Cells:
    if per == "cell":
        return Cells(section, source or newest_cells(section))
    places = Bins(section, source or section.catalogue.newest_superres())
    if not len(places):
        raise StsrError(
            f"{places.element!r} in {section.path.name} has no bin in tissue; prepare the section again"
        )
    return places


def _outputs(places: Bins | Cells, name: str | None) -> list[str]:
    """Names of what will be written, the one to tell the user first."""
    usual = names.celltype_name(places.scale) if places.scale else names.celltype_name(10)
    if isinstance(places, Cells):
        return [names.check_name(name or f"{usual}_cells")]
    base = names.check_name(name or usual)
    return [base, names.table_name(base), f"{base}_bins"]


def _learn(places, markers, reference, label_key, resolution, min_counts, seed) -> Learned:
    if markers is not None:
        return learn_markers(places, markers)
    if reference is not None:
        return learn_reference(places, reference, label_key)
    return learn_clusters(places, resolution, min_counts, seed)


def _way(markers, reference, label_key, resolution) -> dict:
    """How types were told, for the provenance."""
    if markers is None and reference is None:
        return {"method": "clusters", "resolution": resolution}
    file = Path(markers or reference)
    way = {
        "method": "reference" if reference is not None else "markers",
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:12],
    }
    return way | ({"label_key": label_key} if label_key else {})


# -------------------------------------------------------------------------------------------------- elements


def _made(
    outputs: list[str], places: Bins | Cells, learned: Learned, fit: Fit, codes: np.ndarray, frame
) -> dict:
    """{name: element} of everything to publish."""
    if isinstance(places, Cells):
        return {outputs[0]: _cells_table(places, learned, fit, codes)}
    labels, types, bins = outputs
    raster = elements.labels(places.raster(codes.astype(np.uint16)), places.grid, frame)
    table = _table(
        learned, fit, codes, [f"{r}_{c}" for r, c in zip(places.rows, places.columns, strict=True)]
    )
    table.obs["row"], table.obs["column"] = places.rows, places.columns
    table.obsm["spatial"] = places.centres_um
    return {labels: raster, types: _types_table(labels, learned, codes), bins: elements.free_table(table)}


def _table(learned: Learned, fit: Fit, codes: np.ndarray, rows: list[str]):
    """AnnData (places, types): shares in X, so that scanpy draws them by the types' names."""
    import anndata

    types = learned.signatures.types
    table = anndata.AnnData(fit.shares, obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=types))
    table.obs["celltype"] = pd.Categorical.from_codes((codes - 1) % (len(types) + 1), [*types, UNASSIGNED])
    table.obs["probability"] = fit.shares.max(1)
    if fit.confidence is not None:
        table.obs["confidence"] = fit.confidence
    table.obs["counts"] = fit.counts
    table.obsm["proportions"] = pd.DataFrame(fit.shares, rows, types)  # where squidpy and decoupler look
    table.uns["celltype_colors"] = model.colours([*types, UNASSIGNED])
    return table


def _cells_table(places: Cells, learned: Learned, fit: Fit, codes: np.ndarray):
    """The same for cells: annotates the shapes that the source annotates."""
    table = _table(learned, fit, codes, [str(name) for name in places.table.obs_names])
    if places.centres_um is not None:
        table.obsm["spatial"] = np.asarray(places.centres_um, float)
    return elements.annotating(table, places.region, places.instances)


def _types_table(labels: str, learned: Learned, codes: np.ndarray):
    """One row for each code of the labels: what it stands for."""
    import anndata

    types = learned.signatures.types
    rows = pd.DataFrame(index=types)
    rows["celltype"] = pd.Categorical(types, types)
    rows["color"] = model.colours(types)
    rows["bins"] = np.bincount(codes, minlength=len(types) + 1)[1:]
    rows["genes"] = [", ".join(genes) for genes in learned.shown]
    table = anndata.AnnData(obs=rows, uns={"celltype_colors": model.colours(types)})
    return elements.annotating(table, labels, np.arange(1, len(types) + 1))
