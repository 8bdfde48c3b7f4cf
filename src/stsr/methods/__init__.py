"""Methods by name. A new one is a file and a line here."""

from __future__ import annotations

import importlib

from stsr.errors import UsageError, did_you_mean

DEFAULT_METHOD = "corrdiff"
"""What `stsr train` trains and the packaged model is."""

METHODS = {
    "bilinear": "stsr.methods.interpolation:Bilinear",
    "bicubic": "stsr.methods.interpolation:Bicubic",
    "unet": "stsr.methods.regression:UNetRegression",
    "corrdiff": "stsr.methods.corrdiff:CorrDiff",
    "c3diff": "stsr.methods.c3diff:C3Diff",
    "diffst": "stsr.methods.diffst:DiffST",
}


def method_class(name: str) -> type:
    """The class of a method.

    Raises
    ------
    UsageError
        If no method has this name.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS, f"there are: {', '.join(METHODS)}")
        raise UsageError(f"no method is called {name!r}; {hint}")
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
