"""Does the H&E fit what was measured? Its overlap with the counts, and whether staining follows them."""

from __future__ import annotations

import numpy as np

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.histology.files import Picture
from stsr.histology.tissue import darkness

_LEAST_OVERLAP = 0.5  # of what was measured
_CHECK_UM = 50.0
_POOR_FIT = 0.15  # correlation of staining and counts; right alignments here reach 0.5 and more
_CLEARLY_BETTER = 0.2


def overlap(picture: Picture, counts: np.ndarray, grid: Grid, what: str = "transcripts") -> float:
    """Part of what was measured that the image covers.

    Parameters
    ----------
    picture
        The H&E.
    counts
        Per bin (height, width).
    grid
        The bins.
    what
        Was measured; for the message.

    Raises
    ------
    StsrError
        If the image covers less than half.
    """
    share = float(counts[picture.covered(grid)].sum() / max(counts.sum(), 1))
    if share < _LEAST_OVERLAP:
        raise StsrError(
            f"the H&E covers only {share:.0%} of the {what}: its alignment puts it elsewhere; give the alignment made "
            f"for this image with --alignment"
        )
    return share


def fit(picture: Picture, counts: np.ndarray, grid: Grid, sparse: bool = False) -> tuple[float, list[str]]:
    """How well staining and counts agree, and what seems wrong if they do not.

    Nuclei stain dark and hold the transcripts, so over 50 um both rise and fall together. The same image mirrored or
    turned about its centre shows how much of that is chance.

    Parameters
    ----------
    picture, counts, grid
        As for ``overlap``.
    sparse
        Counts are of spots, at their centres' bins only. Within tissue their number says little about staining, so
        only an image that is clearly better turned is worth a word.

    Returns
    -------
    correlation, warnings
        Pearson, over the bins that the image covers; sentences, empty if all is well.
    """
    grid, counts = _coarser(grid, counts)
    where = counts > 0 if sparse else np.ones(grid.shape, bool)
    picture = picture.overview(_CHECK_UM / 4)
    own = _agreement(picture, counts, grid, where)
    others = {
        name: _agreement(Picture(picture.levels, picture.px_to_um @ turn), counts, grid, where)
        for name, turn in _turns(picture).items()
    }
    best = max(others, key=others.get)
    if others[best] > max(own, 0.0) + _CLEARLY_BETTER:
        return own, [
            f"the H&E seems {best}: staining follows the counts better that way (correlation {others[best]:.2f}, as "
            f"aligned {own:.2f}); check the alignment file"
        ]
    if own < _POOR_FIT and not sparse:
        return own, [
            f"staining and counts hardly agree (correlation {own:.2f}); look at the section before using it"
        ]
    return own, []


def _coarser(grid: Grid, counts: np.ndarray) -> tuple[Grid, np.ndarray]:
    factor = max(1, round(_CHECK_UM / grid.bin_um))
    height, width = grid.height // factor * factor, grid.width // factor * factor
    blocks = counts[:height, :width].reshape(height // factor, factor, width // factor, factor).sum((1, 3))
    return Grid(grid.x0_um, grid.y0_um, grid.bin_um * factor, *blocks.shape), blocks


def _agreement(picture: Picture, counts: np.ndarray, grid: Grid, where: np.ndarray) -> float:
    seen = picture.covered(grid) & where
    if seen.sum() < 20:
        return 0.0
    stain, density = darkness(picture.on(grid))[seen], np.log1p(counts[seen])
    if stain.std() == 0 or density.std() == 0:
        return 0.0
    # A turn that leaves part of the counts without an image must not win by the rest.
    return float(np.corrcoef(stain, density)[0, 1]) * float(counts[seen].sum() / counts.sum())


def _turns(picture: Picture) -> dict[str, np.ndarray]:
    """Affines (3, 3), in pixels, that mirror or turn the image about its centre."""
    _, height, width = picture.levels[0].shape
    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2] = -width / 2, -height / 2
    back[:2, 2] = width / 2, height / 2
    parts = {
        "mirrored left to right": [[-1, 0], [0, 1]],
        "mirrored top to bottom": [[1, 0], [0, -1]],
        "turned by 180 degrees": [[-1, 0], [0, -1]],
        "turned by 90 degrees": [[0, -1], [1, 0]],
        "turned by 270 degrees": [[0, 1], [-1, 0]],
        "mirrored and turned by 90 degrees": [[0, 1], [1, 0]],
        "mirrored and turned by 270 degrees": [[0, -1], [-1, 0]],
    }
    turns = {}
    for name, part in parts.items():
        middle = np.eye(3)
        middle[:2, :2] = part
        turns[name] = back @ middle @ to_centre
    return turns
