"""What is in a store, as plain values: the verb behind ``stsr info``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stsr.errors import UsageError


def info(
    path: str | Path, *, um_per_unit: float | None = None, coordinate_system: str | None = None
) -> dict[str, Any]:
    """Describe any section store.

    Parameters
    ----------
    path
        A store by `stsr.prepare`, or any SpatialData store.
    um_per_unit, coordinate_system
        The section's frame, where the store does not tell it.

    Returns
    -------
    description
        JSON-able: extent (um), image (um/px), spots, measured bins, cells, elements and provenance; parts that the
        section lacks are None.

    Raises
    ------
    StsrError
        If there is no store at ``path`` or it cannot be read; the sentence names the remedy.
    UsageError
        If ``um_per_unit`` is not above 0.
    """
    if um_per_unit is not None and not 0 < um_per_unit < math.inf:
        raise UsageError(f"a unit of {um_per_unit:g} um is impossible; give --um-per-unit above 0")
    from stsr.store.section import open_section

    return open_section(path, um_per_unit, coordinate_system).describe()
