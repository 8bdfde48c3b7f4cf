"""Cell type proportions from counts: Poisson regression on signatures, platform effects, clusters, colours.

Counts y (n, g) of a place (a bin or a cell) are Poisson with mean ``sum_k w_k a_g s_gk``: s_gk is the fraction of gene
g in the transcripts of type k, a_g >= 0 the detection rate of the gene on this platform relative to the reference, and
w_k >= 0 the number of transcripts from that type. This is the model of RCTD (Cable et al. 2022, Nat Biotechnol 40:517)
without overdispersion. Expected counts of a super-resolved map are fitted with the same likelihood.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pandas as pd

from stsr.errors import UsageError

UNASSIGNED = "unassigned"
GREY = "#bdbdbd"
"""Colour of `UNASSIGNED`."""

_BLOCK = 8192  # places fitted together: three arrays of them x genes are in memory
_STEPS, _REDRAWN_STEPS = 200, 30  # redraws start near their end
_EVERY = 10  # steps between checks for convergence
_TOLERANCE = 1e-3  # the largest change of a converged share
_TINY = 1e-12
_AWAY = 0.05  # of the initial weight is spread over all types: updates cannot raise a weight of exactly 0
FOLD = 20.0
"""Genes whose detection rate differs more than this between two platforms are not comparable."""

# Common lineages by the beginning of their names, in the colours of Okabe-Ito and Tol, which colour-blind readers can
# distinguish.
_LINEAGES = {
    "malignant": "#cc3311", "cancer": "#cc3311", "tumor": "#cc3311", "tumour": "#cc3311",
    "epithelial": "#ee9966", "luminal": "#ee9966", "basal": "#aa6611", "myoepithelial": "#aa6611",
    "fibroblast": "#ddcc77", "caf": "#ddcc77", "stroma": "#ddcc77", "pericyte": "#999933", "pvl": "#999933",
    "endothelial": "#117733", "t_cell": "#0077bb", "cd8": "#0077bb", "cd4": "#33bbee", "nk": "#88ccee",
    "b_cell": "#332288", "plasma": "#7755cc", "macrophage": "#aa4499", "monocyte": "#cc79a7",
    "myeloid": "#882255", "dendritic": "#ff99cc", "mast": "#661100", "adipocyte": "#f0e442",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- regression


def platform_effects(totals: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    """Estimate the detection rate of each gene relative to the reference.

    As in RCTD, the whole section is treated as one mixture with log-normal deviations per gene: the mixture w >= 0
    minimises ``sum_g v_g (log Y_g - log sum_k w_k s_gk)^2``, and the residuals are the effects. The weight
    ``v_g = Y_g / (Y_g + 1)`` is small for genes with few counts, whose log is mostly noise.

    Parameters
    ----------
    totals
        Y (g,) counts of the whole section, all above 0.
    profiles
        s (g, k), with a value above 0 in each row.

    Returns
    -------
    effects
        a (g,), with geometric mean 1.
    """
    from scipy.optimize import minimize

    log_totals, trust = np.log(totals), totals / (totals + 1)

    def residual(logits: np.ndarray) -> np.ndarray:
        left = log_totals - np.log(np.maximum(profiles @ _softmax(logits), _TINY))
        return left - np.average(left, weights=trust)

    found = minimize(lambda logits: (trust * residual(logits) ** 2).sum(), np.zeros(profiles.shape[1]))
    left = residual(found.x)
    return np.exp(left - left.mean())


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def transcripts_by_type(
    counts: np.ndarray, signatures: np.ndarray, start: np.ndarray | None = None, steps: int = _STEPS
) -> np.ndarray:
    """Fit a Poisson regression with non-negative weights by maximum likelihood.

    The multiplicative updates ``w <- w * S^T (y / S w) / S^T 1`` are the EM algorithm of this model (Shepp & Vardi
    1982; Lee & Seung 2001): the likelihood never decreases, and weights stay non-negative.

    Parameters
    ----------
    counts
        (n, g), non-negative; measured or expected.
    signatures
        S (g, k): profiles times platform effects.
    start
        (n, k) weights near the solution; equal shares by default.
    steps
        Maximum number of updates; a place has converged when none of its shares changes by more than 0.001 in ten
        updates.

    Returns
    -------
    weights
        (n, k) float32: counts from each type. They add up to the counts of a place, except for counts of genes that
        are 0 in all signatures.
    """
    signatures = np.asarray(signatures, np.float32)
    reach = signatures.sum(0)  # (k,)
    weights = np.empty((len(counts), len(reach)), np.float32)
    for first in range(0, len(counts), _BLOCK):
        block = slice(first, first + _BLOCK)
        begun = None if start is None else start[block]
        weights[block] = _updated(np.asarray(counts[block], np.float32), signatures / reach, begun, steps)
    return weights


def _updated(counts: np.ndarray, shares: np.ndarray, start: np.ndarray | None, steps: int) -> np.ndarray:
    """Updates for signatures whose columns add up to 1, so that the division by ``S^T 1`` drops out."""
    total = counts.sum(1, keepdims=True)
    even = np.broadcast_to(total / shares.shape[1], (len(counts), shares.shape[1]))
    weights = even.copy() if start is None else (1 - _AWAY) * start + _AWAY * even
    moving = np.arange(len(counts))  # most places converge early
    for _ in range(0, steps, _EVERY):
        before = now = weights[moving]
        for _ in range(_EVERY):
            expected = now @ shares.T  # (moving, g)
            now = now * ((counts[moving] / np.maximum(expected, _TINY)) @ shares)
        weights[moving] = now
        moving = moving[(np.abs(now - before) > _TOLERANCE * total[moving]).any(1)]
        if not len(moving):
            break
    return weights


def proportions(weights: np.ndarray) -> np.ndarray:
    """Weights (n, k) as shares of their sum; 0 where it is 0."""
    total = weights.sum(1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def assign(shares: np.ndarray, counts: np.ndarray, min_probability: float, min_counts: float) -> np.ndarray:
    """Code (n,) of the type with the largest share, 1 to k; 0 for unassigned.

    Unassigned are places whose largest share is below ``min_probability`` or whose counts (n,) are below
    ``min_counts``.
    """
    codes = shares.argmax(1) + 1
    return np.where((shares.max(1) >= min_probability) & (counts >= min_counts), codes, 0)


def agreement(
    counts: np.ndarray,
    spread: np.ndarray,
    *,
    signatures: np.ndarray,
    weights: np.ndarray,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fraction (n,) of redrawn counts with the same largest type.

    Each value is redrawn independently from the gamma distribution with its mean and standard deviation. Errors that
    are correlated between genes, as in the samples of a model, are not reproduced.

    Parameters
    ----------
    counts, spread
        (n, g) mean and standard deviation.
    signatures
        S (g, k).
    weights
        (n, k) fitted to ``counts``.
    draws
        Number of redraws.
    rng
        A `numpy.random.Generator`.
    """
    same = np.zeros(len(counts), np.float32)
    label = weights.argmax(1)
    for first in range(0, len(counts), _BLOCK):
        block = slice(first, first + _BLOCK)
        mean, sd = counts[block], spread[block]
        varies = (mean > 0) & (sd > 0)
        shape = np.divide(mean, sd, out=np.ones_like(mean), where=varies) ** 2
        for _ in range(draws):
            drawn = rng.standard_gamma(shape, dtype=np.float32) * mean / shape
            drawn = np.where(varies, drawn, mean)
            again = transcripts_by_type(drawn, signatures, weights[block], _REDRAWN_STEPS)
            same[block] += again.argmax(1) == label[block]
    return same / draws


