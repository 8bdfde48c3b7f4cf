"""Training tiles of sections of which only spots were measured: the network learns through sums over spots.

Of the spots of a tile, the network sees a random part; the loss is the Poisson likelihood of the counts of all of them,
given the predicted map summed over each spot, and spots that the network did not see weigh more. So spots teach nothing
below their own size but what the image tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement
from stsr.histology.image import Image
from stsr.methods.batch import Batch, Requirements, SpotTargets, cut, lr_mean
from stsr.progress import Progress, silent
from stsr.spots.denoising import denoise
from stsr.store.parts import FeatureMap
from stsr.store.section import Section
from stsr.verbs.train.augmentation import Stain, drawn_stain, stained, turned
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.heldout import Rectangle, checked_regions
from stsr.verbs.train.panel import candidates, most_expressed
from stsr.verbs.train.sampling import Places, Sampler

VISIBLE = 0.7
"""Share of the spots that the network sees in a tile."""

HIDDEN_WEIGHT = 3.0
"""Weight in the loss of spots that the network does not see."""

MOST_GENES = 300
"""Genes of a panel that is not asked for: those with the most counts, without mitochondrial ones."""

_REALISATIONS = 8  # random choices of visible spots of a section, each rasterised once
_LEAST_SPOTS = 20  # of a section


@dataclass(frozen=True)
class Raster:
    """Visible spots of a section on the low-resolution raster."""

    visible: np.ndarray
    """(spots,) bool."""
    lr: np.ndarray
    """(g, h, w) float32."""
    mask: np.ndarray
    """(1, h, w) float32."""
    mean: np.ndarray
    """(g,) float32, `stsr.methods.batch.lr_mean`."""


@dataclass(frozen=True, kw_only=True)
class Slide:
    """A section's spots."""

    name: str
    organ: str
    grid: Grid
    image: Image
    measurement: Measurement
    """All spots that training may know: those of excluded areas are left out."""
    counts: np.ndarray
    """(spots, g) float32, measured."""
    reserved: np.ndarray
    """(spots,) bool: kept for validation."""
    measured: np.ndarray
    """(g,) bool."""
    rasters: list[Raster]
    """For training."""
    whole: Raster
    """All spots that are not reserved, for validation."""
    starts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), int))
    """First bins (n, 2) of training tiles."""
    inside: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(n,) number of spots of each."""


@dataclass(frozen=True, kw_only=True)
class SlideTile:
    """One tile of a batch, with everything that was drawn for it."""

    slide: Slide
    raster: Raster
    row: int
    """First bin."""
    column: int
    """First bin."""
    weights: np.ndarray
    """(spots,) weight of each spot of the section in the loss."""
    turn: int = 0
    """How the tile is rotated and mirrored, see `turned`."""
    stain: Stain | None = None
    """How its staining is changed."""


class SlideTiles:
    """Training and validation tiles of sections of which only spots were measured.

    Spots are denoised as for prediction. Parameters and attributes are those of
    `stsr.verbs.train.tiles.TrainingTiles`, but for

    Parameters
    ----------
    val
        Fraction of each section's spots that is reserved for validation, unless ``regions`` name validation areas.
    panel
        The genes, instead of those of the config: of the model that training starts from.

    Raises
    ------
    StsrError
        If a section has no spots, too few of them, or no image.
    UsageError
        If ``val`` is out of range, or a region belongs to no section.
    """

    gaps_lr: list[int]

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
        panel: Sequence[str] | None = None,
        progress: Progress = silent,
    ):
        if not 0 <= val < 1:
            raise UsageError(
                f"the validation fraction must be at least 0 and below 1, not {val:g}; give --val 0.15"
            )
        for section in sections:
            check_slide(section)
        regions = checked_regions(regions, sections)
        self.requirements, self.config = requirements, config
        self._features = features or {}
        self.side = config.train_tile_lr * requirements.per_lr  # bins
        self.panel = tuple(panel) if panel else tuple(_panel(sections, config))
        self.slides = []
        for number, section in enumerate(sections):
            progress(number, len(sections), f"denoising spots of {section.name}")
            rng = np.random.default_rng([seed, number, 2])
            self.slides.append(self._slide(section, regions.get(section.name, {}), val, rng))
        if not any(len(slide.starts) for slide in self.slides):
            raise StsrError("no tile with a spot is left for training; give larger sections or exclude less")
        self.sampler = Sampler(
            [Places(each.organ, each.starts, each.inside) for each in self.slides], self.side
        )
        self.reference = _reference(self.slides)
        self.depth = np.ones(len(self.panel), np.float32)  # a section's spots hold all that was measured
        self.gaps_lr = []
        self._held_out = self._validation_tiles()

    @property
    def count(self) -> int:
        """Number of positions of training tiles."""
        return self.sampler.count

    @property
    def validation_count(self) -> int:
        """Number of validation tiles."""
        return len(self._held_out)

    @property
    def digest(self) -> str:
        """Of everything that training uses."""
        whole = hashlib.sha256(repr(self.panel).encode())
        for slide in self.slides:
            whole.update(repr((slide.name, slide.grid, slide.image.px_to_um.tolist())).encode())
            for array in (
                slide.image.read(slide.grid),
                slide.counts,
                slide.reserved,
                slide.measurement.centres_um,
            ):
                whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a minibatch of different tiles.

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
        return self._assemble([self._drawn(*place, rng) for place in self.sampler.draw(size, rng)])

    def validation_batches(self, size: int = 8, sections: Collection[str] = ()) -> Iterator[Batch]:
        """Yield the validation tiles, of all or of the named sections, always the same and without augmentation."""
        tiles = [tile for tile in self._held_out if not sections or tile.slide.name in sections]
        for first in range(0, len(tiles), size):
            yield self._assemble(tiles[first : first + size])

    # ---------------------------------------------------------------------------------------------- preparing

    def _slide(self, section: Section, region: dict, val: float, rng: np.random.Generator) -> Slide:
        needs = self.requirements
        assert section.spots is not None
        assert section.image is not None
        grid = section.grid(needs.bin_um)
        measurement, seen = section.spots.measurement(grid).of_seeing_spots()
        usable = ~_within(measurement.centres_um, region.get("exclude", ()), grid)
        usable &= measurement.bins_seen > 0.99 * np.median(measurement.bins_seen)  # wholly in the grid
        if int(usable.sum()) < _LEAST_SPOTS:
            raise StsrError(
                f"{section.name} has {int(usable.sum())} spots to train on; {_LEAST_SPOTS} are needed"
            )
        rows = np.flatnonzero(usable)
        spots, measurement = section.spots.take(seen[rows]), measurement.of_spots(rows)
        areas = region.get("validation")
        reserved = rng.random(len(rows)) < val if areas is None else _within(spots.centres_um, areas, grid)
        # What is validated must not enter the components that denoise the others.
        known = np.flatnonzero(~reserved)
        read = np.zeros((len(rows), len(self.panel)), np.float32)
        read[known] = _denoised(spots.take(known), self.panel)

        def raster(visible: np.ndarray) -> Raster:
            part = measurement.of_spots(np.flatnonzero(visible))
            lr, mask = part.raster(read[visible], needs.lr_um)
            return Raster(visible, lr, mask, lr_mean(lr, mask))

        rasters = [raster(~reserved & (rng.random(len(rows)) < VISIBLE)) for _ in range(_REALISATIONS)]
        starts, inside = _starts(measurement.of_spots(known), grid, self.config.train_tile_lr, needs.per_lr)
        return Slide(
            name=section.name,
            organ=section.organ or "",
            grid=grid,
            image=section.image,
            measurement=measurement,
            counts=spots.select(self.panel).toarray().astype(np.float32),
            reserved=reserved,
            measured=np.isin(np.array(self.panel, str), np.array(spots.genes, str)),
            rasters=rasters,
            whole=raster(~reserved),
            starts=starts,
            inside=inside,
        )

    def _validation_tiles(self) -> list[SlideTile]:
        """Tiles side by side that hold reserved spots, at most as many as the config says."""
        tiles = []
        for slide in self.slides:
            weights = slide.reserved.astype(np.float32)
            height, width = (max(size, self.side) for size in slide.grid.shape)
            for row in range(0, height - self.side + 1, self.side):
                for column in range(0, width - self.side + 1, self.side):
                    tile = SlideTile(slide=slide, raster=slide.whole, row=row, column=column, weights=weights)
                    if len(_spots_of(tile, self.side)[0]):
                        tiles.append(tile)
        most = self.config.validation_tiles
        if len(tiles) <= most:
            return tiles
        return [tiles[index] for index in np.linspace(0, len(tiles) - 1, most).round().astype(int)]

    # ---------------------------------------------------------------------------------------------- drawing tiles

    def _drawn(self, number: int, row: int, column: int, rng: np.random.Generator) -> SlideTile:
        slide, config = self.slides[number], self.config
        raster = slide.rasters[int(rng.integers(len(slide.rasters)))]
        weights = np.where(raster.visible, 1.0, HIDDEN_WEIGHT) * ~slide.reserved
        return SlideTile(
            slide=slide,
            raster=raster,
            row=row,
            column=column,
            weights=weights.astype(np.float32),
            turn=int(rng.integers(8)) if config.flips else 0,
            stain=drawn_stain(config.stain, rng) if config.stain else None,
        )

    def _assemble(self, tiles: list[SlideTile]) -> Batch:
        parts = [self._raster(tile) for tile in tiles]
        measured = np.stack([tile.slide.measured for tile in tiles])
        return Batch(
            image=torch.from_numpy(np.stack([self._image(tile) for tile in tiles])),
            lr=torch.from_numpy(np.stack([lr for lr, _ in parts])),
            lr_mask=torch.from_numpy(np.stack([mask for _, mask in parts])),
            has_lr=torch.ones(len(tiles), dtype=torch.bool),
            lr_mean=torch.from_numpy(np.stack([tile.raster.mean for tile in tiles])),
            genes=torch.eye(len(self.panel)),
            names=self.panel,
            measured=None if measured.all() else torch.from_numpy(measured),
            features=self._patch_features(tiles),
            targets=self._targets(tiles),
        )

    def _raster(self, tile: SlideTile) -> tuple[np.ndarray, np.ndarray]:
        per_lr, side = self.requirements.per_lr, self.config.train_tile_lr
        at = tile.row // per_lr, tile.column // per_lr, side, side
        rasters = (cut(raster, *at) for raster in (tile.raster.lr, tile.raster.mask))
        lr, mask = (np.ascontiguousarray(turned(raster, tile.turn)) for raster in rasters)
        return lr, mask

    def _window(self, tile: SlideTile) -> Grid:
        return tile.slide.grid.window(tile.row, tile.column, self.side, self.side)

    def _image(self, tile: SlideTile) -> np.ndarray:
        """The H&E of a tile (3, I, I) uint8."""
        image = tile.slide.image.read(self._window(tile).at(self.requirements.image_um))
        return stained(np.ascontiguousarray(turned(image, tile.turn)), tile.stain)

    def _patch_features(self, tiles: list[SlideTile]) -> torch.Tensor | None:
        """Patch features (b, c, F, F) of tiles, for methods that read them."""
        needs = self.requirements
        if not needs.features:
            return None
        windows = [self._window(tile).at(needs.features_um) for tile in tiles]
        read = (
            self._features[tile.slide.name].read(window) for tile, window in zip(tiles, windows, strict=True)
        )
        return torch.from_numpy(
            np.stack([turned(one, tile.turn) for one, tile in zip(read, tiles, strict=True)])
        )

    def _targets(self, tiles: list[SlideTile]) -> SpotTargets:
        """What the tiles' spots measured, with as many places for spots as the tile with the most of them has."""
        found = [_spots_of(tile, self.side) for tile in tiles]
        most = max(1, *(len(spots) for spots, _ in found))
        over = np.zeros((len(tiles), most, self.side, self.side), np.float32)
        counts = np.zeros((len(tiles), len(self.panel), most), np.float32)
        weight = np.zeros((len(tiles), most), np.float32)
        for number, (tile, (spots, covers)) in enumerate(zip(tiles, found, strict=True)):
            over[number, : len(spots)] = turned(covers, tile.turn)
            counts[number, :, : len(spots)] = tile.slide.counts[spots].T
            weight[number, : len(spots)] = tile.weights[spots]
        return SpotTargets(*(torch.from_numpy(array) for array in (over, counts, weight)))


