"""Training tiles: windows of sections with image, simulated spots and counts, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from stsr.errors import UsageError
from stsr.methods.batch import Batch, Requirements, cut
from stsr.progress import Progress, silent
from stsr.store.parts import FeatureMap
from stsr.store.section import Section
from stsr.verbs.train.augmentation import (
    COARSE_UM,
    Stain,
    coarsened,
    drawn_stain,
    stained,
    turned,
    turned_places,
)
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.heldout import Plan, check_plans, checked_regions, plan_section, window_shares
from stsr.verbs.train.reading import read_sections
from stsr.verbs.train.realisations import Realisation, realise, training_splits, validation_splits
from stsr.verbs.train.sampling import Places, Sampler, drawn_depth
from stsr.verbs.train.section import TrainingSection, check_section
from stsr.verbs.train.spots import lattices_of


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile of a batch, with everything that was drawn for it."""

    section: TrainingSection
    row: int
    """First bin."""
    column: int
    """First bin."""
    kind: int
    """Number of the kind of spots, in the config's order."""
    lattice: int
    """Number of the lattice of that kind."""
    depth: float
    """Fraction of the transcripts that is used."""
    turn: int
    """How the tile is rotated and mirrored, see `turned`."""
    stain: Stain | None
    """How its staining is changed."""
    coarse_um: float | None
    """Pixels of the coarser scan that the image is made to resemble, um."""
    seed: int
    """Of the random halves."""
    realisation: Realisation | None = None
    """Of its section, if its spots are denoised: then the kind, lattice, depth and seed above are not used."""


