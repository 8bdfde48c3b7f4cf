"""Signatures on a section's genes, and the regression that gives each bin or cell its cell type proportions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stsr.errors import UsageError
from stsr.progress import Progress
from stsr.store.places import Places
from stsr.verbs.celltype import model
from stsr.verbs.celltype.job import CelltypeJob
from stsr.verbs.celltype.signatures import Signatures, from_markers, read_markers, read_reference

_MOST_GENES = 2000  # the most informative ones: more cost time and memory and add little
_CLUSTERED = 20_000  # places given to Leiden; all are then assigned by the clusters' profiles
_SHOWN_GENES = 10  # per type


@dataclass(frozen=True)
class Learned:
    """Signatures on the genes of a section, with platform effects.

    Attributes
    ----------
    signatures
        One per type, on the genes used.
    effects
        (g,) platform effect of each gene: its detection rate in this section relative to the signatures' source.
    shown
        The most distinctive genes of each type.
    """

    signatures: Signatures
    effects: np.ndarray
    shown: list[list[str]]

    @property
    def matrix(self) -> np.ndarray:
        """(g, k) expected counts of each gene per transcript of each type."""
        return self.signatures.profiles * self.effects[:, None]


@dataclass(frozen=True)
class Fit:
    """Cell type proportions.

    Attributes
    ----------
    shares
        (n, k) proportion of each type in the counts of each place.
    counts
        (n,) counts of the genes used.
    confidence
        (n,) fraction of redraws with the same largest type; None without redraws.
    """

    shares: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray | None


def learn(places: Places, job: CelltypeJob) -> Learned:
    """Signatures of a reference, of marker lists, or of clusters, as the job specifies.

    Raises
    ------
    UsageError
        If a file is not usable or shares too few genes with the section, or there are too few places to cluster.
    """
    if job.markers is not None:
        return _from_marker_lists(places, job.markers)
    if job.reference is not None:
        return _from_reference(places, Path(job.reference), job.label_key)
    return _from_clusters(places, job)


def _from_reference(places: Places, reference: Path, label_key: str | None) -> Learned:
    """Signatures of a reference, with platform effects estimated from the section's totals."""
    whole = read_reference(reference, label_key, places.genes)
    common = np.isin(whole.genes, places.genes)
    _check_shared(common.sum(), whole, places, reference.name)
    signatures = whole.take(common).informative(_MOST_GENES)
    totals = places.totals(signatures.genes)
    seen = (totals > 0) & (signatures.counts.sum(1) > 0)
    _check_shared(seen.sum(), whole, places, reference.name)
    signatures = signatures.take(seen)
    effects = model.platform_effects(totals[seen], signatures.profiles)
    alike = np.abs(np.log(effects / np.median(effects))) < np.log(model.FOLD)
    notes = [*whole.notes, f"{common.sum()} of the reference's {len(whole.genes)} genes are in {places.name}"]
    if not alike.all():
        far = signatures.take(~alike).genes
        notes.append(
            f"{len(far)} genes whose detection differs more than {model.FOLD:g}-fold between reference and section are "
            f"left out: {', '.join(far[:8])}{', ...' if len(far) > 8 else ''}"
        )
    signatures = replace(signatures.take(alike), notes=notes)
    return Learned(signatures, effects[alike], signatures.distinct(_SHOWN_GENES))


def _check_shared(shared: int, signatures: Signatures, places: Places, file: str) -> None:
    """Refuse fewer genes than types: proportions would not be determined."""
    if shared < len(signatures.types):
        raise UsageError(
            f"{shared} of the {len(signatures.genes)} genes of {file} have counts in {places.name}, fewer than its "
            f"{len(signatures.types)} types; infer more genes with stsr superres --genes, or check the gene names"
        )


def _from_marker_lists(places: Places, markers: str | Path) -> Learned:
    """Flat signatures over marker genes, without platform effects."""
    signatures = from_markers(read_markers(markers), places.genes)
    return Learned(signatures, np.ones(len(signatures.genes)), signatures.distinct(_SHOWN_GENES))


def _from_clusters(places: Places, job: CelltypeJob) -> Learned:
    """Profiles of Leiden clusters of at most 20,000 random places, on the genes with the most counts."""
    totals = places.totals(places.genes)
    first = np.sort(np.argsort(-totals, kind="stable")[:_MOST_GENES])
    genes = [places.genes[number] for number in first if totals[number] > 0]
    chosen = np.random.default_rng(job.seed).permutation(places.count)[:_CLUSTERED]
    is_chosen = np.zeros(places.count, bool)
    is_chosen[chosen] = True
    counts = np.concatenate([values[is_chosen[number]] for number, values, _ in places.blocks(genes)])
    counts = counts[counts.sum(1) >= max(job.min_counts, np.finfo(np.float32).tiny)]
    labels = model.clusters(counts, job.resolution, job.seed)
    sums = np.stack([counts[labels == label].sum(0) for label in range(labels.max() + 1)], axis=1)  # (g, k)
    types = [f"cluster {number}" for number in range(1, sums.shape[1] + 1)]
    if len(types) < 2:
        raise UsageError("only one cluster was found; raise --resolution, or give --reference or --markers")
    shown = model.ranked_markers(counts, labels, genes, _SHOWN_GENES)
    return Learned(Signatures(types, genes, sums.astype(np.float64)), np.ones(len(genes)), shown)


def fit(places: Places, learned: Learned, *, draws: int, seed: int, progress: Progress) -> Fit:
    """Fit the regression to all places, block by block.

    Parameters
    ----------
    places
        Bins or cells with counts.
    learned
        Signatures.
    draws
        Redraws for the confidence; 0 for none. None are made if the counts' standard deviation is not known.
    seed
        Of the redraws.
    progress
        Called with (done, total, label).
    """
    uncertain = draws > 0 and places.uncertainty is not None
    shares = np.zeros((places.count, len(learned.signatures.types)), np.float32)
    totals = np.zeros(places.count, np.float32)
    confidence = np.zeros(places.count, np.float32)
    done = 0
    for number, (where, counts, spread) in enumerate(places.blocks(learned.signatures.genes, uncertain)):
        weights = model.transcripts_by_type(counts, learned.matrix)
        shares[where] = model.proportions(weights)
        totals[where] = counts.sum(1)
        if spread is not None:
            rng = np.random.default_rng([seed, number])
            confidence[where] = model.agreement(
                counts, spread, signatures=learned.matrix, weights=weights, draws=draws, rng=rng
            )
        done += len(where)
        progress(done, places.count, "typing")
    return Fit(shares, totals, confidence if uncertain else None)
