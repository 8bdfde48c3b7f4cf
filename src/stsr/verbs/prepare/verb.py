"""Prepare a section: read a vendor's folder, check it, and write one store in um."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stsr import platforms
from stsr.errors import StsrError, UsageError
from stsr.files import disk_errors
from stsr.geometry.grid import Grid
from stsr.geometry.lattice import grid_around
from stsr.histology import tissue
from stsr.histology.image import Image
from stsr.platforms.source import Options, Source, Spots
from stsr.progress import Progress, Report, silent
from stsr.store import elements, names, publishing
from stsr.store.parts import Mask
from stsr.verbs.prepare import fit, registration
from stsr.verbs.prepare.binning import LOST
from stsr.verbs.prepare.bins import DEPTH, MEASURED_BINS, count_bins
from stsr.verbs.prepare.counting import Counted, count
from stsr.verbs.prepare.job import PrepareJob, default_output

_THIN = 20  # counts per spot; the thinnest real spots have hundreds


def prepare(
    path: str | Path,
    output: str | Path | None = None,
    *,
    he: str | Path | None = None,
    alignment: str | Path | None = None,
    um_per_px: float | None = None,
    spots: str | None = None,
    bin_um: float = 10.0,
    seed: int = 0,
    organ: str | None = None,
    overwrite: bool = False,
    min_qv: float = 20.0,
    genes: list[str] | None = None,
    refine: bool = True,
    progress: Progress | None = None,
    warn: Report | None = None,
) -> Path:
    """Convert an instrument's output to a section store, checked and in um.

    Parameters
    ----------
    path
        A Xenium folder, a Space Ranger folder of Visium or Visium HD (or the run above its ``outs``; for HD also
        ``binned_outputs`` or one ``square_*`` folder), a folder of first-generation ST tables, an ``.h5ad`` file or a
        folder with one, or a SpatialData store.
    output
        The store to make; ``<name of the input>.zarr`` in the working directory by default.
    he
        H&E image, if it is not found beside the data.
    alignment
        csv file of the affine (3 x 3) from pixels of the H&E: for Xenium to pixels of the instrument, as Xenium
        Explorer exports it, otherwise to um.
    um_per_px
        True pixel size, um, if it is missing or wrong in the data.
    spots
        Spots to simulate from transcripts or Visium HD: ``"square"`` (100 um) or ``"visium"`` (55 um discs, 100 um
        apart); ``"bins"`` takes the bins of 16 um of Visium HD as spots. By default ``"visium"`` for Visium HD,
        otherwise ``"square"``. Measured spots are kept as they are. From Visium HD, simulated spots take one binomial
        half of the counts, and the other half is stored beside all counts, as ``hr_10um_unseen``.
    bin_um
        High-resolution bin, um; must divide 100 um, or for Visium HD be 8 or 16 um.
    seed
        Of the half of the counts that simulated spots of Visium HD take.
    organ
        Name of the organ, by which `stsr.train` balances sections.
    overwrite
        Replace an existing store.
    min_qv
        Drop transcripts of lower quality.
    genes
        Keep only these genes.
    refine
        Refine the alignment by a small affine, so that nuclei and transcripts coincide (if there are transcripts
        or cells; see `stsr.verbs.prepare.registration`).
    progress
        Called with (done, total, label).
    warn
        Called with each warning. Warnings are also kept in the store's provenance.

    Returns
    -------
    path
        The store. It appears when it is complete.

    Raises
    ------
    UsageError
        If an option is impossible, or the store exists and ``overwrite`` is false.
    StsrError
        If the input is missing, damaged, not raw, or inconsistent; the message names the remedy.
    """
    path = Path(path)
    job = PrepareJob(
        path=path,
        output=default_output(path) if output is None else Path(output),
        options=Options(
            _path(he), _path(alignment), um_per_px, float(min_qv), tuple(genes) if genes else None
        ),
        spots=spots,
        bin_um=bin_um,
        seed=seed,
        organ=organ,
        refine=refine,
        overwrite=overwrite,
    )
    return _run(job, progress or silent, warn or silent)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _run(job: PrepareJob, progress: Progress, tell: Report) -> Path:
    source = platforms.read(job.path, job.options)
    for warning in source.warnings:
        tell(warning)
    with disk_errors(job.output):
        section = _assemble(source, _measure(source, job, progress), job)
        for warning in section.warnings:
            tell(warning)
        made = {"command": "prepare", "arguments": job.command, "platform": source.platform, **source.facts}
        provenance = {name: {**facts, **made} for name, facts in section.provenance.items()}
        progress(0, 1, "writing the store")
        named = {names.ORGAN_KEY: job.organ.strip().lower()} if job.organ else {}
        publishing.create(
            job.output, elements.store_of(section.parts), provenance, job.overwrite, attributes=named
        )
        progress(1, 1, "writing the store")
    return job.output


# ------------------------------------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class _Measured:
    """The raster of the section, counts of all genes per bin, the tissue mask, and the spots."""

    grid: Grid
    counts: np.ndarray
    mask: np.ndarray
    mask_from: str
    spots: Spots | None
    counted: Counted | None


def _measure(source: Source, job: PrepareJob, progress: Progress) -> _Measured:
    if source.bins is not None:
        kind = job.spots or "visium"
        counted = count_bins(source.bins, source.genes, job.bin_um, kind, job.seed, progress)
        where = "bins in tissue with counts"
        return _Measured(counted.grid, counted.density, counted.mask, where, counted.spots, counted)
    job.check_nests()
    if job.spots == MEASURED_BINS:
        raise UsageError("--spots bins is for Visium HD; choose --spots square or visium")
    if source.transcripts is not None:
        simulate = (job.spots or "square") if source.spots is None else None
        counted = count(source.transcripts, source.genes, job.bin_um, simulate, progress)
        spots = source.spots or counted.spots
        return _Measured(
            counted.grid, counted.density, counted.mask, "density of transcripts", spots, counted
        )
    if source.spots is not None:
        return _of_spots(source.spots, job.bin_um)
    assert source.image is not None  # a source holds transcripts, spots or an image
    return _of_image(elements.with_pyramid(source.image), job.bin_um)


def _of_spots(spots: Spots, bin_um: float) -> _Measured:
    grid = grid_around(spots.centres_um, spots.size_um, bin_um)
    counts = np.zeros(grid.shape)
    rows, columns, inside = grid.rows_columns(*spots.centres_um.T)
    np.add.at(counts, (rows[inside], columns[inside]), np.asarray(spots.counts.X.sum(1)).ravel()[inside])
    mask = tissue.from_spots(grid, spots.centres_um)
    if not mask.any():
        raise StsrError("no tissue found: no spot is marked as in tissue; check the table of positions")
    return _Measured(grid, counts, mask, "measured spots", spots, None)


def _of_image(image: Image, bin_um: float) -> _Measured:
    grid = Grid.covering(image.bounds_um, bin_um)
    mask = tissue.from_image(image.read(grid), bin_um)
    if not mask.any():
        raise StsrError("no tissue found: the image shows no stained tissue; check the image")
    return _Measured(grid, np.zeros(grid.shape), mask, "the image", None, None)


# ------------------------------------------------------------------------------------------------ what is stored


@dataclass(frozen=True)
class _Section:
    """The elements of the store, their provenance, and warnings from the checks."""

    parts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, dict] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, element: Any, facts: dict) -> None:
        """Add an element and its provenance."""
        self.parts[name], self.provenance[name] = element, facts


def _assemble(source: Source, measured: _Measured, job: PrepareJob) -> _Section:
    """Check the input and make the elements of the store."""
    section = _Section()
    image = _add_image(section, source.image, measured, job.refine) if source.image is not None else None
    if measured.spots is not None:
        section.warnings.extend(_check_depth(measured.spots))
        _add_spots(section, measured.spots, job, measured.counted)
    if measured.counted is not None:
        _add_counts(section, measured.counted, source, job)
    _add_masks(section, measured, image, source.warnings)
    _add_cells(section, source)
    return section


def _add_image(section: _Section, image: Image, measured: _Measured, refine: bool) -> Image:
    facts, warnings = _check_image(image, measured)
    section.warnings.extend(warnings)
    if refine and measured.counted is not None:
        found = registration.refine(image, measured.counts, measured.grid)
        image = image.moved(found.px_to_um)
        facts |= {
            "refined": found.applied,
            "refined_by_um": round(found.shift_um, 2),
            "fine_correlation": [round(found.correlation_before, 4), round(found.correlation_after, 4)],
        }
    image = elements.with_pyramid(image)
    section.add(names.HE, elements.he_image(image), facts)
    return image


def _check_image(image: Image, measured: _Measured) -> tuple[dict, list[str]]:
    """Facts and warnings on how the image fits the counts.

    Raises
    ------
    StsrError
        If the image does not cover the counts.
    """
    facts: dict[str, Any] = {
        "units": "uint8 RGB",
        "file": image.path.name if image.path else "",
        "um_per_px": round(image.um_per_px, 6),
    }
    if not measured.counts.any():
        return facts, []
    by_spots = measured.counted is None
    share = fit.overlap(image, measured.counts, measured.grid, "spots" if by_spots else "counts")
    agreement, warnings = fit.fit(image, measured.counts, measured.grid, sparse=by_spots)
    return facts | {"overlap": round(share, 4), "staining_follows_counts": round(agreement, 4)}, warnings


def _check_depth(spots: Spots) -> list[str]:
    depth = float(np.median(np.asarray(spots.counts.X.sum(1))))
    if depth >= _THIN:
        return []
    return [
        f"spots hold {depth:.3g} counts each (median), too few for super-resolution or training; check that the input "
        f"is complete and not subsampled"
    ]


def _add_spots(section: _Section, spots: Spots, job: PrepareJob, counted: Counted | None) -> None:
    facts = {
        "origin": spots.origin,
        "shape": spots.shape,
        "size_um": spots.size_um,
        "counts": int(spots.counts.X.sum()),
    }
    if counted is not None and counted.unseen is not None:
        facts |= {"depth": DEPTH, "seed": job.seed}
    barcodes = spots.counts.obs_names.to_numpy()
    shapes = elements.spot_shapes(spots.centres_um, spots.shape, spots.size_um, barcodes)
    table = elements.table(spots.counts, names.SPOTS, spots.centres_um)
    section.add(names.SPOTS, shapes, {**facts, "units": "um"})
    section.add(names.table_name(names.SPOTS), table, {**facts, "units": "raw counts"})


def _add_counts(section: _Section, counted: Counted, source: Source, job: PrepareJob) -> None:
    """Add the counts per bin, and those that the simulated spots did not take."""
    facts: dict[str, Any] = {"units": "raw counts per bin", "bin_um": counted.grid.bin_um}
    if source.bins is not None and counted.counter.dtype == np.float32:
        facts |= {"divided_by_area_from_um": source.bins.bin_um, "totals_per_gene_kept_to": LOST}
    element = names.hr_name(counted.grid.bin_um)
    image = elements.count_image(counted.counter, counted.grid, source.genes)
    dropped = {"dropped_low_quality": counted.low_quality, "dropped_other": counted.other}
    section.add(element, image, {**facts, "counts": counted.kept, **dropped})
    if counted.unseen is not None:
        image = elements.count_image(counted.unseen, counted.grid, source.genes)
        total = int(counted.unseen.per_gene.sum())
        halves = {
            "depth": 1 - DEPTH,
            "seed": job.seed,
            "counts": total,
            "of": "counts that simulated spots did not take",
        }
        halves["of"] = "counts that the simulated spots did not take"
        section.add(names.unseen_name(element), image, {**facts, **halves})


def _add_masks(section: _Section, measured: _Measured, image: Image | None, warnings: list[str]) -> None:
    """Add the tissue mask and the support on the section's raster."""
    grid, mask = measured.grid, measured.mask
    facts = {
        "units": "1 in tissue",
        "from": measured.mask_from,
        "area_mm2": round(float(mask.sum()) * grid.bin_um**2 / 1e6, 4),
        "warnings": [*warnings, *section.warnings],
    }
    section.add(names.TISSUE, elements.labels(mask, grid), facts)
    centres_um = measured.spots.centres_um if measured.spots is not None else None
    support = tissue.supported(grid, image, Mask(mask, grid.bin_to_um).read, centres_um)
    facts = {"units": "1 where a map may be believed", "origin": "derived"}
    section.add(names.SUPPORT, elements.labels(support, grid), facts)


def _add_cells(section: _Section, source: Source) -> None:
    cells = source.cells
    if cells is None:
        return
    section.add(names.CELLS, elements.cell_shapes(cells.outlines), {"units": "um"})
    if cells.counts is not None:
        centroids = cells.outlines.geometry.centroid
        centres = np.stack([centroids.x, centroids.y], axis=1)
        facts = {"units": "raw counts", "counts": int(cells.counts.X.sum())}
        table = elements.table(cells.counts, names.CELLS, centres)
        section.add(names.table_name(names.CELLS), table, facts)
