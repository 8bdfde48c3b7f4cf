"""Super-resolution of spatial transcriptomics by conditional diffusion, guided by H&E.

The verbs of the command line are functions here: `prepare`, `train`, `superres`, `singlecell`, `celltype`, `gec`,
`info`, `demo`, and `open_section` to read what they wrote. They are found when first used, so that ``import stsr``
needs neither torch nor spatialdata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_VERBS = {
    "celltype": "stsr.celltyping",
    "demo": "stsr.demonstration",
    "gec": "stsr.coexpression",
    "info": "stsr.description",
    "open_section": "stsr.data.section",
    "prepare": "stsr.preparation",
    "singlecell": "stsr.cellcounting",
    "superres": "stsr.superresolution",
    "train": "stsr.training",
}

__all__ = [
    "__version__",
    "celltype",
    "demo",
    "gec",
    "info",
    "open_section",
    "prepare",
    "singlecell",
    "superres",
    "train",
]

if TYPE_CHECKING:
    from stsr.cellcounting import singlecell
    from stsr.celltyping import celltype
    from stsr.coexpression import gec
    from stsr.data.section import open_section
    from stsr.demonstration import demo
    from stsr.description import info
    from stsr.preparation import prepare
    from stsr.superresolution import superres
    from stsr.training import train


def __getattr__(name: str) -> Any:
    """Import a verb when it is first asked for."""
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verb = getattr(import_module(_VERBS[name]), name)
    globals()[name] = verb
    return verb


def __dir__() -> list[str]:
    """Names with the verbs that have not been used yet."""
    return sorted({*globals(), *__all__})
