"""Contrastive losses and imputation of C3-Diff, as functions of tensors.

C3-Diff: cross-modal cross-content contrastive diffusion for spatial transcriptomics. M are modality features and C
content features of the image (h) and of the low-resolution map (y): unit vectors (b, d), one per sample, with the same
tile in row k of each. Samples of a minibatch must be different tiles; otherwise negatives are false.

``present`` (b,) bool marks the samples that have a low-resolution map. M_y and C_y of the others are not used, neither
as anchor, nor as positive, nor as negative.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from stsr.methods.method import random_normal


def hypersphere_noise(unit: torch.Tensor, noise_sd: float, generator: torch.Generator) -> torch.Tensor:
    """Equation 1: ``Norm(z + mu)``, ``mu ~ N(0, noise_sd^2)`` per sample and component.

    Parameters
    ----------
    unit
        (b, d) unit vectors.
    noise_sd
        Standard deviation; 0 returns the vectors unchanged.
    generator
        Source of mu.

    Returns
    -------
    torch.Tensor
        (b, d) unit vectors.
    """
    if noise_sd == 0:
        return unit
    mu = random_normal(unit.shape, generator, unit.device)
    return F.normalize(unit + noise_sd * mu, dim=-1)


def contrast(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    negatives: torch.Tensor,
    temperature: torch.Tensor | float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_cl: ``-log( exp(z.z+ / tau) / (exp(z.z+ / tau) + sum_k exp(z.z-_k / tau)) )``.

    Parameters
    ----------
    anchor, positive
        z and z+ (n, d).
    negatives
        z- (n, m, d), or (m, d) if the same for all anchors.
    temperature
        tau, positive.
    allowed
        Negatives to include, (n, m) or (m,) bool; all by default.

    Returns
    -------
    torch.Tensor
        (n,), at least 0; 0 where no negative is allowed.
    """
    # Products and sums, because autocast would run a matrix product in half precision, and tau is small.
    alike = (anchor * positive).sum(-1, keepdim=True) / temperature  # (n, 1)
    unlike = (anchor[:, None] * negatives).sum(-1) / temperature  # (n, m)
    if allowed is not None:
        unlike = unlike.masked_fill(~allowed, -torch.inf)
    return torch.logsumexp(torch.cat([alike, unlike], dim=-1), dim=-1) - alike[:, 0]


def modal_loss(
    image: torch.Tensor,
    lr: torch.Tensor,
    temperature: torch.Tensor | float,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_modal: ``z = M_h^j, z+ = M_h^k (k != j), z- = all M_y``, plus the same with the modalities exchanged.

    M captures what distinguishes the modalities in all tiles. Each direction is the mean over all pairs (j, k).

    Parameters
    ----------
    image, lr
        M_h and M_y (b, d) unit vectors.
    temperature
        tau.
    present
        (b,) bool; all by default.

    Returns
    -------
    torch.Tensor
        (), 0 without a pair of samples or without a negative.
    """
    present = _all_present(image, present)
    everywhere = torch.ones_like(present)
    total = image.new_zeros(())
    for own, other, ours, theirs in ((image, lr, everywhere, present), (lr, image, present, everywhere)):
        pairs = ours[:, None] & ours & _different(ours)  # (b, b)
        first, second = pairs.nonzero(as_tuple=True)  # (n,) each
        if len(first):
            total = total + contrast(own[first], own[second], other, temperature, theirs).mean()
    return total


def content_loss(
    image: torch.Tensor,
    lr: torch.Tensor,
    temperature: torch.Tensor | float,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_content: ``z = C_h^j, z+ = C_y^j, z- = C_h^k and C_y^k (k != j)``, plus the same with the modalities exchanged.

    C captures what the two modalities of a tile share.

    Parameters
    ----------
    image, lr
        C_h and C_y (b, d) unit vectors.
    temperature
        tau.
    present
        (b,) bool; all by default. Only samples with both modalities are anchors.

    Returns
    -------
    torch.Tensor
        (), 0 for a single sample.
    """
    present = _all_present(image, present)
    anchors = present.nonzero(as_tuple=True)[0]  # (n,)
    if not len(anchors):
        return image.new_zeros(())
    others = _different(present)[anchors]  # (n, b)
    negatives = torch.cat([image, lr])  # (2 b, d)
    allowed = torch.cat([others, others & present], dim=1)  # (n, 2 b)
    return (
        contrast(image[anchors], lr[anchors], negatives, temperature, allowed).mean()
        + contrast(lr[anchors], image[anchors], negatives, temperature, allowed).mean()
    )


def inter_loss(
    modality: torch.Tensor, content: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """L_inter: ``z = M_h^j, z+ = C_h^j, z- = C_h^k (k != j)``, between the two spheres of the image.

    Parameters
    ----------
    modality, content
        M_h and C_h (b, d) unit vectors.
    temperature
        tau.

    Returns
    -------
    torch.Tensor
        (), 0 for a single sample.
    """
    others = _different(_all_present(modality, None))  # (b, b)
    return contrast(modality, content, content, temperature, others).mean()


def imputation_weights(
    image: torch.Tensor, present: torch.Tensor, temperature: float, alike: bool = True
) -> torch.Tensor:
    """``w_kl = softmax_k( cos(M_h^l, M_h^k) / tau1 )`` over the samples k that have a low-resolution map.

    Parameters
    ----------
    image
        M_h (b, d) unit vectors.
    present
        (b,) bool.
    temperature
        tau1.
    alike
        False for equal weights, the arithmetic mean, for comparison.

    Returns
    -------
    torch.Tensor
        (b, b), with the weights of sample l in row l; rows sum to 1, or to 0 if no sample has a map.
    """
    cosine = (image[:, None] * image).sum(-1)  # (b, b)
    logits = cosine / temperature if alike else torch.zeros_like(cosine)
    # Finite, because a softmax over -inf only would be NaN; the product then sets those rows to 0.
    return logits.masked_fill(~present, -1e9).softmax(-1) * present


def impute(
    features: torch.Tensor, weights: torch.Tensor, present: torch.Tensor, strength: float
) -> torch.Tensor:
    """Dynamic imputation: ``M_y^l = strength sum_k w_kl M_y^k`` for samples l without a low-resolution map.

    A strength (alpha in the paper, beta for C) of 0 is zero padding.

    Parameters
    ----------
    features
        (b, ...) M_y or C_y; rows that are not present are ignored.
    weights
        (b, b), from `imputation_weights`.
    present
        (b,) bool.
    strength
        alpha or beta, from `falling`.

    Returns
    -------
    torch.Tensor
        Like ``features``; rows that are present are unchanged.
    """
    keep = present.reshape(-1, *[1] * (features.ndim - 1))  # (b, 1, ...)
    known = torch.where(keep, features, 0)
    if strength == 0:
        return known
    filled = torch.einsum("lk,k...->l...", weights.to(features.dtype), known)
    return torch.where(keep, features, strength * filled)


def falling(start: float, progress: float) -> float:
    """Alpha and beta: ``start`` at the start of training, falling linearly to 0 at its end (progress 1)."""
    return start * min(max(1 - progress, 0.0), 1.0)


def _all_present(like: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """``present``, or all samples by default: (b,) bool."""
    return torch.ones(len(like), dtype=torch.bool, device=like.device) if present is None else present


def _different(samples: torch.Tensor) -> torch.Tensor:
    """Pairs of different samples: (b, b) bool, true off the diagonal."""
    return ~torch.eye(len(samples), dtype=torch.bool, device=samples.device)