def check_slide(section: Section) -> None:
    """Check that a section's spots can be trained on.

    Raises
    ------
    StsrError
        If it has no spots or no image.
    """
    if section.spots is None:
        raise StsrError(
            f"{section.name} has neither spots nor counts per bin to train on; run: stsr prepare FOLDER"
        )
    if section.image is None:
        raise StsrError(
            f"no H&E image in {section.name}; run: stsr prepare FOLDER --he he.ome.tif --overwrite"
        )


def _panel(sections: Sequence[Section], config: TrainConfig) -> list[str]:
    """The genes that the config asks for, or the most counted ones."""
    measured = [section.spots.genes for section in sections if section.spots is not None]
    names = candidates(measured, config)
    if not isinstance(config.genes, int):
        return names
    nuclear = [gene for gene in names if config.genes or not gene.upper().startswith("MT-")]
    totals = [
        np.asarray(section.spots.counts.sum(0)).ravel() for section in sections if section.spots is not None
    ]
    shares = [total / max(float(total.sum()), 1.0) for total in totals]
    return most_expressed(nuclear, measured, shares, config.genes or MOST_GENES)


def _within(centres_um: np.ndarray, areas: Sequence[Sequence[float]], grid: Grid) -> np.ndarray:
    """Whether spots lie in any of the rectangles: (spots,) bool."""
    rows, columns, _ = grid.rows_columns(*centres_um.T)
    inside = np.zeros(len(centres_um), bool)
    for area in areas:
        box = Rectangle.of_um(area, grid)
        inside |= (rows >= box.top) & (rows < box.bottom) & (columns >= box.left) & (columns < box.right)
    return inside


