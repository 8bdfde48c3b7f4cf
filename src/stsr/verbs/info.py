"""info(): summarise a section store as plain values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stsr.errors import UsageError


def info(
    path: str | Path, *, um_per_unit: float | None = None, coordinate_system: str | None = None
) -> dict[str, Any]:
    """Summarise a section store.

    Parameters
    ----------
    path
        A store written by `stsr.prepare`, or any SpatialData store.
    um_per_unit, coordinate_system
        The section's frame, for stores that do not record it.

    Returns
    -------
    description
        Extent (um), image (um/px), spots, measured bins, cells, elements and provenance, as plain JSON types; missing
        parts are None.

    Raises
    ------
    StsrError
        If there is no store at ``path``, or it cannot be read.
    UsageError
        If ``um_per_unit`` is not a positive number.
    """
    if um_per_unit is not None and not 0 < um_per_unit < math.inf:
        raise UsageError(f"--um-per-unit must be above 0, not {um_per_unit:g}")
    from stsr.store.section import open_section

    return open_section(path, um_per_unit, coordinate_system).describe()
