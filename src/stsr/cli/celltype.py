"""``stsr celltype``: cell types of bins or cells."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console
from stsr.cli.progress import duration

if TYPE_CHECKING:
    from stsr.store.section import Section
    from stsr.verbs.celltype.verb import Celltypes

_signatures = partial(typer.Option, rich_help_panel="Cell type signatures")
_assignment = partial(typer.Option, rich_help_panel="Assignment")


class Per(StrEnum):
    """Unit that is assigned a cell type."""

    bin = "bin"
    cell = "cell"


Markers = Annotated[Path | None, _signatures(help="Marker genes: .csv (type,gene), .gmt or .json.")]
Reference = Annotated[
    Path | None,
    _signatures(
        help="Annotated scRNA-seq (.h5ad), or mean expression as a table of genes x types (.csv, .tsv)."
    ),
]
LabelKey = Annotated[str | None, _signatures(help="Column of obs in the .h5ad that holds the types.")]
Resolution = Annotated[
    float, _signatures(help="Resolution of Leiden clustering, used without markers or reference.")
]
Source = Annotated[
    str | None,
    typer.Option("--from", metavar="ELEMENT", help="Map or table of cells. Default: the newest map."),
]
MinProbability = Annotated[
    float, _assignment(help="Leave a bin or cell unassigned if its largest type proportion is below this.")
]
MinCounts = Annotated[
    float, _assignment(help="Leave a bin or cell unassigned below this number of (expected) counts.")
]
Draws = Annotated[
    int, _assignment(min=0, help="Number of resampled count draws for the confidence; 0: none.")
]
Name = Annotated[
    str | None,
    typer.Option(help="Name of the result. Default: celltype_xSCALE, with _cells appended for cells."),
]
Figure = Annotated[Path | None, typer.Option(help="Draw H&E and cell types: .png, .pdf or .svg.")]


@command
def celltype(
    console: Console,
    store: options.Store,
    markers: Markers = None,
    reference: Reference = None,
    label_key: LabelKey = None,
    resolution: Resolution = 1.0,
    source: Source = None,
    per: Annotated[Per, typer.Option(help="What to assign a type to: bin or cell.")] = Per.bin,
    min_probability: MinProbability = 0.3,
    min_counts: MinCounts = 5.0,
    draws: Draws = 10,
    name: Name = None,
    figure: Figure = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Assign a cell type to each bin or cell. Prints the name of the result in the store."""
    options.check_figure(figure)
    import stsr

    result = stsr.celltype(
        store,
        markers=markers,
        reference=reference,
        label_key=label_key,
        source=source,
        per=per.value,
        min_probability=min_probability,
        min_counts=min_counts,
        draws=draws,
        resolution=resolution,
        name=name,
        seed=seed,
        overwrite=overwrite,
        progress=console.progress,
        report=console.say,
    )
    places = f"{per.value}s"
    rows = [[kind, f"{number:,}"] for kind, number in result.types.items()]
    console.table(["type", places], [*rows, ["unassigned", f"{result.unassigned:,}"]])
    console.say(_summary(result, places))
    console.draw(figure, result.store, partial(_draw, result))
    console.finish(result.element, {**asdict(result), "figure": figure})


def _summary(result: Celltypes, places: str) -> str:
    written = ", ".join([result.element, *result.tables])
    typed = sum(result.types.values())
    sure = (
        "" if result.confidence is None else f"; {result.confidence:.0%} of resampled draws agree on the type"
    )
    return (
        f"wrote {written}: assigned {typed:,} of {typed + result.unassigned:,} {places} a type, from "
        f"{result.genes:,} genes of {result.source}, in {duration(result.seconds)}{sure}"
    )


def _draw(result: Celltypes, section: Section, path: Path) -> None:
    from stsr.verbs.celltype.figure import celltype_figure

    celltype_figure(section, result.element, path)