def _denoised(spots, panel: Sequence[str]) -> np.ndarray:
    """Expected counts (spots, g) of the panel; 0 for genes that were not measured."""
    place = {gene: column for column, gene in enumerate(spots.genes)}
    known = [number for number, gene in enumerate(panel) if gene in place]
    values = np.zeros((len(spots.centres_um), len(panel)), np.float32)
    values[:, known] = denoise(spots.counts, genes=np.array([place[panel[k]] for k in known], int)).expected()
    return values


def _starts(measurement: Measurement, grid: Grid, side_lr: int, per_lr: int) -> tuple[np.ndarray, np.ndarray]:
    """First bins (n, 2) of all windows on the raster with a spot's centre, and the number of centres in each (n,)."""
    height, width = (size // per_lr for size in grid.shape)
    rows, columns, inside = grid.rows_columns(*measurement.centres_um.T)
    centres = np.zeros((height + 1, width + 1))
    np.add.at(centres, (np.minimum(rows[inside] // per_lr, height - 1) + 1,
                        np.minimum(columns[inside] // per_lr, width - 1) + 1), 1)  # fmt: skip
    summed = centres.cumsum(0).cumsum(1)
    tall, wide = max(height - side_lr, 0) + 1, max(width - side_lr, 0) + 1
    bottom, right = min(side_lr, height), min(side_lr, width)
    found = (
        summed[bottom : bottom + tall, right : right + wide]
        - summed[:tall, right : right + wide]
        - summed[bottom : bottom + tall, :wide]
        + summed[:tall, :wide]
    )
    starts = np.argwhere(found > 0)
    return starts * per_lr, found[found > 0]


def _spots_of(tile: SlideTile, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Spots with a weight that lie wholly inside a tile (s,), and the part of each bin that they cover (s, y, x)."""
    slide = tile.slide
    rows, columns, _ = slide.grid.rows_columns(*slide.measurement.centres_um.T)
    near = (
        (rows >= tile.row)
        & (rows < tile.row + side)
        & (columns >= tile.column)
        & (columns < tile.column + side)
    )
    spots = np.flatnonzero(near & (tile.weights > 0))
    part: sp.csr_matrix = slide.measurement.matrix[spots].tocsr()
    y, x = np.array(divmod(part.indices, slide.grid.width)) - [[tile.row], [tile.column]]
    inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
    owner = np.repeat(np.arange(len(spots)), np.diff(part.indptr))
    covers = np.zeros((len(spots), side, side), np.float32)
    covers[owner[inside], y[inside], x[inside]] = part.data[inside]
    whole = covers.sum((1, 2)) >= 0.999 * slide.measurement.bins_seen[spots]
    return spots[whole], covers[whole]


def _reference(slides: Sequence[Slide]) -> np.ndarray:
    """Mean counts (g,) per low-resolution pixel, of the sections that measured the gene."""
    measured = np.stack([slide.measured for slide in slides])
    means = np.stack([slide.whole.mean for slide in slides])
    return (means.sum(0) / np.maximum(measured.sum(0), 1)).astype(np.float32)
