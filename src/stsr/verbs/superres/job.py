"""The job of one run of superres, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.genes import wanted_genes
from stsr.geometry.correction import Correction, SmoothCorrection
from stsr.geometry.grid import LR_UM, Grid
from stsr.geometry.measurement import Measurement
from stsr.methods.batch import Requirements
from stsr.methods.method import Method
from stsr.spread.dispersion import Dispersion
from stsr.store import catalogue, names
from stsr.store.elements import labels
from stsr.store.parts import FeatureMap, Spots
from stsr.store.section import SUPPORT_UM, Section
from stsr.verbs.superres.loading import Loaded
from stsr.verbs.superres.mixtures import mixtures
from stsr.verbs.superres.spots import AUTO, NONE, SMOOTH, SpotCounts, spot_counts
from stsr.version import __version__

DEFAULT_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class SuperresJob:
    """One run of superres, checked; fields without a description are as in `stsr.superres`."""

    section: Section
    store: Path
    """Where the maps are written: the section's own store or a copy."""
    loaded: Loaded
    genes: list[str]
    """Names, in the order of the maps."""
    mixtures: np.ndarray
    """(g, p) each gene as a mixture of panel genes."""
    grid: Grid
    """The method's bins over the whole section. All inputs of a tile are made on it."""
    region: Grid
    """The window of the grid that is written."""
    factor: int
    """The method's bins per output bin, along a side."""
    counts: SpotCounts | None
    """Counts of the spots; None without spots."""
    measurement: Measurement | None
    """Spots over the grid; None without spots."""
    spots: np.ndarray
    """Indices of the spots of the measurement among those of `counts`."""
    correction: Correction | SmoothCorrection | None
    """Correction of maps in output bins; None if they are not corrected."""
    corrected: np.ndarray
    """Indices of the spots that the correction needs among those of `counts`."""
    support: np.ndarray
    """(height, width) bool, over the whole section in output bins: maps are zero elsewhere."""
    samples: int
    seed: int
    element: str
    """Name of the map."""
    keeps_samples: bool = False
    """Whether the samples are written."""
    sees_image: bool = True
    """False shows a white slide instead of the H&E."""
    features: FeatureMap | None = None
    """Patch features of the section; None if the method reads none."""
    notes: list[str]
    """Remarks for the user before the work begins."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How the maps are made, JSON-able."""

    @property
    def dispersion(self) -> Dispersion | None:
        """What the method knows of its errors; None if it samples, or does not know them."""
        found: Dispersion | None = self.loaded.method.dispersion
        return found

    @property
    def spread(self) -> str | None:
        """Name of the spread; None if it is not known."""
        known = self.dispersion is not None or self.samples > 1
        return names.spread_name(self.element) if known else None

    @property
    def kept(self) -> list[str]:
        """Names of the samples to write."""
        return [
            names.sample_name(self.element, 1 + number) for number in range(self.samples * self.keeps_samples)
        ]

    @property
    def requirements(self) -> Requirements:
        """The tiles that the method needs."""
        return self.loaded.method.requirements

    @property
    def read_panel(self) -> tuple[str, ...]:
        """Genes that the method reads for any map; none for interpolation, which maps each gene on its own."""
        return self.requirements.panel if self.loaded.method.learns else ()

    @property
    def elements(self) -> list[str]:
        """Names of the images to write."""
        return [self.element, *([] if self.spread is None else [self.spread]), *self.kept]

    @property
    def predicted(self) -> list[str]:
        """Those that are blended from tiles; the others follow from the finished map."""
        return self.elements if self.dispersion is None else self.elements[:1]

    @property
    def output_grid(self) -> Grid:
        """The bins that are written."""
        return self.region.at(self.grid.bin_um * self.factor)

    @property
    def area(self) -> Grid:
        """The method's bins that must be predicted: the region, and what its correction depends on."""
        return self.region if self.correction is None else self.correction.area.at(self.grid.bin_um)


def check_included(including: Sequence[str], genes: list[str]) -> None:
    """Refuse genes that the map will not have.

    Raises
    ------
    UsageError
        Names the first of them.
    """
    there = set(genes)
    for gene in including:
        if gene not in there:
            raise UsageError(f"{gene!r} is not among the {len(genes)} genes of this map; add it to --genes")


