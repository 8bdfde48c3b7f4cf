"""Options that several commands share, and checks of their values."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stsr.errors import UsageError

Region = tuple[float, float, float, float]
"""x0, y0, x1, y1 in um."""

_common = partial(typer.Option, rich_help_panel="Common options")
_CORNERS = "X0,Y0,X1,Y1"

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Section: a SpatialData store (.zarr).")]
Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="Model from 'stsr train'. Default: the packaged model.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Random seed. The same seed gives the same result.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing result; without it, stop with an error.")
]
Genes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES", help="Gene, comma-separated list, @FILE with gene names, or 'all'. Can be repeated."
    ),
]
RegionOfInterest = Annotated[
    str | None, typer.Option("--region", metavar=_CORNERS, help="Restrict the analysis to this area (um).")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Threads = Annotated[
    int | None,
    _common(min=1, envvar="SLURM_CPUS_PER_TASK", help="Number of CPU threads. Default: all cores."),
]
Quiet = Annotated[bool, _common("--quiet", "-q", help="Print only warnings and errors.")]
Verbose = Annotated[bool, _common("--verbose", "-v", help="Show warnings and log messages of libraries.")]
Debug = Annotated[bool, _common("--debug", help="Show the traceback of an error.")]


def region_um(text: str | None, option: str = "--region") -> Region | None:
    """Parse ``x0,y0,x1,y1`` in um.

    Raises
    ------
    UsageError
        If it is not four numbers with x0 < x1 and y0 < y1.
    """
    if text is None:
        return None
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} is x0,y0,x1,y1 in um, not {text!r}") from None
    if not (x0 < x1 and y0 < y1):
        raise UsageError(f"{option} {text} has no area; give x0,y0,x1,y1 in um with x0 < x1 and y0 < y1")
    return x0, y0, x1, y1


def check_figure(path: Path | None) -> None:
    """Refuse a figure file that cannot be written, before hours of work; None is fine.

    Raises
    ------
    UsageError
        If the suffix is not a figure format, or as `check_file`.
    """
    if path is not None:
        from stsr.figures import check_path

        check_file(check_path(path), "--figure")


def check_file(path: Path, option: str) -> None:
    """Refuse a file that cannot be written.

    Raises
    ------
    UsageError
        If it is a folder, or its folder is not writable.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give {option} a file name")
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to {folder}; choose another path for {option}")
