"""Names of elements and attributes in a store."""

from __future__ import annotations

import re

from stsr.errors import UsageError
from stsr.geometry.grid import LR_UM

HE = "he"
SPOTS = "spots"
TISSUE = "tissue"
CELLS = "cells"
SUPPORT = "support"
KINDS = ("images", "labels", "points", "shapes", "tables")
ATTRS_KEY = "stsr"
"""Root attribute with the provenance of every element written by stsr: {element: {...}}."""
FRAME_KEY = "stsr_frame"
"""Root attribute of stores created by stsr: {"coordinate_system": name, "um_per_unit": value}."""
ORGAN_KEY = "stsr_organ"
"""Root attribute with the name of the organ, for balanced training."""
MEASURED = "measured"
"""``origin`` in the provenance of elements measured by an instrument; they are never replaced."""
RESULTS = ("predicted", "derived")
"""``origin`` of maps predicted by a method, and of results derived from a section's elements."""
SPREAD_LAYER = "sd"
"""Layer of a table of cells with the standard deviation of each count over samples of the model."""
_UNSEEN = "_unseen"
_HR = re.compile(r"^hr_(\d+(?:\.\d+)?)um$")
_SUPERRES = re.compile(r"^superres_x(\d+(?:\.\d+)?)$")
_SPREAD = "_sd"
_SAMPLE = re.compile(r"^(.+)_sample(\d+)$")


def table_name(element: str) -> str:
    """Name of the table that annotates an element: ``spots`` -> ``spots_table``.

    In SpatialData 0.7 names are unique over all kinds of elements, so shapes and their table cannot share one.
    """
    return f"{element}_table"


def hr_name(bin_um: float) -> str:
    """Name of measured counts per bin: 10 -> ``hr_10um``."""
    return f"hr_{bin_um:g}um"


def unseen_name(hr: str) -> str:
    """Name of the measured counts that simulated spots did not take: ``hr_10um`` -> ``hr_10um_unseen``."""
    return hr + _UNSEEN


def result_name(kind: str, scale: float) -> str:
    """Default name of a result: ``superres``, 10 -> ``superres_x10`` (from bins of 100 um / 10).

    Kinds are ``superres`` (map), ``cells`` (cells x genes), ``celltype`` and ``gec`` (gene expression correlation).
    """
    return f"{kind}_x{scale:g}"


def spread_name(element: str) -> str:
    """Name of a map's standard deviation: ``superres_x10`` -> ``superres_x10_sd``."""
    return element + _SPREAD


def sample_name(element: str, number: int) -> str:
    """Name of a kept sample of a map: ``superres_x10``, 1 -> ``superres_x10_sample1``."""
    return f"{element}_sample{number}"


def map_of_sample(element: str) -> str | None:
    """The map of which this is a kept sample: ``superres_x10_sample1`` -> ``superres_x10``; None for other names."""
    match = _SAMPLE.match(element)
    return match[1] if match else None


def features_name(stem: str) -> str:
    """Name of cached patch features of a file: ``uni`` -> ``features_uni``."""
    return "features_" + re.sub(r"[^A-Za-z0-9_.-]", "_", stem)


def bin_um_of(element: str) -> float | None:
    """Bin size in um according to a map's name; None if the name does not contain one."""
    if match := _HR.match(element.removesuffix(_UNSEEN)):
        return float(match[1])
    if match := _SUPERRES.match(map_of_sample(element) or element.removesuffix(_SPREAD)):
        return round(LR_UM / float(match[1]), 3)  # names have six digits
    return None


def is_measured_name(element: str) -> bool:
    """Whether the name is reserved: ``he``, ``spots``, ``tissue``, ``support``, ``cells``, their tables, ``hr_*``."""
    base = element.lower().removesuffix("_table")
    return base in (HE, SPOTS, TISSUE, SUPPORT, CELLS) or base.startswith("hr_")


def check_name(element: str) -> str:
    """Check the name of an output, and return it.

    Raises
    ------
    UsageError
        If SpatialData would refuse it, or it is reserved for measured data.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", element):
        raise UsageError(f"{element!r} is not a valid element name; use letters, digits, '_', '-' and '.'")
    if is_measured_name(element):
        raise UsageError(f"the name {element!r} is reserved for measured data; choose another with --name")
    return element


def is_hr(element: str) -> bool:
    """Whether the name is that of measured counts per bin: ``hr_10um``."""
    return bool(_HR.match(element))


def is_superres(element: str) -> bool:
    """Whether the name is the default name of a super-resolved map: ``superres_x10``."""
    return bool(_SUPERRES.match(element))


def is_spread(element: str) -> bool:
    """Whether the name is that of a standard deviation: ``superres_x10_sd``."""
    return element.endswith(_SPREAD)
