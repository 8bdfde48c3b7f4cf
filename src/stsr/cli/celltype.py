"""``stsr celltype``: where cell types are."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import clock, session

_SIGNATURES, _RULE = "What types look like", "When a label is given"


class Per(StrEnum):
    """What gets a type."""

    bin = "bin"
    cell = "cell"


def celltype(
    store: options.Store,
    markers: Annotated[
        Path | None,
        typer.Option(help="Marker genes: .csv (type,gene), .gmt or .json.", rich_help_panel=_SIGNATURES),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Labelled scRNA-seq (.h5ad), or a table of genes x types (.csv, .tsv).",
            rich_help_panel=_SIGNATURES,
        ),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Column of the .h5ad with the types.", rich_help_panel=_SIGNATURES)
    ] = None,
    resolution: Annotated[
        float,
        typer.Option(help="Of Leiden clusters, without markers and reference.", rich_help_panel=_SIGNATURES),
    ] = 1.0,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="ELEMENT", help="Map, or table of cells; the newest by default."),
    ] = None,
    per: Annotated[Per, typer.Option(help="What gets a type: bin or cell.")] = Per.bin,
    min_probability: Annotated[
        float, typer.Option(help="Unassigned below this largest share.", rich_help_panel=_RULE)
    ] = 0.3,
    min_counts: Annotated[
        float, typer.Option(help="Unassigned below so many (expected) counts.", rich_help_panel=_RULE)
    ] = 5.0,
    draws: Annotated[
        int, typer.Option(min=0, help="Redraws for the confidence; 0 for none.", rich_help_panel=_RULE)
    ] = 10,
    name: Annotated[
        str | None, typer.Option(help="Name of the result; celltype_xSCALE by default, of cells with _cells.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw H&E and types: .png, .pdf or .svg.")] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Say of each bin or cell which type its transcripts are of. Prints the name of the result in the store."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
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
        if figure is not None:
            _draw(result, figure)
            console.say(f"drew {figure}")
        if as_json:
            console.emit({**asdict(result), "store": str(result.store), "figure": figure and str(figure)})
        else:
            console.emit(result.element)


def _summary(result, places: str) -> str:
    wrote = ", ".join([result.element, *result.tables])
    typed = sum(result.types.values())
    sure = "" if result.confidence is None else f"; {result.confidence:.0%} of redraws give the same type"
    return (
        f"wrote {wrote}: {typed:,} {places} of {typed + result.unassigned:,} have a type, from {result.genes:,} genes "
        f"of {result.source}, in {clock(result.seconds)}{sure}"
    )


def _draw(result, path: Path) -> None:
    from stsr.store.section import open_section
    from stsr.verbs.celltype.figure import celltype_figure

    celltype_figure(open_section(result.store), result.element, path)
