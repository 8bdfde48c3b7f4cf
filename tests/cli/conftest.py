"""A tissue of few genes, on which commands are fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stsr.simulate import Tissue


@pytest.fixture(scope="session")
def tissue() -> Tissue:
    """500 x 400 um with four genes."""
    from stsr.simulate import simulate_tissue

    return simulate_tissue(500, 400, genes=["GATA3", "ERBB2", "LUM", "POSTN"], seed=2)
