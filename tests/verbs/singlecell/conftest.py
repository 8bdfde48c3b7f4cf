"""A tissue small enough to look at every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stsr.simulate import Tissue


@pytest.fixture(scope="session")
def tissue() -> Tissue:
    """330 x 320 um with three genes."""
    from stsr.simulate import simulate_tissue

    return simulate_tissue(330, 320, genes=["GATA3", "LUM", "LYZ"], seed=4)
