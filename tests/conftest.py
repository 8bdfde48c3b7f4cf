"""What tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real sections; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("STSR_TEST_DATA", default))
    if not (path / "breast").is_dir():
        pytest.skip(f"real data not found at {path}; set STSR_TEST_DATA")
    return path
