"""Test settings, and the simulated sections that several modules read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stsr.simulate import Tissue

# Before numerical libraries are imported. Tests run side by side, and more threads only wait for each other.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("SLURM_CPUS_PER_TASK", None)  # the default of --threads


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch on one thread, without importing it where it is not used."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real sections; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("STSR_TEST_DATA", default))
    if not (path / "breast").is_dir():
        pytest.skip(f"real data not found at {path}; set STSR_TEST_DATA")
    return path


# ------------------------------------------------------------------------------------------- simulated sections


@pytest.fixture(scope="session")
def tissue() -> Tissue:
    """620 x 540 um with all genes of the simulator."""
    from stsr.simulate import simulate_tissue

    return simulate_tissue(620, 540, seed=3)


@pytest.fixture(scope="session")
def xenium_folder(tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a Xenium output folder. Do not write into it."""
    from stsr.simulate import write_xenium

    return write_xenium(tissue, tmp_path_factory.mktemp("simulated") / "xenium", labels=False)


@pytest.fixture(scope="session")
def visium_folder(tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a Space Ranger output folder. Do not write into it."""
    from stsr.simulate import write_visium

    return write_visium(tissue, tmp_path_factory.mktemp("simulated") / "visium")


@pytest.fixture(scope="session")
def hd_folder(tissue: Tissue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tissue as a Visium HD folder, its H&E mirrored and turned. Do not write into it."""
    from stsr.simulate import write_visium_hd

    return write_visium_hd(tissue, tmp_path_factory.mktemp("simulated") / "hd", mirror=True, turn_deg=80)


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


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Callable[..., Path]:
    """Copy a store or folder into ``tmp_path``: ``fresh_copy(xenium_section, "s.zarr")``."""

    def copy(source: Path, name: str | None = None) -> Path:
        return shutil.copytree(source, tmp_path / (name or source.name))

    return copy
