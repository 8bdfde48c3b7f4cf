"""Training tiles: windows of sections with image, simulated spots and counts, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from stsr.errors import StsrError, UsageError
from stsr.methods.batch import PLAIN_DENSITY, Batch, Requirements
from stsr.store.parts import FeatureMap
from stsr.store.section import Section
from stsr.verbs.train.augmentation import stained, turned, turned_places
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.heldout import Plan, plan_section
from stsr.verbs.train.section import (
    SparseCounts,
    TrainingSection,
    check_section,
    read_counts,
    simulate_rasters,
)

_OVERLAP = 0.5  # largest fraction of its area that a tile of a minibatch shares with another
_TRIES = 30  # draws per tile before larger overlaps are accepted
_REGION_KEYS = ("exclude", "validation")


class TrainingTiles:
    """Training and validation tiles of sections with counts per bin.

    Parameters
    ----------
    sections
        Sections with counts per bin and an image.
    requirements
        Bin size, image pixel and raster of the method; its panel is ignored.
    config
        Settings of training; those of the optimiser are ignored.
    val
        Fraction of each section's tissue that is kept for validation; 0 for none.
    regions
        ``{section name: {"exclude": [[x0, y0, x1, y1], ...], "validation": [...]}}``, um. Neither is used for training.
        Validation regions of a section replace the automatic one.
    seed
        Seed of the thinning to the config's depths; the other random numbers come with each batch.
    features
        {section name: patch features}, for methods that read them.

    Attributes
    ----------
    panel
        Gene names.
    reference
        (p,) mean counts per low-resolution pixel over training tissue.
    gaps_lr
        Gap of each section, low-resolution pixels.

    Raises
    ------
    StsrError
        If a section has no counts per bin or no image, or no training or validation tile is left.
    UsageError
        If ``val`` is out of range or a region belongs to no section.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        requirements: Requirements,
        config: TrainConfig,
        *,
        val: float = 0.15,
        regions: dict[str, dict] | None = None,
        seed: int = 0,
        features: Mapping[str, FeatureMap] | None = None,
    ):
        for section in sections:
            check_section(section, requirements)
        if not 0 <= val < 1:
            raise UsageError(
                f"the validation fraction must be at least 0 and below 1, not {val:g}; give --val 0.15"
            )
        regions = _regions(regions, sections)
        self.requirements = requirements
        self.config = config
        self._features = features or {}
        self.side = config.train_tile_lr * requirements.per_lr  # bins
        self._pools: list[tuple[TrainingSection, int, np.ndarray]] = []  # (section, phase, first bins (n, 2))
        self._held_out: list[
            tuple[TrainingSection, int, int, int]
        ] = []  # (section, kind, first row, first column)
        plans = [
            plan_section(section, requirements, config, val=val, regions=regions.get(section.name, {}))
            for section in sections
        ]
        self.gaps_lr = [plan.gap_lr for plan in plans]
        if not any(len(starts) for plan in plans for starts in plan.starts):
            raise StsrError(
                f"no tile of {config.train_tile_lr * requirements.lr_um:g} um with tissue is left for training; "
                "give larger sections, a smaller train_tile_lr or --val 0"
            )
        if (val > 0 or any("validation" in own for own in regions.values())) and not any(
            len(plan.held_out) for plan in plans
        ):
            raise StsrError(
                "no section is large enough for a validation area; give larger sections, or --val 0 for none"
            )
        self._read(plans, np.random.default_rng(seed))
        self._held_out = _spread(self._held_out, config.validation_tiles)
        self._totals = np.cumsum([len(starts) for *_, starts in self._pools])

    @property
    def count(self) -> int:
        """Number of training tiles; shifts and depths of one position count separately."""
        return int(self._totals[-1])

    @property
    def validation_count(self) -> int:
        """Number of validation tiles."""
        return len(self._held_out)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of everything that training uses."""
        whole = hashlib.sha256(repr((self.panel, self.gaps_lr)).encode())
        whole.update(self.reference.tobytes())
        before = None
        for section, _, starts in self._pools:
            if section is not before:
                section.update(whole)
            before = section
            whole.update(np.ascontiguousarray(starts).data)
        return whole.hexdigest()

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a minibatch of different tiles, which share at most half of their area if the sections allow it.

        Raises
        ------
        UsageError
            If there are fewer tiles than ``size``.
        """
        if size > len(self._places):
            raise UsageError(
                f"a batch of {size} needs more than {len(self._places)} tiles; set a smaller batch"
            )
        rng = np.random.default_rng(
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
        )
        chosen, stain = [], self.config.stain
        for pool, start in self._draw(size, rng):
            section, phase, _ = self._pools[pool]
            turn = int(rng.integers(8)) if self.config.flips else 0
            gains = np.exp(rng.normal(0, stain, 3)) if stain else None
            chosen.append((section, phase, int(rng.integers(len(self.config.spots))), start, turn, gains))
        return self._assemble(chosen)

    def validation_batches(self, size: int = 8) -> Iterator[Batch]:
        """Yield the validation tiles, always the same and without augmentation."""
        for first in range(0, len(self._held_out), size):
            tiles = self._held_out[first : first + size]
            yield self._assemble(
                [(section, 0, kind, (row, column), 0, None) for section, kind, row, column in tiles]
            )

    # ---------------------------------------------------------------------------------------------- reading data

    def _read(self, plans: list[Plan], rng: np.random.Generator) -> None:
        """Choose the panel, read counts and images, and simulate spots."""
        genes, depths = self.config.genes, self.config.depths
        names = _candidates([plan.section for plan in plans], genes)
        counts = [read_counts(plan.section, names, plan.grid) for plan in plans]
        totals, bins = np.zeros(len(names)), 0
        for plan, read in zip(plans, counts, strict=True):
            area = plan.training_area(self.side).ravel()
            totals += np.asarray(read.matrix[area].sum(0, dtype=np.float64)).ravel()
            bins += int(area.sum())
        if isinstance(genes, int) and 0 < genes < len(names):
            chosen = np.sort(np.argsort(-totals, kind="stable")[:genes])
            names, totals = [names[index] for index in chosen], totals[chosen]
            counts = [read_counts(plan.section, names, plan.grid) for plan in plans]
        self.panel = tuple(names)
        mean = totals / max(bins, 1) * self.requirements.per_lr**2
        self.reference = np.maximum(mean, PLAIN_DENSITY).astype(np.float32)
        for plan, read in zip(plans, counts, strict=True):
            assert plan.section.image is not None, "check_section comes first"
            image = plan.section.image.read(plan.grid.at(self.requirements.image_um))
            for depth in depths:
                self._add(
                    plan, image, read if depth == 1 else read.thinned(depth, rng), plain=depth == max(depths)
                )

    def _add(self, plan: Plan, image: np.ndarray, counts: SparseCounts, plain: bool) -> None:
        """Add one section at one depth; only the one with all transcripts gives validation tiles."""
        seen = plan.seen(self.requirements.per_lr)
        rasters = simulate_rasters(
            counts, plan.grid, plan.shifts, self.config.spots, seen, plan.tissue, self.requirements.lr_um
        )
        section = TrainingSection(plan.section.name, plan.grid, image, counts, rasters)
        for phase, starts in enumerate(plan.starts):
            if len(starts):
                self._pools.append((section, phase, starts))
        if plain:
            for number, (row, column) in enumerate(plan.held_out.tolist()):
                self._held_out.append((section, number % len(self.config.spots), row, column))

    # ------------------------------------------------------------------------------------------------- assembling

    @cached_property
    def _places(self) -> set[tuple]:
        """Distinct positions, regardless of depth."""
        return {(s.name, row, column) for s, _, starts in self._pools for row, column in starts.tolist()}

    def _draw(self, size: int, rng: np.random.Generator) -> list[tuple[int, tuple[int, int]]]:
        """Draw different tiles: (pool, first bin)."""
        chosen: list[tuple[int, tuple[int, int]]] = []
        tries = 0
        while len(chosen) < size:
            number = int(rng.integers(self.count))
            pool = int(np.searchsorted(self._totals, number, side="right"))
            section, _, starts = self._pools[pool]
            row, column = starts[number - self._totals[pool]].tolist()
            tries += 1
            most = _OVERLAP if tries <= _TRIES * size else 1 - 1e-9
            if all(self._overlap(section, (row, column), *other) <= most for other in chosen):
                chosen.append((pool, (row, column)))
        return chosen

    def _overlap(
        self, section: TrainingSection, start: tuple[int, int], pool: int, other: tuple[int, int]
    ) -> float:
        """Fraction of a tile's area that it shares with another tile."""
        if self._pools[pool][0].name != section.name:
            return 0.0
        rows, columns = (max(0, self.side - abs(a - b)) for a, b in zip(start, other, strict=True))
        return rows * columns / self.side**2

    def _assemble(self, tiles: list[tuple]) -> Batch:
        """Assemble tiles (section, phase, kind, first bin, turn, stain gains) into a batch."""
        size, genes, side, small = len(tiles), len(self.panel), self.side, self.config.train_tile_lr
        pixels = side * self.requirements.image_per_lr // self.requirements.per_lr
        image = np.empty((size, 3, pixels, pixels), np.uint8)
        lr = np.empty((size, genes, small, small), np.float32)
        mask = np.empty((size, 1, small, small), np.float32)
        mean = np.empty((size, genes), np.float32)
        hr = torch.zeros(size, genes, side, side)
        features: list[np.ndarray] = []
        for at, (section, phase, kind, (row, column), turn, gains) in enumerate(tiles):
            raster = section.rasters[phase][kind]
            top, left = (
                (row - raster.row) // self.requirements.per_lr,
                (column - raster.column) // self.requirements.per_lr,
            )
            lr[at] = turned(raster.lr[:, top : top + small, left : left + small], turn)
            mask[at] = turned(raster.mask[:, top : top + small, left : left + small], turn)
            mean[at] = raster.mean
            per_bin = self.requirements.image_per_lr / self.requirements.per_lr
            y, x = round(row * per_bin), round(column * per_bin)
            image[at] = stained(turned(section.image[:, y : y + pixels, x : x + pixels], turn), gains)
            section.counts.cut(row, column, turned_places(side, turn), hr[at].numpy())
            if self.requirements.features:
                window = section.grid.window(row, column, side, side).at(self.requirements.features_um)
                features.append(turned(self._features[section.name].read(window), turn))
        return Batch(
            image=torch.from_numpy(image),
            lr=torch.from_numpy(lr),
            lr_mask=torch.from_numpy(mask),
            has_lr=torch.ones(size, dtype=torch.bool),
            lr_mean=torch.from_numpy(mean),
            genes=torch.eye(genes),
            names=self.panel,
            hr=hr,
            features=torch.from_numpy(np.stack(features)) if features else None,
        )


