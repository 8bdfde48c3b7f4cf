"""What the output folders of Space Ranger have in common: the image that positions refer to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stsr.errors import StsrError
from stsr.files import find, need, reading
from stsr.histology import files as he
from stsr.histology.image import Image, scaling, um_per_px_of
from stsr.platforms.source import Options

MATRICES = ("filtered_feature_bc_matrix.h5", "*filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
"""Names of the file with the counts, in the order of preference."""

# Of public data sets, *image.tif is the CytAssist's and *tissue_image.* the microscope's.
_FULL = ("*fullres*", "*full_image*", "*tissue_image*", "*image*")
_NOT_FULL = ("hires", "lowres", "cytassist")
_ENDINGS = (*he.TIFF_ENDINGS, ".jpg", ".jpeg", ".png")
_INSIDE = 0.9  # least share of the positions inside the image; with fewer it is another image


@dataclass(frozen=True)
class Registration:
    """How pixels of the full-resolution image lie in the section."""

    px_to_um: np.ndarray
    """Affine (3, 3) from pixels of the full-resolution image to um."""
    pixels: np.ndarray
    """(n, 2) x and y of spots or bins in that image."""
    what: str
    """What lies there, for messages: ``spots``."""


def open_image(
    folders: Iterable[Path],
    spatial: Path,
    options: Options,
    registration: Registration,
    warnings: list[str],
) -> Image | None:
    """The full-resolution image, else the hires image with a warning; None with a warning if there is neither.

    Parameters
    ----------
    folders
        Where the full-resolution image is searched, if the options do not name it.
    spatial
        Folder with the hires image and its scale.
    options
        Image, and its alignment to um, if positions do not refer to its pixels.
    registration
        Of the full-resolution image.
    warnings
        Added to.

    Raises
    ------
    StsrError
        If the image is damaged, or not that of the positions.
    """
    image = options.he or _found(folders)
    px_to_um, factor = registration.px_to_um, 1.0
    if image is not None:
        levels, _ = he.open_levels(image)
        if options.alignment is not None:
            px_to_um = he.read_alignment(options.alignment)
            he.check_pixel(px_to_um, None, image.name)
            return Image(levels, px_to_um, path=image)
    else:
        image = find(spatial, "tissue_hires_image.png", "tissue_hires_image.*", "*hires_image.png")
        if image is None:
            where = spatial.parent
            warnings.append(
                f"no image in {where}: superres needs one; add the full-resolution image with --he"
            )
            return None
        factor = _hires_factor(need(spatial, "scalefactors_json.json", what="the scale of the images"))
        levels, _ = he.open_levels(image)
        px_to_um = px_to_um @ scaling(1 / factor)
        warnings.append(
            f"only {image.name} ({um_per_px_of(px_to_um):.3g} um per pixel) is available and cells are not resolved; "
            f"give the full-resolution image with --he"
        )
    _check_inside(levels[0], registration, image, factor)
    return Image(levels, px_to_um, path=image)


def _found(folders: Iterable[Path]) -> Path | None:
    """The full-resolution image, if it lies beside the results."""
    for place in dict.fromkeys(folders):
        for pattern in _FULL:
            for file in sorted(place.glob(pattern)):
                small = file.name.startswith("._") or any(word in file.name.lower() for word in _NOT_FULL)
                if file.name.lower().endswith(_ENDINGS) and not small:
                    return file
    return None


def _hires_factor(file: Path) -> float:
    factor = float(scale_factors(file).get("tissue_hires_scalef", 0))
    with reading(file):
        if not 0 < factor <= 1.5:
            raise ValueError(f"tissue_hires_scalef is {factor}")
    return factor


def scale_factors(file: Path) -> dict[str, Any]:
    """The content of ``scalefactors_json.json``.

    Raises
    ------
    StsrError
        If it is damaged.
    """
    with reading(file):
        factors = json.loads(file.read_text())
        if not isinstance(factors, dict):
            raise ValueError("not a JSON object")
    return factors


def _check_inside(level: Any, registration: Registration, image: Path, factor: float) -> None:
    """Refuse an image that most positions lie outside of; these are in full-resolution pixels."""
    _, height, width = level.shape
    x, y = registration.pixels.T * factor
    inside = float(np.mean((x >= 0) & (x < width) & (y >= 0) & (y < height)))
    if inside < _INSIDE:
        raise StsrError(
            f"only {inside:.0%} of the {registration.what} lie in {image.name} ({width} x {height} pixels): it is not "
            f"the image that Space Ranger was run on; give that one with --he"
        )
