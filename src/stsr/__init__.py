"""Super-resolution of spatial transcriptomics by conditional diffusion, guided by H&E.

The verbs of the command line are functions here: `prepare`, `train`, `superres`, `singlecell`, `celltype`, `gec`,
`info`, `demo`, and `open_section` to read what they wrote. They are found when first used, so that ``import stsr``
needs neither torch nor spatialdata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stsr.version import __version__

_VERBS = {
    "celltype": "stsr.verbs.celltype.verb",
    "demo": "stsr.verbs.demo",
    "gec": "stsr.verbs.gec.verb",
    "info": "stsr.verbs.info",
    "open_section": "stsr.store.section",
    "prepare": "stsr.verbs.prepare.verb",
    "singlecell": "stsr.verbs.singlecell.verb",
    "superres": "stsr.verbs.superres.verb",
    "train": "stsr.verbs.train.verb",
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
    from stsr.store.section import open_section
    from stsr.verbs.celltype.verb import celltype
    from stsr.verbs.demo import demo
    from stsr.verbs.gec.verb import gec
    from stsr.verbs.info import info
    from stsr.verbs.prepare.verb import prepare
    from stsr.verbs.singlecell.verb import singlecell
    from stsr.verbs.superres.verb import superres
    from stsr.verbs.train.verb import train


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