def _candidates(sections: Sequence[Section], genes: int | Sequence[str]) -> list[str]:
    """Genes that all sections have, in the order of the first one, or the requested ones."""
    lists = [section.hr.genes for section in sections if section.hr is not None]
    shared = set.intersection(*(set(own) for own in lists))
    if not shared:
        raise StsrError("the sections have no gene in common; train on sections of one panel")
    if not genes or isinstance(genes, int):
        return [gene for gene in lists[0] if gene in shared]
    missing = [gene for gene in genes if gene not in shared]
    if missing:
        raise UsageError(
            f"not every section has {', '.join(missing[:3])}; choose genes that all sections have"
        )
    return list(dict.fromkeys(genes))


def _regions(regions: dict | None, sections: Sequence[Section]) -> dict[str, dict]:
    """Check regions and index them by section name."""
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise UsageError("two of the sections have the same name; rename one of the stores")
    named = {Path(str(key)).name.removesuffix(".zarr"): own for key, own in (regions or {}).items()}
    for name, own in named.items():
        if name not in names:
            raise UsageError(
                f"there are regions for {name!r}, which is not one of the sections: {', '.join(names)}"
            )
        wrong = set(own) - set(_REGION_KEYS) if isinstance(own, dict) else {str(own)}
        if wrong:
            raise UsageError(f"regions must be {' or '.join(_REGION_KEYS)}, not {wrong.pop()!r}")
    return named


def _spread(tiles: list[tuple], most: int) -> list[tuple]:
    """Select at most ``most`` tiles, evenly spaced."""
    if len(tiles) <= most:
        return tiles
    return [tiles[index] for index in np.linspace(0, len(tiles) - 1, most).round().astype(int)]
