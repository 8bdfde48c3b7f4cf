"""From a vendor's folder to a section: one store, in um, checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stsr import platforms
from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import LR_UM, Grid, bins_per_lr
from stsr.geometry.measurement import Measurement
from stsr.histology import tissue
from stsr.histology.files import Picture
from stsr.platforms.source import Options, Source, Spots
from stsr.progress import Progress, Report, silent
from stsr.store import elements, names, publishing
from stsr.verbs.prepare import fit, registration
from stsr.verbs.prepare.counting import SPOT_KINDS, Counted, count, grid_over

_FINEST_UM = 1.0  # of bins; subcellular, and a slide still fits in memory
_THIN = 20  # counts per spot; the thinnest real spots have hundreds


def prepare(
    path: str | Path,
    output: str | Path | None = None,
    *,
    he: str | Path | None = None,
    alignment: str | Path | None = None,
    um_per_px: float | None = None,
    spots: str = "square",
    bin_um: float = 10.0,
    overwrite: bool = False,
    min_qv: float = 20.0,
    genes: list[str] | None = None,
    refine: bool = True,
    progress: Progress | None = None,
    warn: Report | None = None,
) -> Path:
    """Turn what an instrument wrote into a section store, checked and in um.

    Parameters
    ----------
    path
        A Xenium folder, a Space Ranger folder (or the run above its ``outs``), a folder of first-generation ST tables,
        a folder with an ``.h5ad`` or the file itself, or a SpatialData store.
    output
        The store to make; ``<name of the folder>.zarr`` here by default.
    he
        H&E image, where it is not found beside the data.
    alignment
        csv of the affine (3 x 3) from pixels of the H&E: for Xenium to pixels of the instrument, as Xenium Explorer
        exports it, otherwise to um.
    um_per_px
        True size of a pixel, um, where the data do not tell or tell it wrongly.
    spots
        How spots are simulated from transcripts: ``"square"`` (100 um) or ``"visium"`` (55 um discs, 100 um apart).
        Measured spots are kept as they are.
    bin_um
        High-resolution bin, um; must nest in 100 um.
    overwrite
        Replace an existing store.
    min_qv
        Transcripts of lower quality are dropped.
    genes
        Keep only these genes.
    refine
        Whether the alignment is corrected by a small affine, so that nuclei and transcripts fall together (where
        there are transcripts or cells; see `stsr.verbs.prepare.registration`).
    progress
        Called with (done, total, label).
    warn
        Called with a sentence that a user ought to read. They are also kept in the store's provenance.

    Returns
    -------
    path
        Of the store, whole: until everything is written it does not exist.

    Raises
    ------
    UsageError
        If an option is impossible, or the store exists and ``overwrite`` is false.
    StsrError
        If the input is missing, damaged, not raw, or does not fit together; the sentence names the remedy.
    """
    path = Path(path)
    output = _output(path, output)
    _check_options(spots, bin_um, min_qv, um_per_px, he, alignment)
    _check_output(path, output, overwrite)
    options = Options(_path(he), _path(alignment), um_per_px, float(min_qv), tuple(genes) if genes else None)
    tell, progress = warn or silent, progress or silent
    source = platforms.read(path, options)
    for sentence in source.warnings:
        tell(sentence)
    with publishing.disk_errors(output):
        counted = None
        if source.transcripts is not None:
            simulate = spots if source.spots is None else None
            counted = count(source.transcripts, source.genes, bin_um, simulate, progress)
        measured = _measure(source, counted, bin_um)
        section, provenance, doubts = _assemble(source, measured, refine)
        for sentence in doubts:
            tell(sentence)
        command = _command(path, spots, bin_um, min_qv, genes, um_per_px, he, alignment)
        for entry in provenance.values():
            entry.update(
                {"command": "prepare", "arguments": command, "platform": source.platform, **source.facts}
            )
        progress(0, 1, "writing the store")
        publishing.create(output, section, provenance, overwrite)
        progress(1, 1, "writing the store")
    return output


@dataclass(frozen=True)
class _Measured:
    """What checks and elements need: the bins, counts of all genes in them, tissue, spots."""

    grid: Grid
    counts: np.ndarray
    mask: np.ndarray
    mask_from: str
    spots: Spots | None
    counted: Counted | None


def _measure(source: Source, counted: Counted | None, bin_um: float) -> _Measured:
    if counted is not None:
        counts = counted.counter.per_place.reshape(counted.grid.shape)
        spots = source.spots or counted.spots
        return _Measured(counted.grid, counts, counted.mask, "density of transcripts", spots, counted)
    grid = grid_over(source.extent_um, bin_um)
    counts = np.zeros(grid.shape)
    if source.spots is None:
        mask = tissue.from_image(source.picture.on(grid), bin_um)
        came_from, remedy = "the image", "the image shows no stained tissue; check it"
    else:
        spots = source.spots
        rows, columns, inside = grid.rows_columns(*spots.centres_um.T)
        np.add.at(counts, (rows[inside], columns[inside]), np.asarray(spots.counts.X.sum(1)).ravel()[inside])
        make = Measurement.squares if spots.shape == "square" else Measurement.discs
        mask = tissue.from_spots(make(grid, spots.centres_um, spots.size_um))
        came_from, remedy = (
            "measured spots",
            "no spot is marked as lying in tissue; check the table of positions",
        )
    if not mask.any():
        raise StsrError(f"no tissue found: {remedy}")
    return _Measured(grid, counts, mask, came_from, source.spots, None)


def _assemble(source: Source, measured: _Measured, refine: bool):
    """Check what was read, and make the store's elements and their provenance of it."""
    doubts: list[str] = []
    parts, provenance = {}, {}
    if source.picture is not None:
        facts, found = _check_picture(source, measured)
        doubts += found
        picture = source.picture
        if refine and measured.counted is not None:
            picture, refined = _refine(picture, measured)
            facts |= refined
        parts[names.HE] = elements.he_image(picture)
        provenance[names.HE] = facts
    if measured.spots is not None:
        doubts += _check_depth(measured.spots)
        _add_spots(measured.spots, parts, provenance)
    if measured.counted is not None:
        _add_counts(measured.counted, source.genes, parts, provenance)
    parts[names.TISSUE] = elements.labels(measured.mask, measured.grid)
    provenance[names.TISSUE] = {
        "units": "1 in tissue",
        "from": measured.mask_from,
        "area_mm2": round(float(measured.mask.sum()) * measured.grid.bin_um**2 / 1e6, 4),
        "warnings": [*source.warnings, *doubts],
    }
    _add_cells(source, parts, provenance)
    return elements.store_of(parts), provenance, doubts