def make_job(
    section: Section,
    loaded: Loaded,
    *,
    scale: float,
    genes: Sequence[str] | None,
    samples: int | None,
    use_lr: bool,
    spots: str,
    consistency: str,
    base: str,
    region: tuple[float, float, float, float] | None,
    name: str | None,
    seed: int,
    keep_samples: bool = False,
    kept: np.ndarray | None = None,
) -> SuperresJob:
    """Check the options and make the job; arguments are those of `stsr.superres`.

    Parameters
    ----------
    kept
        Indices of the spots to use; all by default. The bins and the support are those of all spots.

    Raises
    ------
    UsageError, StsrError
        As `stsr.superres`.
    """
    method = loaded.method
    factor = _factor(scale, method.requirements)
    if method.learns and section.image is None:
        raise StsrError(
            f"no H&E image in {section.path.name}; run: stsr prepare FOLDER --he IMAGE, or use --method bicubic"
        )
    table = section.spots if use_lr else None
    if table is not None and kept is not None:
        table = table.take(kept)
    counts: SpotCounts | None = None
    notes: list[str] = []
    if table is not None:
        counts, notes = spot_counts(
            table,
            spots,
            consistency,
            loaded.base if base == AUTO else base,
            are_sums=section.spots_are_sums,
            kriges=method.needs_kriging,
        )
    chosen = wanted_genes(genes, table.genes if table else [], method.panel)
    mixed = _mixtures(chosen, method, table)
    outside = int((mixed.sum(1) != 1).sum()) if method.learns else 0
    grid = section.grid(method.requirements.bin_um)
    window, coarse = _region(grid, region), grid.at(grid.bin_um * factor)
    measurement, seeing = _measurement(table, grid)
    support = section.support(coarse)
    correction: Correction | SmoothCorrection | None = None
    corrected = seeing
    output, coarse_seeing = (measurement, seeing) if factor == 1 else _measurement(table, coarse)
    if output is not None and counts is not None and counts.consistency != NONE:
        kind = SmoothCorrection if counts.consistency == SMOOTH else Correction
        correction = kind(output, window.at(coarse.bin_um), support)
        corrected = coarse_seeing[correction.spots]
    job = SuperresJob(
        section=section,
        store=section.path,
        loaded=loaded,
        genes=chosen,
        mixtures=mixed,
        grid=grid,
        region=window,
        factor=factor,
        counts=counts,
        measurement=measurement,
        spots=seeing,
        correction=correction,
        corrected=corrected,
        support=support,
        samples=_samples(samples, method, keep_samples),
        keeps_samples=keep_samples,
        seed=seed,
        element=names.check_name(name or names.result_name("superres", scale)),
        notes=_notes(section, method, blind=table is None and use_lr, outside=outside) + notes,
    )
    return replace(job, provenance=_provenance(job, scale=scale, outside=outside))


def _measurement(spots: Spots | None, grid: Grid) -> tuple[Measurement | None, np.ndarray]:
    """All spots that cover a bin of the grid, and their indices in the section."""
    if spots is None:
        return None, np.zeros(0, int)
    measurement, seeing = spots.measurement(grid).of_seeing_spots()
    if not len(seeing):
        raise UsageError("no spot lies in the measured area; add --no-lr")
    return measurement, seeing


def _notes(section: Section, method: Method, *, blind: bool, outside: int) -> list[str]:
    """Remarks for the user before the work begins."""
    notes = []
    image, image_um = section.image, method.requirements.image_um
    if method.learns and image is not None and not image.resolves(image_um):
        notes.append(
            f"the H&E has {image.um_per_px:.3g} um per pixel, and the model reads {image_um:g} um: detail is missing; "
            "a finer scan would give a better map"
        )
    if blind:
        notes.append("no measured spots: predicting from the image alone")
    if outside:
        notes.append(
            f"{plural(outside, 'gene')} not in the model's panel: inferred like panel genes with similar spots"
        )
    return notes


def notes_on_result(job: SuperresJob) -> list[str]:
    """Remarks for the user about the maps that were written."""
    beyond = 0 if job.correction is None else job.correction.beyond
    if not beyond:
        return []
    reach = "reaches" if beyond == 1 else "reach"
    return [
        f"{plural(beyond, 'spot')} {reach} beyond the image or the tissue, where maps are zero: "
        "there the map does not add up to the counts"
    ]


