"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stsr.errors import UsageError

_COMMON = "For every command"

Store = Annotated[Path, typer.Argument(metavar="STORE", help="A section: a SpatialData store (.zarr).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there; else refuse.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Genes = Annotated[
    list[str] | None,
    typer.Option(help="A gene, a comma list, @FILE with names, or 'all'; may be repeated.", metavar="NAMES"),
]

Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="SLURM_CPUS_PER_TASK",
        help="CPU threads; all cores by default.",
        rich_help_panel=_COMMON,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say only what went wrong.", rich_help_panel=_COMMON)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Let libraries speak too.", rich_help_panel=_COMMON)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_COMMON)
]


def region_um(text: str | None, option: str = "--region") -> tuple[float, float, float, float] | None:
    """``x0,y0,x1,y1`` in um, as ``option`` has it.

    Raises
    ------
    UsageError
        If it is not four numbers that span an area.
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
    """Refuse a figure that cannot be drawn, before hours of work; None is fine.

    Raises
    ------
    UsageError
        If its suffix is no format, or as `check_place`.
    """
    if path is not None:
        from stsr.figures import check_path

        check_place(check_path(path), "--figure")


def check_place(path: Path, option: str) -> None:
    """Refuse a file that cannot be written.

    Raises
    ------
    UsageError
        If it is a folder, or nothing can be written where it is to lie.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give {option} the name of a file")
    place = next(folder for folder in path.resolve().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"nothing can be written in {place}; give {option} another place")
