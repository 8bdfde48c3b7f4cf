"""Platforms: one module each, with ``NAME``, ``recognises(path) -> bool`` and ``read(path, options) -> Source``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from stsr.errors import StsrError
from stsr.platforms.source import Options, Source

PLATFORMS = ("spatialdata", "xenium", "visium", "legacy_st", "anndata")
"""Modules here, in the order in which they are asked; a new platform is a file and a word."""


def detect(path: Path) -> ModuleType:
    """The platform that knows what lies at ``path``.

    Raises
    ------
    StsrError
        If there is nothing, or nothing that any platform knows.
    """
    if not path.exists():
        raise StsrError(f"there is nothing at {path}; check the path")
    for name in PLATFORMS:
        module = import_module(f"{__name__}.{name}")
        if module.recognises(path):
            return module
    if path.suffix in (".zip", ".gz", ".tar"):
        raise StsrError(f"{path} is an archive; unpack it and give the folder")
    raise StsrError(
        f"{path} is no section that stsr knows; give a Xenium folder (with experiment.xenium), a Space Ranger folder "
        f"(filtered_feature_bc_matrix.h5 and spatial/), an ST folder (counts.tsv.gz and spots.tsv), a SpatialData "
        f"store or an .h5ad file"
    )


def read(path: Path, options: Options | None = None) -> Source:
    """Read a section of any platform; see ``Source``.

    Raises
    ------
    StsrError
        If nothing here is recognised, or what is recognised cannot be read.
    """
    return detect(path).read(path, options or Options())
