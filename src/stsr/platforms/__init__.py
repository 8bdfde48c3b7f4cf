"""Platforms: one module each, with ``NAME``, ``recognises(path) -> bool`` and ``read(path, options) -> Source``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from stsr.errors import StsrError
from stsr.platforms.source import Options, Source

PLATFORMS = ("spatialdata", "xenium", "visium_hd", "visium", "legacy_st", "anndata")
"""Modules of this folder, in the order in which they are tried; to add a platform, add its file and its name here."""


def detect(path: Path) -> ModuleType:
    """The platform whose format lies at ``path``.

    Raises
    ------
    StsrError
        If the path does not exist, or no platform recognises it.
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
        f"{path} has no known format; give a Xenium folder (with experiment.xenium), a Space Ranger folder "
        f"(filtered_feature_bc_matrix.h5 and spatial/, or binned_outputs/), an ST folder (counts.tsv.gz and "
        f"spots.tsv), a SpatialData store or an .h5ad file"
    )


def read(path: Path, options: Options | None = None) -> Source:
    """Read a section of any platform; see ``Source``.

    Raises
    ------
    StsrError
        If the format is not recognised, or the data cannot be read.
    """
    return detect(path).read(path, options or Options())
