"""Read the sections of a training: the panel, mean counts, and the counts of each section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stsr.errors import UsageError
from stsr.methods.batch import PLAIN_DENSITY, Requirements
from stsr.verbs.train.config import TrainConfig
from stsr.verbs.train.counts import BinCounts, read_counts
from stsr.verbs.train.heldout import Plan
from stsr.verbs.train.panel import candidates, most_expressed
from stsr.verbs.train.realisations import FACTOR_GENES
from stsr.verbs.train.sampling import mean_depth
from stsr.verbs.train.section import TrainingSection
from stsr.verbs.train.spots import mean_weights

HALF = 0.5
"""Fraction of the counts that are in the spots; the others are the truth."""

_LARGEST_BATCH = 10**9  # bytes of the truth; up to three batches are in memory


@dataclass(frozen=True)
class Sections:
    """What training reads; see `stsr.verbs.train.tiles.TrainingTiles`."""

    panel: tuple[str, ...]
    reference: np.ndarray
    """(p,) float32."""
    depth: np.ndarray
    """(p,) float32, mean fraction of the counts that the truth of a tile holds."""
    sections: list[TrainingSection]


def read_sections(
    plans: Sequence[Plan], needs: Requirements, config: TrainConfig, *, areas: Mapping[str, float]
) -> Sections:
    """Choose the panel, and read the counts of all sections.

    Parameters
    ----------
    plans
        Of each section.
    needs
        Bins and raster of the method.
    config
        Settings of training.
    areas
        Area of a spot of each kind, low-resolution pixels.

    Raises
    ------
    StsrError
        If a section does not hold counts.
    UsageError
        If the panel does not fit the sections or memory.
    """
    side = config.train_tile_lr * needs.per_lr
    genes = [plan.section.hr.genes if plan.section.hr else [] for plan in plans]
    trained = [number for number, plan in enumerate(plans) if len(plan.starts)]
    names = candidates([genes[number] for number in trained], config)
    _check_size(len(names), config, side)
    wanted = set(names)
    # Denoising needs more genes than the panel.
    own = [[gene for gene in measured if gene in wanted or config.denoised] for measured in genes]
    counts = [read_counts(plan.section, part, plan.grid) for plan, part in zip(plans, own, strict=True)]
    densities = {number: _density(counts[number], plans[number].training_area(side)) for number in trained}
    if isinstance(config.genes, int) and 0 < config.genes < len(names):
        names = most_expressed(
            names, [own[number] for number in trained], list(densities.values()), config.genes
        )
    places = {gene: number for number, gene in enumerate(names)}
    columns = [np.array([places.get(gene, -1) for gene in part], int) for part in own]
    sections = [
        _section(plan, read, column, genes=len(names), needs=needs, config=config, areas=areas)
        for plan, read, column in zip(plans, counts, columns, strict=True)
    ]
    depths = [
        HALF * float(np.mean([mean_depth(config, float(per_spot)) for per_spot in section.per_spot]))
        for section in sections
    ]
    reference, depth = _reference(
        [(columns[number], densities[number], depths[number]) for number in trained], len(names), needs
    )
    return Sections(tuple(names), reference, depth, sections)


def _check_size(genes: int, config: TrainConfig, side: int) -> None:
    """Refuse a panel of so many genes that a batch would not fit in memory."""
    chosen = config.genes
    genes = min(genes, chosen) if isinstance(chosen, int) and chosen else genes
    size = config.batch * genes * side**2 * 4
    if size > _LARGEST_BATCH:
        raise UsageError(
            f"a batch of {config.batch} tiles with {genes:,} genes takes {size / 1e9:.1f} GB; train the most "
            "expressed genes with --set genes=1000, or set a smaller batch"
        )


def _reference(
    parts: Sequence[tuple[np.ndarray, np.ndarray, float]], genes: int, needs: Requirements
) -> tuple[np.ndarray, np.ndarray]:
    """`reference` and `depth` (p,), from columns, mean counts per bin and mean depth of each section."""
    total, thinned, sections = np.zeros(genes), np.zeros(genes), np.zeros(genes)
    for columns, density, depth in parts:
        kept = columns >= 0
        total[columns[kept]] += density[kept]
        thinned[columns[kept]] += depth * density[kept]
        sections[columns[kept]] += 1
    plain = float(np.mean([depth for _, _, depth in parts]))
    depth = np.divide(thinned, total, out=np.full(genes, plain), where=total > 0)
    reference = np.maximum(thinned * needs.per_lr**2 / np.maximum(sections, 1), PLAIN_DENSITY)
    return reference.astype(np.float32), depth.astype(np.float32)


def _section(
    plan: Plan,
    counts: BinCounts,
    columns: np.ndarray,
    *,
    genes: int,
    needs: Requirements,
    config: TrainConfig,
    areas: Mapping[str, float],
) -> TrainingSection:
    """A section with the panel's ``genes``; ``columns`` are their places in the panel, -1 for other genes."""
    assert plan.section.image is not None, "check_section comes first"
    kept = counts.of_genes(columns, genes)
    weights = [mean_weights(kind, plan.grid, plan.tissue, plan.usable, needs.lr_um) for kind in config.spots]
    means = (HALF * kept.weighted(np.stack(weights))).astype(np.float32)
    return TrainingSection(
        name=plan.section.name,
        grid=plan.grid,
        image=plan.section.image,
        counts=kept,
        others=_others(plan, counts, columns) if config.denoised else None,
        measured=np.isin(np.arange(genes), columns),
        tissue=plan.tissue,
        usable=plan.usable,
        trainable=plan.trainable,
        means=means,
        divided=plan.section.divided_from_um / needs.bin_um,
        per_spot=means.sum(1) * np.array([areas[kind] for kind in config.spots]),
    )


def _others(plan: Plan, counts: BinCounts, columns: np.ndarray) -> BinCounts:
    """The most counted genes that are not in the panel."""
    area = plan.trainable if len(plan.starts) else plan.usable
    total = np.where(columns < 0, _density(counts, area), -1)
    most = min(max(FACTOR_GENES - int((columns >= 0).sum()), 0), int((columns < 0).sum()))
    chosen = np.full(len(columns), -1)
    chosen[np.argsort(-total, kind="stable")[:most]] = np.arange(most)
    return counts.of_genes(chosen, most)


def _density(counts: BinCounts, area: np.ndarray) -> np.ndarray:
    """Mean counts (genes,) per bin of an area (height, width) bool."""
    return counts.weighted(area[None])[0] / max(int(area.sum()), 1)
