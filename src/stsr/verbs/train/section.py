"""A training section: counts on disk, image read tile by tile, and tiles with simulated spots."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.histology.image import Image
from stsr.methods.batch import Requirements
from stsr.store.section import Section
from stsr.verbs.train.counts import BinCounts


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """What training reads of a section."""

    name: str
    """Name of the section."""
    grid: Grid
    """Bins."""
    image: Image
    """The H&E, on disk."""
    counts: BinCounts
    """Counts per bin of the panel's genes."""
    others: BinCounts | None
    """Counts per bin of other genes, which denoising needs; None if spots are not denoised."""
    measured: np.ndarray
    """(g,) bool: whether the section measured each gene of the panel."""
    tissue: np.ndarray
    """(height, width) bool."""
    usable: np.ndarray
    """(height, width) bool, bins that are not excluded."""
    trainable: np.ndarray
    """(height, width) bool, bins that are not used for validation, either."""
    means: np.ndarray
    """(kinds, g) float32: `stsr.methods.batch.lr_mean` of each kind of spots, of half of all counts."""
    divided: float
    """Side of the bins from which counts were divided by area, in bins; 0 for counts of transcripts."""
    per_spot: np.ndarray
    """(kinds,) counts of the panel in a mean spot, of half of all counts."""

    def update(self, digest: hashlib._Hash) -> None:
        """Add everything that training uses to a hash; of the image, its pixels at the size of a bin."""
        digest.update(repr((self.name, self.grid, self.image.px_to_um.tolist())).encode())
        for array in (self.image.read(self.grid), self.measured, self.tissue, self.usable, self.means):
            digest.update(np.ascontiguousarray(array).data)
        self.counts.update(digest)
        if self.others is not None:
            digest.update(np.ascontiguousarray(self.trainable).data)
            self.others.update(digest)


def check_section(section: Section, requirements: Requirements) -> None:
    """Check that a section can be used for training.

    Raises
    ------
    StsrError
        If it has no counts per bin or no image, or its bins do not add up to those of the method.
    """
    if section.hr is None:
        raise StsrError(
            f"{section.name} has no high-resolution counts to train on; prepare a Xenium folder: stsr prepare FOLDER"
        )
    if section.image is None:
        raise StsrError(
            f"no H&E image in {section.name}; run: stsr prepare FOLDER --he he.ome.tif --overwrite"
        )
    factor = requirements.bin_um / section.hr.grid.bin_um
    if abs(factor - round(factor)) > 1e-6 or round(factor) < 1:
        raise StsrError(
            f"{section.name} has bins of {section.hr.grid.bin_um:g} um and the method needs "
            f"{requirements.bin_um:g} um; run: stsr prepare FOLDER --bin-um {requirements.bin_um:g} --overwrite"
        )
