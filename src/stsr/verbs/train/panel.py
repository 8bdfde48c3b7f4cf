"""The panel of a training: which genes of the sections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stsr.errors import StsrError, UsageError
from stsr.verbs.train.config import TrainConfig


def candidates(measured: Sequence[Sequence[str]], config: TrainConfig) -> list[str]:
    """Genes that the panel may have: the requested ones, or those of any section or of all, in the sections' order.

    Parameters
    ----------
    measured
        The genes of each section.
    config
        Its ``genes`` and ``panel``.

    Raises
    ------
    StsrError
        If the sections share no gene and the panel is ``"shared"``.
    UsageError
        If a requested gene was not measured.
    """
    shared = set.intersection(*(set(own) for own in measured))
    union = list(dict.fromkeys(gene for own in measured for gene in own))
    if config.panel == "shared" and not shared:
        raise StsrError("the sections have no gene in common; train with --set panel=union")
    allowed = shared if config.panel == "shared" else set(union)
    if isinstance(config.genes, int):
        return [gene for gene in union if gene in allowed]
    missing = [gene for gene in config.genes if gene not in allowed]
    if missing:
        some = "not every section" if config.panel == "shared" else "no section"
        raise UsageError(f"{some} has {', '.join(missing[:3])}; choose other genes")
    return list(dict.fromkeys(config.genes))


def most_expressed(
    names: Sequence[str], measured: Sequence[Sequence[str]], densities: Sequence[np.ndarray], count: int
) -> list[str]:
    """Choose ``count`` of ``names``, in their order, taken from the sections in turn, the most expressed first.

    So a deeply sequenced section, or one with a large panel, does not decide alone.

    Parameters
    ----------
    measured, densities
        Genes of each section, of which those not in ``names`` are ignored, and their mean counts (genes,).
    """
    place = {gene: number for number, gene in enumerate(names)}
    best = np.full(len(names), len(names))  # rank in the section where the gene ranks highest
    for own, density in zip(measured, densities, strict=True):
        order = [own[number] for number in np.argsort(-density, kind="stable")]
        ranked = np.array([place[gene] for gene in order if gene in place], int)
        best[ranked] = np.minimum(best[ranked], np.arange(len(ranked)))
    chosen = np.sort(np.argsort(best, kind="stable")[:count])
    return [names[index] for index in chosen]
