"""Super-resolution methods by name. To add one, add a file and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from stsr.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from stsr.methods.method import Method

DEFAULT_METHOD = "unet"
"""The method that `stsr train` trains by default, and that of the packaged model."""

METHODS = {
    "bilinear": "stsr.methods.interpolation:Bilinear",
    "bicubic": "stsr.methods.interpolation:Bicubic",
    "kriged": "stsr.methods.interpolation:Kriged",
    "unet": "stsr.methods.regression:UNetRegression",
    "corrdiff": "stsr.methods.corrdiff:CorrDiff",
    "c3diff": "stsr.methods.c3diff:C3Diff",
    "diffst": "stsr.methods.diffst:DiffST",
}


def method_class(name: str) -> type[Method]:
    """Import the class of a method.

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
