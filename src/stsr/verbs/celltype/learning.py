"""From places with counts to shares of cell types: signatures on their genes, then the regression block by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stsr.errors import UsageError
from stsr.progress import Progress
from stsr.store.places import Bins, Cells
from stsr.verbs.celltype import model
from stsr.verbs.celltype.signatures import Signatures, from_markers, read_markers, read_reference

_MOST_GENES = 2000  # the most informative ones: more cost time and memory and tell little
_CLUSTERED = 20_000  # places that Leiden sees; all are then assigned by the clusters' profiles
_SHOWN_GENES = 10  # of a type


@dataclass(frozen=True)
class Learned:
    """Types as this section would show them.

    Attributes
    ----------
    signatures
        Of each type, on the genes used.
    effects
        (g,) how much better than the signatures' source this section sees a gene.
    shown
        For each type the genes that tell it best.
    """

    signatures: Signatures
    effects: np.ndarray
    shown: list[list[str]]

    @property
    def matrix(self) -> np.ndarray:
        """(g, k) what a transcript of each type is expected to be."""
        return self.signatures.profiles * self.effects[:, None]


@dataclass(frozen=True)
class Fit:
    """Shares (n, k) of the types in the counts (n,) of each place; part (n,) of redraws that agree, or None."""

    shares: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray | None


def learn_reference(places: Bins | Cells, reference: str | Path, label_key: str | None) -> Learned:
    """Signatures of a reference, and the platform's effects from the section's totals.

    Raises
    ------
    UsageError
        If the reference is not usable, or shares fewer genes with the section than it has types.
    """
    whole = read_reference(reference, label_key, places.genes)
    there = set(places.genes)
    common = [gene for gene in whole.genes if gene in there]
    _check_shared(len(common), whole, places, Path(reference).name)
    signatures = whole.on(common).informative(_MOST_GENES)
    totals = places.totals(signatures.genes)
    seen = (totals > 0) & (signatures.counts.sum(1) > 0)
    _check_shared(int(seen.sum()), whole, places, Path(reference).name)
    signatures = _kept(signatures, seen)
    effects = model.platform_effects(totals[seen], signatures.profiles)
    alike = np.abs(np.log(effects / np.median(effects))) < np.log(model.FOLD)
    notes = [
        *whole.notes,
        f"{len(common)} of the reference's {len(whole.genes)} genes are in {places.element}",
    ]
    if not alike.all():
        far = [gene for gene, same in zip(signatures.genes, alike, strict=True) if not same]
        notes.append(
            f"{len(far)} genes that reference and section see over {model.FOLD:g} times differently are left "
            f"out: {', '.join(far[:8])}{', ...' if len(far) > 8 else ''}"
        )
    signatures = replace(_kept(signatures, alike), notes=notes)
    return Learned(signatures, effects[alike], signatures.distinct(_SHOWN_GENES))


def _kept(signatures: Signatures, mask: np.ndarray) -> Signatures:
    return signatures.on([gene for gene, kept in zip(signatures.genes, mask, strict=True) if kept])


def _check_shared(shared: int, signatures: Signatures, places, file: str) -> None:
    """With fewer genes than types the shares are not determined."""
    if shared < len(signatures.types):
        raise UsageError(
            f"{shared} of the {len(signatures.genes)} genes of {file} have counts in {places.element}, fewer than its "
            f"{len(signatures.types)} types; infer more genes with stsr superres --genes, or check the gene names"
        )


def learn_markers(places: Bins | Cells, markers: str | Path) -> Learned:
    """Flat signatures over marker genes; without another platform there are no effects."""
    signatures = from_markers(read_markers(markers), places.genes)
    return Learned(signatures, np.ones(len(signatures.genes)), signatures.distinct(_SHOWN_GENES))


def learn_clusters(places: Bins | Cells, resolution: float, min_counts: float, seed: int) -> Learned:
    """Profiles of Leiden clusters of (at most 20,000 random) places, on the most counted genes.

    Raises
    ------
    UsageError
        If there are too few places with counts.
    """
    totals = places.totals(places.genes)
    first = np.sort(np.argsort(-totals, kind="stable")[:_MOST_GENES])
    genes = [places.genes[number] for number in first if totals[number] > 0]
    chosen = np.random.default_rng(seed).permutation(len(places))[:_CLUSTERED]
    is_chosen = np.zeros(len(places), bool)
    is_chosen[chosen] = True
    counts = np.concatenate([values[is_chosen[number]] for number, values, _ in places.blocks(genes)])
    counts = counts[counts.sum(1) >= max(min_counts, np.finfo(np.float32).tiny)]
    labels = model.clusters(counts, resolution, seed)
    sums = np.stack([counts[labels == label].sum(0) for label in range(labels.max() + 1)], axis=1)  # (g, k)
    types = [f"cluster {number}" for number in range(1, sums.shape[1] + 1)]
    if len(types) < 2:
        raise UsageError("all places are one cluster; raise --resolution, or give --reference or --markers")
    shown = model.ranked_markers(counts, labels, genes, _SHOWN_GENES)
    return Learned(Signatures(types, genes, sums.astype(np.float64)), np.ones(len(genes)), shown)


def fit(places: Bins | Cells, learned: Learned, draws: int, seed: int, progress: Progress) -> Fit:
    """The regression on all places.

    Parameters
    ----------
    places
        Where counts come from.
    learned
        Signatures.
    draws
        Redraws for the confidence; 0 for none. None are made where nobody knows the counts' standard deviation.
    seed
        Of the redraws.
    progress
        Called with (done, total, label).
    """
    uncertain = draws > 0 and places.uncertainty is not None
    shares = np.zeros((len(places), len(learned.signatures.types)), np.float32)
    totals = np.zeros(len(places), np.float32)
    confidence = np.zeros(len(places), np.float32) if uncertain else None
    done = 0
    for number, (where, counts, spread) in enumerate(places.blocks(learned.signatures.genes, uncertain)):
        weights = model.transcripts_by_type(counts, learned.matrix)
        shares[where] = model.proportions(weights)
        totals[where] = counts.sum(1)
        if uncertain:
            rng = np.random.default_rng([seed, number])
            confidence[where] = model.agreement(counts, spread, learned.matrix, weights, draws, rng)
        done += len(where)
        progress(done, len(places), "typing")
    return Fit(shares, totals, confidence)
