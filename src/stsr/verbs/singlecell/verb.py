"""singlecell(): from a map of bins to a table of cells in the section's store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from stsr.store.elements import Frame
from stsr.store.parts import Map
from stsr.store.section import Section, open_section
from stsr.verbs.singlecell import areas, segmentation
from stsr.verbs.singlecell.nuclei import DOUBTFUL_UM_PER_PX, find_nuclei
from stsr.verbs.singlecell.segmentation import Segmentation
from stsr.version import __version__

SPREAD = "sd"
"""Layer of the table with the standard deviation of each count over samples of the model."""

_DENSE_FROM = 0.5  # part of counts above 0 from which a sparse matrix is the larger one

Region = tuple[float, float, float, float]


@dataclass(frozen=True)
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
        The map that was added up.
    cells, genes
        Their numbers.
    counts_in_map, counts_in_cells, counts_outside
        The map's whole counts, and how they fall into cells and outside of them.
    scores
        Against measured counts per cell: see `stsr.verbs.singlecell.areas.scores`; None where nothing was measured.
    scored_cells
        Number of cells that were scored.
    seconds
        Time it took.
    notes
        What the user should know.
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
    """Add up the bins of a map over cells, by exact areas, and write a table of cells into the store.

    What is counted in a bin is shared out by the part of its area that lies in each cell; places that several cells
    claim are shared evenly between them; what lies in no cell stays outside. Cells and outside together hold what the
    map holds.

    Parameters
    ----------
    store
        A section with a map.
    source
        Any (gene, y, x) image of counts per bin, inferred or measured; the newest super-resolved map by default.
    genes
        Names; all genes of the map by default, or for ``["all"]``.
    including
        Genes that a caller will look for in the table: refused before the work if not among them.
    cells
        Shapes or labels of the store; by default its own cells.
    segmentation
        A file of cells to import instead; see `stsr.verbs.singlecell.segmentation.imported`.
    coordinates
        Of that file: ``um`` or ``px``.
    segment
        Find nuclei on the H&E instead; see `stsr.verbs.singlecell.nuclei.find_nuclei`.
    expand_um
        How far these cells reach beyond their nuclei.
    name
        Name of the table; ``cells_x{scale}`` by default. New shapes are called ``{name}_shapes``.
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
        For a source, genes or cells that are not there, several kinds of cells at once, a name that is taken, scores
        where nothing was measured.
    StsrError
        For a section without maps or cells, a segmentation that does not fit, a store that cannot be written to.
    """
    began, progress, notes = time.monotonic(), progress or silent, []
    section = open_section(store)
    source = _layer(section, source)
    bins = section.map(source)
    wanted = _wanted(genes, including, bins.genes, source)
    element = names.check_name(name or names.cells_name(LR_UM / bins.grid.bin_um))
    if sum([cells is not None, segmentation is not None, segment]) > 1:
        raise UsageError("--cells, --segmentation and --segment exclude each other; give one of them")
    shapes = f"{element}_shapes" if segmentation is not None or segment else None
    catalogue.check_free(section.path, [element, shapes] if shapes else [element], overwrite)
    found = _find_cells(
        section, bins.grid, cells, segmentation, coordinates, segment, expand_um, progress, notes
    )
    measured = _measured(section, found, scores, score_region)
    parts = areas.shares(found.outlines, bins.grid)
    found, parts, measured = _on_the_map(found, parts, measured, source, notes)
    for note in notes:
        (report or silent)(note)
    counts, outside, totals = areas.add_up(bins, wanted, parts, progress)
    spread = _spread(section, source, bins, wanted, parts, progress)
    compared = None
    if measured is not None:
        compared = _compare(
            section, found, bins.grid, parts, measured, {source: counts}, wanted, score_region
        )
    facts = {
        "counts_in_map": float(totals.sum()),
        "counts_in_cells": float(counts.sum(dtype=np.float64)),
        "counts_outside": float(outside.sum()),
    }
    table = _table(found, shapes or found.element, wanted, counts, spread, bins.grid)
    made = {element: table} if shapes is None else {shapes: _shapes(found, section.frame), element: table}
    provenance = _provenance(source, found, spread, facts)
    publishing.publish(section.path, made, dict.fromkeys(made, provenance), overwrite)
    if scores is not None:
        _write(compared, Path(scores))
    return SingleCell(
        section.path, element, shapes or found.element, source, len(found.ids), len(wanted), *facts.values(), compared,
        0 if compared is None else int((compared["of"] == "cell").sum()), time.monotonic() - began, notes,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- what to add up


def _layer(section: Section, asked: str | None) -> str:
    """The map to read."""
    if asked is None:
        try:
            return catalogue.newest_superres(section.path)
        except StsrError as error:
            measured = catalogue.hr_elements(section.path)
            raise StsrError(f"{error}, or add --from {measured[0]}" if measured else str(error)) from None
    spread_of = asked.removesuffix(names.spread_name(""))
    if spread_of != asked and spread_of in section.elements:
        raise UsageError(f"{asked!r} is the spread of a map, not counts; give --from {spread_of}")
    if section.map(asked).genes == ["r", "g", "b"]:
        raise UsageError(f"{asked!r} is a picture, not counts of genes per bin; name a map with --from")
    return asked


def _wanted(genes, including, there: list[str], source: str) -> list[str]:
    chosen = genes_of(genes, there, source)
    genes_of(including, there, source)
    missing = set(including) - set(chosen)
    if missing:
        raise UsageError(
            f"{min(missing)!r} is not among the {len(chosen)} genes of this table; add it to --genes"
        )
    return chosen


def _find_cells(
    section, grid: Grid, cells, file, coordinates, segment, expand_um, progress, notes
) -> Segmentation:
    if segment:
        if section.image is None:
            raise StsrError(
                f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE, or import cells "
                f"with --segmentation FILE"
            )
        found = find_nuclei(section.image, _extent(section, grid), expand_um, progress)
        if section.image.um_per_px > DOUBTFUL_UM_PER_PX:
            notes.append(
                f"at {section.image.um_per_px:.2g} um per pixel many nuclei are missed or merged; "
                f"{DOUBTFUL_UM_PER_PX:g} um or finer is wanted"
            )
    elif file is not None:
        found = segmentation.imported(file, section, _extent(section, grid), coordinates)
    else:
        return segmentation.stored(section, cells)
    diameter = np.median(2 * np.sqrt(shapely.area(found.outlines) / np.pi))
    notes.append(f"{len(found.ids):,} cells ({found.source}), median diameter {diameter:.1f} um")
    return found


def _extent(section: Section, grid: Grid) -> Region:
    """Of the section, which a map of a part of it says less about; of the map where it is all there is."""
    try:
        return section.extent_um
    except StsrError:
        return grid.bounds_um


def _measured(section: Section, found: Segmentation, scores, score_region):
    """Measured counts of these cells, if there are any; refused where scores are asked for and there are none."""
    measured = None if found.element is None else segmentation.measured_counts(section, found)
    if measured is None and (scores is not None or score_region is not None):
        raise UsageError(
            "there are no measured counts of these cells to score against; leave out --scores and --score-region"
        )
    if scores is not None:
        folder = Path(scores).resolve().parent
        if Path(scores).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"no file can be written at {scores}; give --scores another place")
    return measured


def _on_the_map(found: Segmentation, parts: sp.csr_matrix, measured, source: str, notes: list[str]):
    """Only cells that the map reaches: of the others it says nothing, which is not a count of 0."""
    kept = np.asarray(parts.sum(1)).ravel() > 0
    if not kept.any():
        raise StsrError(
            f"no cell lies on {source}; choose another map with --from, or other cells with --cells"
        )
    if kept.all():
        return found, parts, measured
    notes.append(f"{(~kept).sum():,} cells lie outside of {source} and are left out")
    if measured is not None:
        counts, genes, rows = measured
        there = kept[rows]
        measured = counts[there], genes, (np.cumsum(kept) - 1)[rows[there]]
    return replace(found, ids=found.ids[kept], outlines=found.outlines[kept]), parts[kept], measured


def _spread(section: Section, source: str, bins: Map, genes, parts, progress) -> np.ndarray | None:
    """Spread of the counts (n, g) float32: bins add up as if their errors were one, which none can exceed."""
    element = names.spread_name(source)
    if section.elements.get(element) != "images":
        return None
    spread = section.map(element)
    if spread.grid != bins.grid or not set(genes) <= set(spread.genes):
        return None
    return areas.add_up(spread, genes, parts, progress)[0]


# -------------------------------------------------------------------------------------------------- what is made


def _table(found: Segmentation, annotates: str, genes, counts, spread, grid: Grid):
    from anndata import AnnData

    area = shapely.area(found.outlines)
    inside = shapely.area(shapely.intersection(found.outlines, shapely.box(*grid.bounds_um)))
    facts = {
        "area_um2": area,
        "outside_map": (1 - inside / area).clip(0),
    }
    table = AnnData(
        _small(counts), pd.DataFrame(facts, index=found.ids.astype(str)), pd.DataFrame(index=genes)
    )
    table.obsm["spatial"] = found.centres_um
    if spread is not None:
        table.layers[SPREAD] = _small(spread)
    return elements.annotating(table, annotates, found.ids)


def _small(counts: np.ndarray):
    return counts if np.count_nonzero(counts) >= _DENSE_FROM * counts.size else sp.csr_matrix(counts)


def _shapes(found: Segmentation, frame: Frame):
    import geopandas as gpd

    return elements.cell_shapes(gpd.GeoDataFrame(geometry=found.outlines, index=found.ids), frame)


def _provenance(source: str, found: Segmentation, spread, facts: dict) -> dict:
    return {
        "command": "singlecell",
        "origin": "derived",
        "stsr": __version__,
        "from": source,
        "cells": found.source,
        "units": "counts per cell",
        "spread": None if spread is None else "added up over bins: an upper bound",
        **facts,
    }


# ------------------------------------------------------------------------------------------------------- scores


def _compare(section, found, grid: Grid, parts, measured, counts: dict, genes, region) -> pd.DataFrame:
    """The scores of counts {source: (n, g)} and of what spots alone would say, over cells whose centroid is inside."""
    truth, measured_genes, rows = measured
    x0, y0, x1, y1 = region or grid.bounds_um
    x, y = found.centres_um[rows].T
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    if not inside.any():
        raise UsageError(
            f"no measured cell lies in {x0:g},{y0:g},{x1:g},{y1:g} um; give another --score-region"
        )
    rows = rows[inside]
    column = {gene: number for number, gene in enumerate(measured_genes)}
    shared = [number for number, gene in enumerate(genes) if gene in column]
    if not shared:
        raise UsageError("none of these genes was measured in cells; choose others with --genes")
    named = [genes[number] for number in shared]
    methods = {source: values[np.ix_(rows, shared)] for source, values in counts.items()}
    if section.spots is not None:
        methods["spots"] = areas.spot_values(section.spots, grid, parts[rows], named)
        if _holds_whole_pixels(grid):
            methods["bilinear"] = areas.bilinear_values(section.spots, grid, parts[rows], named)
    truth = truth[inside][:, [column[gene] for gene in named]].toarray()
    return areas.scores(methods, truth, found.ids[rows].astype(str), named)


def _holds_whole_pixels(grid: Grid) -> bool:
    """Whether the raster of low-resolution pixels fits, which interpolation starts from."""
    try:
        grid.at(LR_UM)
    except ValueError:
        return False
    return True


def _write(scores: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        scores.to_csv(temporary, index=False, float_format="%.6g")