class TrainingTiles:
    """Training and validation tiles of sections with counts per bin.

    Spots and truth of a tile are two random halves of its counts, drawn anew each time, so they share no noise. Tiles
    with denoised spots are cut from realisations of the whole section instead.

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
        Seed of realisations and of the halves of validation tiles; the other random numbers come with each batch.
    features
        {section name: patch features}, for methods that read them.
    progress
        Called while spots are denoised.

    Attributes
    ----------
    panel
        Gene names.
    reference
        (p,) mean counts per low-resolution pixel over training tissue, at the depth of the truth: half of the counts,
        times the mean depth. The mean of the sections that measured the gene.
    depth
        (p,) mean fraction of a section's counts that the truth of a tile holds.
    gaps_lr
        Gap of each section, low-resolution pixels.
    sampler
        How training tiles are drawn.

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
        progress: Progress = silent,
    ):
        for section in sections:
            check_section(section, requirements)
        if not 0 <= val < 1:
            raise UsageError(
                f"the validation fraction must be at least 0 and below 1, not {val:g}; give --val 0.15"
            )
        regions = checked_regions(regions, sections)
        self.requirements = requirements
        self.config = config
        self._features = features or {}
        self.side = config.train_tile_lr * requirements.per_lr  # bins
        plans = [
            plan_section(section, requirements, config, val=val, regions=regions.get(section.name, {}))
            for section in sections
        ]
        self.gaps_lr = [plan.gap_lr for plan in plans]
        wanted = val > 0 or any(own.get("validation") for own in regions.values())
        check_plans(plans, config.train_tile_lr * requirements.lr_um, wanted)
        self._lattices = [
            lattices_of(kind, config.train_tile_lr, requirements.bin_um, requirements.lr_um)
            for kind in config.spots
        ]
        areas = {kind: own[0].area for kind, own in zip(config.spots, self._lattices, strict=True)}
        read = read_sections(plans, requirements, config, areas=areas)
        self.panel, self.reference, self.depth = read.panel, read.reference, read.depth
        self._sections = read.sections
        self.sampler = Sampler(
            [
                Places(
                    plan.section.organ or plan.section.name,
                    plan.starts,
                    window_shares(plan.tissue, plan.starts, self.side),
                )
                for plan in plans
            ],
            self.side,
        )
        self._realised, realised = self._realise(plans, seed, progress) if config.denoised else ([], [])
        self._held_out = _spread(self._validation_tiles(plans, realised, seed), config.validation_tiles)

    @property
    def count(self) -> int:
        """Number of training tiles, at all shifts."""
        return self.sampler.count

    @property
    def validation_count(self) -> int:
        """Number of validation tiles."""
        return len(self._held_out)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal sha256 of everything that training uses."""
        whole = hashlib.sha256(repr((self.panel, self.gaps_lr)).encode())
        for array in (self.reference, self.sampler.weights):
            whole.update(array.tobytes())
        for section, places in zip(self._sections, self.sampler.places, strict=True):
            section.update(whole)
            whole.update(np.ascontiguousarray(places.starts).data)
        return whole.hexdigest()

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a minibatch of different tiles, which share at most half of their area if the sections allow it.

        Raises
        ------
        UsageError
            If there are fewer tiles than ``size``.
        """
        if size > self.count:
            raise UsageError(f"a batch of {size} needs more than {self.count} tiles; set a smaller batch")
        rng = np.random.default_rng(
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
        )
        places = self.sampler.draw(size, rng)
        taken = set(places)
        return self._assemble([self._drawn(*place, rng, taken) for place in places])

    def validation_batches(self, size: int = 8, sections: Collection[str] = ()) -> Iterator[Batch]:
        """Yield the validation tiles, of all or of the named sections, always the same and without augmentation."""
        tiles = [tile for tile in self._held_out if not sections or tile.section.name in sections]
        for first in range(0, len(tiles), size):
            yield self._assemble(tiles[first : first + size])

    # ---------------------------------------------------------------------------------------------- drawing tiles

    def _realise(
        self, plans: list[Plan], seed: int, progress: Progress
    ) -> tuple[list[list[Realisation]], list[list[Realisation]]]:
        """Realisations of each section for training, whose spots lie outside validation areas, and for validation."""
        needs, config = self.requirements, self.config
        wanted = []
        for number, (section, plan) in enumerate(zip(self._sections, plans, strict=True)):
            first = [seed, number, 0]
            wanted.append(training_splits(section, plan.starts, config, per_lr=needs.per_lr, seed=first))
            wanted.append(validation_splits(config, [seed, number, 1]) if len(plan.held_out) else [])
        made: list[list[Realisation]] = []
        total = sum(map(len, wanted))
        for number, splits in enumerate(wanted):
            section, plan = self._sections[number // 2], plans[number // 2]
            area = section.usable if number % 2 else section.trainable
            made.append([])
            for split in splits:
                progress(sum(map(len, made)), total, f"denoising simulated spots of {section.name}")
                made[-1].append(realise(section, split, area=area, starts=plan.starts, needs=needs))
        return made[::2], made[1::2]

    def _validation_tiles(
        self, plans: list[Plan], realised: list[list[Realisation]], seed: int
    ) -> list[Tile]:
        """All tiles of validation areas; kinds of spots and lattices in turn, as many transcripts as there are."""
        kinds = len(self.config.spots)
        tiles = []
        for index, (section, plan) in enumerate(zip(self._sections, plans, strict=True)):
            for number, (row, column) in enumerate(plan.held_out.tolist()):
                kind = number % kinds
                rng = np.random.default_rng([seed, number])
                tile = Tile(
                    section=section,
                    row=row,
                    column=column,
                    kind=kind,
                    lattice=number // kinds % len(self._lattices[kind]),
                    depth=max(self.config.depths),
                    turn=0,
                    stain=None,
                    coarse_um=None,
                    seed=int(rng.integers(2**62)),
                )
                denoised = rng.random() < self.config.denoised
                tiles.append(replace(tile, realisation=realised[index][kind]) if denoised else tile)
        return tiles

    def _drawn(
        self,
        section: int,
        row: int,
        column: int,
        rng: np.random.Generator,
        taken: set[tuple[int, int, int]] | None = None,
    ) -> Tile:
        """A training tile at a place; one with denoised spots close to it, but not at another place that is taken."""
        config = self.config
        kind = int(rng.integers(len(config.spots)))
        tile = Tile(
            section=self._sections[section],
            row=row,
            column=column,
            kind=kind,
            lattice=int(rng.integers(len(self._lattices[kind]))),
            depth=drawn_depth(config, float(self._sections[section].per_spot[kind]), float(rng.random())),
            turn=int(rng.integers(8)) if config.flips else 0,
            stain=drawn_stain(config.stain, rng) if config.stain else None,
            coarse_um=self._coarse_um(rng),
            seed=int(rng.integers(2**62)),
        )
        if not config.denoised or rng.random() >= config.denoised:
            return tile
        others = (set() if taken is None else taken) - {(section, row, column)}
        for number in rng.permutation(len(self._realised[section])):
            realisation = self._realised[section][number]
            place = (section, *realisation.nearest(row, column))
            if place not in others:
                if taken is not None:
                    taken.add(place)
                return replace(tile, row=place[1], column=place[2], realisation=realisation)
        return tile  # in a section of few tiles

    def _coarse_um(self, rng: np.random.Generator) -> float | None:
        """Pixels of a coarser scan for some of the tiles, if there are such scans."""
        needs = self.requirements
        sizes = [size for size in COARSE_UM if size > needs.image_um and needs.lr_um % size == 0]
        return float(rng.choice(sizes)) if sizes and rng.random() < self.config.coarse else None

    def _assemble(self, tiles: list[Tile]) -> Batch:
        size, genes, side = len(tiles), len(self.panel), self.side
        hr = np.zeros(
            (size, genes, side, side), np.float32
        )  # in large pages: less than half the time of torch.zeros
        spots = [self._fill(tile, hr[at]) for at, tile in enumerate(tiles)]
        measured = torch.from_numpy(np.stack([tile.section.measured for tile in tiles]))
        return Batch(
            image=torch.from_numpy(np.stack([self._image(tile) for tile in tiles])),
            lr=torch.from_numpy(np.stack([lr for lr, _ in spots])),
            lr_mask=torch.from_numpy(np.stack([mask for _, mask in spots])),
            has_lr=torch.ones(size, dtype=torch.bool),
            lr_mean=torch.from_numpy(np.stack([self._mean(tile) for tile in tiles])),
            genes=torch.eye(genes),
            names=self.panel,
            hr=torch.from_numpy(hr),
            measured=None if all(section.measured.all() for section in self._sections) else measured,
            features=self._patch_features(tiles),
            divided=torch.tensor([tile.section.divided for tile in tiles]),
        )

    def _patch_features(self, tiles: list[Tile]) -> torch.Tensor | None:
        """Patch features (b, c, F, F) of tiles, for methods that read them."""
        needs = self.requirements
        if not needs.features:
            return None
        windows = [tile.section.grid.window(tile.row, tile.column, self.side, self.side) for tile in tiles]
        parts = [
            turned(self._features[tile.section.name].read(window.at(needs.features_um)), tile.turn)
            for tile, window in zip(tiles, windows, strict=True)
        ]
        return torch.from_numpy(np.stack(parts))

    def _image(self, tile: Tile) -> np.ndarray:
        """The H&E of a tile (3, I, I) uint8."""
        window = tile.section.grid.window(tile.row, tile.column, self.side, self.side)
        window = window.at(self.requirements.image_um)
        if tile.coarse_um is None:
            image = tile.section.image.read(window)
        else:
            image = coarsened(tile.section.image, window, tile.coarse_um)
        return stained(turned(image, tile.turn), tile.stain)

    def _mean(self, tile: Tile) -> np.ndarray:
        """The section's mean counts (g,) at the depth of a tile."""
        if tile.realisation is not None:
            return tile.realisation.mean
        return (tile.section.means[tile.kind] * tile.depth).astype(np.float32)

    def _fill(self, tile: Tile, hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write one half of the counts into ``hr`` (g, side, side), which is zero; the other half gives the spots.

        Returns
        -------
        lr, mask
            (g, h, w) and (1, h, w) float32.
        """
        margin, section = self.requirements.per_lr, tile.section
        area = (tile.row - margin, tile.column - margin, self.side + 2 * margin, self.side + 2 * margin)
        window, realised = section.counts.cut(*area), tile.realisation
        if realised is None:
            seen, truth = window.halves(np.random.default_rng(tile.seed), tile.depth)
        else:
            seen, truth = window.split(realised.split.key, realised.split.depth)
        number = np.int32 if hr.size < 2**31 else np.int64
        places = np.repeat(turned_places(self.side, tile.turn, margin).astype(number), np.diff(window.first))
        at = window.gene * number(self.side**2)
        at += places
        inside = places >= 0
        hr.reshape(-1)[at[inside]] = truth[inside]
        if realised is None:
            lattice = self._lattices[tile.kind][tile.lattice]
            masks = cut(section.tissue, *area), cut(section.usable, *area)
            lr, mask = lattice.simulate(window.matrix(seen, len(self.panel)), *masks)
        else:
            lr, mask = realised.cut(tile.row, tile.column, self.config.train_tile_lr)
        return np.ascontiguousarray(turned(lr, tile.turn)), np.ascontiguousarray(turned(mask, tile.turn))


def _spread(tiles: list[Tile], most: int) -> list[Tile]:
    """Select at most ``most`` tiles, evenly spaced."""
    if len(tiles) <= most:
        return tiles
    return [tiles[index] for index in np.linspace(0, len(tiles) - 1, most).round().astype(int)]
