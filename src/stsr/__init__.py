"""Super-resolution of spatial transcriptomics by conditional diffusion, guided by H&E.

The commands of the command line are functions here: `prepare`, `train`, `superres`, `evaluate`, `singlecell`,
`celltype`, `gec`, `info` and `demo`; `samples` draws maps that could be true, and `open_section` reads what they
wrote. They are imported on first use, so
``import stsr`` loads neither torch nor spatialdata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stsr.version import __version__

if TYPE_CHECKING:
    from stsr.store.section import open_section
    from stsr.verbs.celltype.verb import celltype
    from stsr.verbs.demo import demo
    from stsr.verbs.evaluate.verb import evaluate
    from stsr.verbs.gec.verb import gec
    from stsr.verbs.info import info
    from stsr.verbs.prepare.verb import prepare
    from stsr.verbs.samples import samples
    from stsr.verbs.singlecell.verb import singlecell
    from stsr.verbs.superres.verb import superres
    from stsr.verbs.train.verb import train

__all__ = [
    "__version__",
    "celltype",
    "demo",
    "evaluate",
    "gec",
    "info",
    "open_section",
    "prepare",
    "samples",
    "singlecell",
    "superres",
    "train",
]

_MODULES = {
    "celltype": "stsr.verbs.celltype.verb",
    "demo": "stsr.verbs.demo",
    "evaluate": "stsr.verbs.evaluate.verb",
    "gec": "stsr.verbs.gec.verb",
    "info": "stsr.verbs.info",
    "open_section": "stsr.store.section",
    "prepare": "stsr.verbs.prepare.verb",
    "samples": "stsr.verbs.samples",
    "singlecell": "stsr.verbs.singlecell.verb",
    "superres": "stsr.verbs.superres.verb",
    "train": "stsr.verbs.train.verb",
}


def __getattr__(name: str) -> object:
    """Import a function on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List all names, including functions that are not imported yet."""
    return sorted({*globals(), *__all__})
