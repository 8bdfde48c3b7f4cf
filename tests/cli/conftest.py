"""A tissue of few genes, on which commands are fast.

Every fixture that is made from the tissue is defined again: pytest keeps one instance of a session fixture, so those of
the parent folder would hold whichever tissue was asked for first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stsr.simulate import Tissue


@pytest.fixture(scope="session")
def tissue() -> Tissue:
    """500 x 400 um with four genes."""
    from stsr.simulate import simulate_tissue

    return simulate_tissue(500, 400, genes=["GATA3", "ERBB2", "LUM", "POSTN"], seed=2)


@pytest.fixture(scope="session")
def xenium_folder(tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a Xenium output folder. Do not write into it."""
    from stsr.simulate import write_xenium

    return write_xenium(tissue, tmp_path_factory.mktemp("few_genes") / "xenium", labels=False)


@pytest.fixture(scope="session")
def visium_folder(tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a Space Ranger output folder. Do not write into it."""
    from stsr.simulate import write_visium

    return write_visium(tissue, tmp_path_factory.mktemp("few_genes") / "visium")


@pytest.fixture(scope="session")
def xenium_section(xenium_folder: Path) -> Path:
    """The store prepared from `xenium_folder`. Take a `fresh_copy` to write into it."""
    from stsr.verbs.prepare.verb import prepare

    return prepare(xenium_folder, xenium_folder.with_suffix(".zarr"))


@pytest.fixture(scope="session")
def visium_section(visium_folder: Path) -> Path:
    """The store prepared from `visium_folder`. Take a `fresh_copy` to write into it."""
    from stsr.verbs.prepare.verb import prepare

    return prepare(visium_folder, visium_folder.with_suffix(".zarr"))