def _provenance(job: SuperresJob, *, scale: float, outside: int) -> dict[str, Any]:
    """How the maps of a job are made, JSON-able."""
    method = job.loaded.method
    sampling: Any = method.sampling if method.samples else None
    return {
        "command": "superres",
        "origin": "predicted",
        "stsr": __version__,
        "method": job.loaded.name,
        "model": job.loaded.model,
        "checkpoint": job.loaded.digest,
        "scale": scale,
        "bin_um": job.grid.bin_um * job.factor,
        "units": "expected counts per bin",
        "spots_used": job.measurement is not None,
        **(
            {}
            if job.counts is None
            else {"spots": job.counts.read, "consistency": job.counts.consistency, "base": job.counts.base}
        ),
        "spots_beyond_support": 0 if job.correction is None else job.correction.beyond,
        "samples": job.samples,
        "samples_kept": len(job.kept),
        "spread": _spread_from(job),
        "seed": job.seed,
        "genes_outside_panel": outside,
        "region_um": list(job.region.bounds_um),
        **({} if sampling is None else asdict(sampling)),
    }


def _spread_from(job: SuperresJob) -> str | None:
    """Where the spread comes from: ``dispersion`` around the map, ``samples`` of the method, or None."""
    return "dispersion" if job.dispersion is not None else "samples" if job.spread else None


def provenance_of(job: SuperresJob, element: str) -> dict[str, Any]:
    """How one element of a job is made; the spread names the dispersion it follows from."""
    if element != job.spread or job.dispersion is None:
        return dict(job.provenance)
    dispersion = job.dispersion.to_json()
    named = set(job.genes)
    dispersion["genes"] = {gene: factor for gene, factor in dispersion["genes"].items() if gene in named}
    return {
        **job.provenance,
        "units": "standard deviation of the expected counts per bin",
        "dispersion": dispersion,
    }


def new_support(job: SuperresJob) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Labels ``support`` for a store that has none, and their provenance: {name: element}, {name: {...}}."""
    if names.SUPPORT in (element.lower() for element in catalogue.elements(job.store)):
        return {}, {}
    grid = job.section.grid(SUPPORT_UM)
    same = job.grid.bin_um * job.factor == SUPPORT_UM
    supported = job.support if same else job.section.support(grid)
    made = {"command": "superres", "origin": "derived", "stsr": __version__}
    return {names.SUPPORT: labels(supported, grid, job.section.frame)}, {names.SUPPORT: made}


def _factor(scale: float, needs: Requirements) -> int:
    """The method's bins per output bin, along a side."""
    factors = [factor for factor in range(1, needs.per_lr + 1) if needs.per_lr % factor == 0]
    for factor in factors:  # names have six digits
        if np.isclose(scale, LR_UM / (needs.bin_um * factor), rtol=1e-5, atol=0):
            return factor
    served = ", ".join(f"{LR_UM / (needs.bin_um * factor):g}" for factor in factors)
    raise UsageError(f"this model cannot predict --scale {scale:g}; choose one of {served}")


def _mixtures(genes: list[str], method: Method, spots: Spots | None) -> np.ndarray:
    if not method.learns:  # each gene is predicted on its own
        return np.zeros((len(genes), len(method.panel)), np.float32)
    return mixtures(genes, method.panel, spots.genes if spots else [], spots.counts if spots else None)


def _region(whole: Grid, region: tuple[float, float, float, float] | None) -> Grid:
    if region is None:
        return whole
    if not (region[0] < region[2] and region[1] < region[3]):
        raise UsageError("--region is X0 Y0 X1 Y1 in um, with X0 < X1 and Y0 < Y1")
    try:
        return whole.crop_um(*region)
    except ValueError as error:
        x0, y0, x1, y1 = whole.bounds_um
        raise UsageError(f"{error}, which spans {x0:g} {y0:g} {x1:g} {y1:g} um") from error


def _samples(samples: int | None, method: Method, keep: bool) -> int:
    """Number of samples to draw."""
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}")
    if keep and not method.samples and method.dispersion is None:
        raise UsageError(
            "the spread of this method is not known, so it gives no samples; leave out --keep-samples"
        )
    if not method.samples and not keep:
        if samples not in (None, 1):
            raise UsageError(
                "the map of this method does not depend on samples; leave out --samples, or add --keep-samples"
            )
        return 1
    return DEFAULT_SAMPLES if samples is None else samples


def plural(number: int, noun: str) -> str:
    """``1 gene``, ``2 genes``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