def _check_picture(source: Source, measured: _Measured) -> tuple[dict, list[str]]:
    """Refuse an image that lies elsewhere; say what seems wrong with one that lies here."""
    facts = {
        "units": "uint8 RGB",
        "file": source.picture.path.name if source.picture.path else "",
        "um_per_px": round(source.picture.um_per_px, 6),
    }
    if not measured.counts.any():
        return facts, []
    by_spots = measured.counted is None
    share = fit.overlap(
        source.picture, measured.counts, measured.grid, "spots" if by_spots else "transcripts"
    )
    agreement, doubts = fit.fit(source.picture, measured.counts, measured.grid, sparse=by_spots)
    return facts | {"overlap": round(share, 4), "staining_follows_counts": round(agreement, 4)}, doubts


def _refine(picture: Picture, measured: _Measured) -> tuple[Picture, dict]:
    """The image where its nuclei and the transcripts fall together, and by how much it moved."""
    found = registration.refine(
        lambda px_to_um, grid: replace(picture, px_to_um=px_to_um).on(grid),
        picture.px_to_um,
        measured.counts,
        measured.grid,
    )
    facts = {
        "refined": found.applied,
        "refined_by_um": round(found.shift_um, 2),
        "fine_correlation": [round(found.correlation_before, 4), round(found.correlation_after, 4)],
    }
    return replace(picture, px_to_um=found.px_to_um), facts


def _check_depth(spots: Spots) -> list[str]:
    depth = float(np.median(np.asarray(spots.counts.X.sum(1))))
    if depth >= _THIN:
        return []
    return [
        f"spots hold {depth:.3g} counts each (median), too few to learn from or to sharpen; check that the input is "
        f"whole and not a sample of rows"
    ]