# ------------------------------------------------------------------------------------------------- clusters


def clusters(counts: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """Cluster places with the Leiden algorithm: labels (n,), 0 for the largest cluster.

    scanpy's usual steps: counts normalised to the median total and log-transformed, 30 principal components, 15 exact
    neighbours with Gaussian weights (Coifman et al. 2005).

    Parameters
    ----------
    counts
        (n, g).
    resolution
        Of the modularity: larger values give more clusters.
    seed
        Of components, neighbours and clusters.

    Raises
    ------
    UsageError
        If igraph is not installed, or there are too few places to cluster.
    """
    import anndata
    import scanpy as sc

    try:
        import igraph  # noqa: F401 - what scanpy's Leiden runs on
    except ImportError:
        raise UsageError(
            "clustering needs igraph; run: pip install igraph, or give --reference or --markers"
        ) from None
    if len(counts) < 50:
        raise UsageError(f"{len(counts)} places are too few to cluster; give --reference or --markers")
    cells = anndata.AnnData(np.asarray(counts, np.float32))
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=min(30, min(cells.shape) - 1), random_state=seed)
    # Exact neighbours, and nothing to compile.
    sc.pp.neighbors(cells, transformer="sklearn", method="gauss", random_state=seed)
    sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return cells.obs["leiden"].astype(int).to_numpy()


def ranked_markers(
    counts: np.ndarray, labels: np.ndarray, genes: list[str], most: int = 10
) -> list[list[str]]:
    """Marker genes of each label 0..k-1, ranked by Welch's t on log-normalised counts.

    p-values are not given: the clusters were made from the same counts.
    """
    import anndata
    import scanpy as sc

    cells = anndata.AnnData(np.asarray(counts, np.float32), var=pd.DataFrame(index=genes))
    cells.obs["label"] = pd.Categorical(labels.astype(str))
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.tl.rank_genes_groups(cells, "label", method="t-test", n_genes=most)
    found = cells.uns["rank_genes_groups"]["names"]
    return [[str(gene) for gene in found[str(label)]] for label in range(labels.max() + 1)]


# -------------------------------------------------------------------------------------------------- colours


def colours(types: list[str]) -> list[str]:
    """A colour (hex) for each type. It depends on the name, so that it is the same in all sections and runs.

    Common lineages have fixed colours. Other names take a colour from a list, by the number at their end
    ("cluster 3") or by their hash. If two types of a section would share a colour, the later one takes the next free
    colour.
    """
    from scanpy.plotting.palettes import default_102

    wheel = [colour.lower() for colour in default_102]
    taken: set[str] = {GREY}
    found = {}
    for name in sorted(types, key=lambda name: (_lineage(name) is None, name)):
        place = _place(name) % len(wheel)
        colour = GREY if name == UNASSIGNED else _lineage(name) or wheel[place]
        while colour in taken and name != UNASSIGNED:
            place = (place + 1) % len(wheel)
            colour = wheel[place]
        taken.add(colour)
        found[name] = colour
    return [found[name] for name in types]


def _lineage(name: str) -> str | None:
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    return next((colour for begin, colour in _LINEAGES.items() if plain.startswith(begin)), None)


def _place(name: str) -> int:
    number = name.rpartition(" ")[2]
    return int(number) if number.isdigit() else int.from_bytes(blake2b(name.encode(), digest_size=4).digest())
