"""Check that the H&E fits the counts: that it covers them, and that staining correlates with them."""

from __future__ import annotations

import numpy as np
from scipy.linalg import block_diag

from stsr.errors import StsrError
from stsr.geometry.grid import Grid, add_up
from stsr.histology.image import Image
from stsr.histology.tissue import darkness
from stsr.verbs.prepare import registration

_LEAST_OVERLAP = 0.5  # share of the counts
_CHECK_UM = 50.0
_POOR_FIT = 0.15  # correlation of staining and counts; correct alignments reach 0.5 and more
_POOR_DETAIL = 0.08  # the same for fine structure; correct alignments reach 0.2
_CLEARLY_BETTER = 0.2  # in correlation


def overlap(image: Image, counts: np.ndarray, grid: Grid, what: str = "transcripts") -> float:
    """Share of the counts (0..1) that the image covers.

    Parameters
    ----------
    image
        The H&E.
    counts
        Counts per bin (height, width).
    grid
        The bins.
    what
        What was counted, for the message.

    Raises
    ------
    StsrError
        If the image covers less than half.
    """
    share = float(counts[image.covered(grid)].sum() / max(counts.sum(), 1))
    if share < _LEAST_OVERLAP:
        raise StsrError(
            f"the H&E covers only {share:.0%} of the {what}: its alignment belongs to another image; give the one made "
            f"for this image with --alignment"
        )
    return share


def fit(image: Image, counts: np.ndarray, grid: Grid, sparse: bool = False) -> tuple[float, list[str]]:
    """Correlate staining and counts, and warn of a wrong alignment.

    Nuclei stain dark and hold the transcripts, so the two correlate at 50 um. The same image mirrored or rotated about
    its centre shows how much of the correlation is chance.

    Parameters
    ----------
    image, counts, grid
        As for ``overlap``.
    sparse
        Counts are of spots, at their centres' bins only. Within tissue such counts correlate weakly with staining, so
        a low correlation alone gives no warning.

    Returns
    -------
    correlation, warnings
        Pearson correlation over the bins that the image covers; warnings, if any.
    """
    given = image, counts, grid
    grid, counts = _coarser(grid, counts)
    where = counts > 0 if sparse else np.ones(grid.shape, bool)
    image = image.overview(_CHECK_UM / 4)
    own = _agreement(image, counts, grid, where)
    others = {
        name: _agreement(image.moved(image.px_to_um @ turn), counts, grid, where)
        for name, turn in _turns(image).items()
    }
    best = max(others, key=lambda name: others[name])
    if others[best] > max(own, 0.0) + _CLEARLY_BETTER:
        return own, [
            f"the H&E seems {best}: staining would then correlate better with counts ({others[best]:.2f} instead of "
            f"{own:.2f}); check the alignment file"
        ]
    return own, [] if own >= _POOR_FIT or sparse else _check_detail(*given, own)


def _check_detail(image: Image, counts: np.ndarray, grid: Grid, correlation: float) -> list[str]:
    """Warnings where staining and counts do not correlate at 50 um: by their fine structure.

    Tissue that fills the slide differs little in its mean density, whatever the alignment.
    """
    fine = registration.agreement(image, counts, grid)
    if fine >= _POOR_DETAIL:
        return []
    for name, turn in _turns(image).items():
        if registration.agreement(image.moved(image.px_to_um @ turn), counts, grid) > fine + _POOR_DETAIL:
            return [
                f"the H&E seems {name}: nuclei would then lie on the counts; check the image and its alignment"
            ]
    return [f"staining and counts hardly correlate ({correlation:.2f}); inspect the section before using it"]


def _coarser(grid: Grid, counts: np.ndarray) -> tuple[Grid, np.ndarray]:
    """The grid and its counts in bins of about `_CHECK_UM`."""
    factor = max(1, round(_CHECK_UM / grid.bin_um))
    height, width = grid.height // factor * factor, grid.width // factor * factor
    blocks = add_up(counts[:height, :width], factor)
    return Grid(grid.x0_um, grid.y0_um, grid.bin_um * factor, *blocks.shape), blocks


def _agreement(image: Image, counts: np.ndarray, grid: Grid, where: np.ndarray) -> float:
    """Correlation of staining and counts, times the share of the counts that the image covers."""
    seen = image.covered(grid) & where
    if seen.sum() < 20:
        return 0.0
    stain, density = darkness(image.read(grid))[seen], np.log1p(counts[seen])
    if stain.std() == 0 or density.std() == 0:
        return 0.0
    # A rotation that leaves part of the counts without an image must not be preferred for the rest.
    return float(np.corrcoef(stain, density)[0, 1]) * float(counts[seen].sum() / counts.sum())


def _turns(image: Image) -> dict[str, np.ndarray]:
    """Affines (3, 3), in pixels, that mirror or rotate the image about its centre."""
    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2] = -image.width / 2, -image.height / 2
    back[:2, 2] = image.width / 2, image.height / 2
    parts = {
        "mirrored left to right": [[-1, 0], [0, 1]],
        "mirrored top to bottom": [[1, 0], [0, -1]],
        "rotated by 180 degrees": [[-1, 0], [0, -1]],
        "rotated by 90 degrees": [[0, -1], [1, 0]],
        "rotated by 270 degrees": [[0, 1], [-1, 0]],
        "mirrored and rotated by 90 degrees": [[0, 1], [1, 0]],
        "mirrored and rotated by 270 degrees": [[0, -1], [-1, 0]],
    }
    return {name: back @ block_diag(part, 1.0) @ to_centre for name, part in parts.items()}