def _add_spots(spots: Spots, parts: dict, provenance: dict) -> None:
    name = names.table_name(names.SPOTS)
    barcodes = spots.counts.obs_names.to_numpy()
    parts[names.SPOTS] = elements.spot_shapes(spots.centres_um, spots.shape, spots.size_um, barcodes)
    parts[name] = elements.table(spots.counts, names.SPOTS, spots.centres_um)
    facts = {
        "origin": spots.origin,
        "shape": spots.shape,
        "size_um": spots.size_um,
        "counts": int(spots.counts.X.sum()),
    }
    provenance[names.SPOTS] = {**facts, "units": "um"}
    provenance[name] = {**facts, "units": "raw counts"}


def _add_counts(counted: Counted, genes: list[str], parts: dict, provenance: dict) -> None:
    name = names.hr_name(counted.grid.bin_um)
    parts[name] = elements.count_image(counted.counter, counted.grid, genes)
    provenance[name] = {
        "units": "raw counts per bin",
        "bin_um": counted.grid.bin_um,
        "counts": counted.kept,
        "dropped_low_quality": counted.low_quality,
        "dropped_other": counted.other,
    }


def _add_cells(source: Source, parts: dict, provenance: dict) -> None:
    if source.cells is None:
        return
    parts[names.CELLS] = elements.cell_shapes(source.cells.outlines)
    provenance[names.CELLS] = {"units": "um"}
    if source.cells.counts is not None:
        name = names.table_name(names.CELLS)
        centroids = source.cells.outlines.geometry.centroid
        centres = np.stack([centroids.x, centroids.y], axis=1)
        parts[name] = elements.table(source.cells.counts, names.CELLS, centres)
        provenance[name] = {"units": "raw counts", "counts": int(source.cells.counts.X.sum())}


# -------------------------------------------------------------------------------------------------- options


def _output(path: Path, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    folder = path.resolve()
    if folder.name == "outs":  # every run of Space Ranger is called so
        folder = folder.parent
    return Path(folder.name.removesuffix(".zarr").removesuffix(".h5ad") + ".zarr")


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _check_options(spots, bin_um, min_qv, um_per_px, he, alignment) -> None:
    if spots not in SPOT_KINDS:
        raise UsageError(
            f"spots are simulated as {' or '.join(SPOT_KINDS)}, not as {spots!r}; choose one with --spots"
        )
    if bin_um < _FINEST_UM:
        raise UsageError(
            f"bins of {bin_um:g} um are finer than any map; choose 10, 20, 25 or 50 with --bin-um"
        )
    try:
        bins_per_lr(bin_um)
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"bins of {bin_um:g} um do not nest in {LR_UM:g} um; choose 10, 20, 25 or 50"
        ) from None
    if um_per_px is not None and not 0.01 <= um_per_px <= 1000:
        raise UsageError(f"a pixel of {um_per_px:g} um is implausible; give --um-per-px in um")
    if not 0 <= min_qv < np.inf:
        raise UsageError(f"a quality of {min_qv:g} does not exist; give --min-qv between 0 and 40")
    for file, option in ((he, "--he"), (alignment, "--alignment")):
        if file is not None and not Path(file).is_file():
            raise UsageError(f"there is no file {file}; check {option}")


def _check_output(path: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and path.exists() and output.resolve() == path.resolve():
        raise UsageError(f"{output} is the input itself; choose another place with --output")
    if output.exists() and not overwrite:
        raise UsageError(
            f"{output} exists; add --overwrite to replace it or choose another place with --output"
        )


def _command(path, spots, bin_um, min_qv, genes, um_per_px, he, alignment) -> str:
    words = [
        "stsr",
        "prepare",
        path.name,
        "--spots",
        spots,
        "--bin-um",
        f"{bin_um:g}",
        "--min-qv",
        f"{min_qv:g}",
    ]
    for option, value in (("--um-per-px", um_per_px), ("--he", he), ("--alignment", alignment)):
        if value is not None:
            words += [option, str(value) if option == "--um-per-px" else Path(value).name]
    if genes:
        words += ["--genes", ",".join(genes)]
    return shlex.join(words)
