"""Cell types from counts: a Poisson regression on signatures, with platform effects; clusters where there are none.

Counts y (n, g) of a place (a bin, a cell) are Poisson with mean ``sum_k w_k a_g s_gk``: s_gk is the share of gene g in
the transcripts of type k, a_g >= 0 how much better or worse than the reference this platform sees the gene, and
w_k >= 0 how many transcripts are of that type. This is the model of RCTD (Cable et al. 2022, Nat Biotechnol 40:517)
without its overdispersion. Expected counts of a super-resolved map go through the same likelihood.
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
_EVERY, _TOLERANCE = 10, 1e-3  # steps between looks at the change of a share, and the change that is none
_TINY = 1e-12
_AWAY = 0.05  # of a start's weight goes to all types: the updates never leave a weight of exactly 0
FOLD = 20.0
"""A gene that two platforms see so differently is not the same measurement."""

# Lineages that most references have, by what their names begin with; Okabe-Ito's and Tol's colours, so that neighbours
# in tissue differ for colour-blind eyes as well.
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
    """How much better or worse than the reference a platform sees each gene.

    As in RCTD, the whole section is one mixture whose genes deviate log-normally: the mixture w >= 0 that minimises
    ``sum_g v_g (log Y_g - log sum_k w_k s_gk)^2`` is found, and what is left are the effects. ``v_g = Y_g / (Y_g + 1)``
    lets genes of few counts, whose log is mostly noise, speak less.

    Parameters
    ----------
    totals
        Y (g,) counts of the whole section, above 0.
    profiles
        s (g, k), each row above 0 somewhere.

    Returns
    -------
    effects
        a (g,), of geometric mean 1.
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
    counts: np.ndarray, signatures: np.ndarray, start=None, steps: int = _STEPS
) -> np.ndarray:
    """Maximum likelihood of a Poisson regression with non-negative weights.

    The multiplicative updates ``w <- w * S^T (y / S w) / S^T 1`` are the EM algorithm of this model (Shepp & Vardi
    1982; Lee & Seung 2001): the likelihood never falls, and weights stay non-negative.

    Parameters
    ----------
    counts
        (n, g), not negative, whole or expected.
    signatures
        S (g, k): profiles times platform effects.
    start
        (n, k) weights near the solution; equal shares by default.
    steps
        At most so many updates; a place is done when none of its shares changed by more than 0.001 in ten.

    Returns
    -------
    weights
        (n, k) float32: how many of the counts are of each type. They add up to the counts of a place, as far as any
        type can have them.
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
    """The updates for signatures whose columns add up to 1, which makes ``S^T 1`` vanish."""
    total = counts.sum(1, keepdims=True)
    even = np.broadcast_to(total / shares.shape[1], (len(counts), shares.shape[1]))
    weights = even.copy() if start is None else (1 - _AWAY) * start + _AWAY * even
    moving = np.arange(len(counts))  # most places are done long before the last
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
    """Shares (n, k) of weights (n, k); 0 where there is nothing."""
    total = weights.sum(1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def assign(shares: np.ndarray, counts: np.ndarray, min_probability: float, min_counts: float) -> np.ndarray:
    """Code (n,) of the type with the largest share, 1 to k; 0 for unassigned.

    Unassigned: the largest share is below ``min_probability`` or whose counts (n,) are below ``min_counts``.
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
    """Part (n,) of redrawn counts whose largest type is the same.

    Each value is redrawn from the gamma distribution with its mean and standard deviation, on its own: genes that err
    together in the samples of a model do not do so here, so that the agreement is that of independent errors.

    Parameters
    ----------
    counts, spread
        (n, g) mean and standard deviation.
    signatures
        S (g, k).
    weights
        (n, k), those of ``counts``.
    draws
        How many.
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
    """Leiden clusters (n,) of places, 0 the largest.

    Counts are normalised to the median total and logged; 30 principal components; 15 exact
    neighbours with Gaussian weights (Coifman et al. 2005), by scanpy.

    Parameters
    ----------
    counts
        (n, g).
    resolution
        Of the modularity: more is finer.
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
            "clusters need igraph; run: pip install igraph, or give --reference or --markers"
        ) from None
    if len(counts) < 50:
        raise UsageError(f"{len(counts)} places are too few to cluster; give --reference or --markers")
    cells = anndata.AnnData(np.asarray(counts, np.float32))
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=min(30, min(cells.shape) - 1), random_state=seed)
    sc.pp.neighbors(
        cells, transformer="sklearn", method="gauss", random_state=seed
    )  # exact, nothing to compile
    sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    return cells.obs["leiden"].astype(int).to_numpy()


def ranked_markers(
    counts: np.ndarray, labels: np.ndarray, genes: list[str], most: int = 10
) -> list[list[str]]:
    """The genes of each label 0..k-1 that set it apart: by Welch's t on log-normalised counts, best first.

    The clusters were made from the same counts, so the order means something and p-values would not.
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
    """A colour (hex) for each type, by its name alone, so that sections and runs agree.

    Common lineages have one each; a number at the end ("cluster 3") counts through a list; other names are hashed to
    it. Only where two names of one section would share a colour does the later one take the next that is free.
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
