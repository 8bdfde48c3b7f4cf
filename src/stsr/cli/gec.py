"""``stsr gec``: which genes go together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import clock, session
from stsr.errors import UsageError
from stsr.genes import listed_genes

_COMPARISON, _OUTPUT = "Comparison", "Output"


def gec(
    store: options.Store,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="ELEMENT",
            help="Map, or table of cells, to read; the newest super-resolved one by default.",
        ),
    ] = None,
    per: Annotated[str, typer.Option(help="bin or cell: what genes are correlated over.")] = "bin",
    genes: options.Genes = None,
    bin_um: Annotated[
        float | None, typer.Option(help="Add bins up to this size first, in um; the map's own by default.")
    ] = None,
    region: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Only this area, in um.")] = None,
    lag: Annotated[
        list[str] | None,
        typer.Option(metavar="A:B", help="Correlation by distance of genes A and B; may be repeated."),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="ELEMENT",
            help="Measured layer to compare with, such as hr_10um.",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ELEMENT",
            help="Also compare this one; may be repeated. Interpolated maps by default.",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    denoise_truth: Annotated[
        bool,
        typer.Option(
            "--denoise-truth",
            help="Also compare with the truth corrected for counting noise.",
            rich_help_panel=_COMPARISON,
        ),
    ] = False,
    pairs: Annotated[
        Path | None, typer.Option(help="Write the strongest pairs to this .csv.", rich_help_panel=_OUTPUT)
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="Number of strongest pairs listed.", rich_help_panel=_OUTPUT)
    ] = 100,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw the clustered matrix and pairs: .png, .pdf or .svg.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the table; gec_xSCALE or gec_cells by default.", rich_help_panel=_OUTPUT),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Correlate genes over the tissue's bins or cells. Prints the name of the table in the store."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
        wanted, lags = listed_genes(genes), _gene_pairs(lag)
        options.check_figure(figure)
        _check_pairs(pairs)
        import stsr

        result = stsr.gec(
            store,
            source=source,
            per=per,
            genes=wanted,
            bin_um=bin_um,
            region=options.region_um(region),
            truth=truth,
            beside=beside,
            denoise_truth=denoise_truth,
            lags=lags,
            top=top,
            name=name,
            overwrite=overwrite,
            progress=console.progress,
            report=console.say,
        )
        console.say(_summary(result))
        _show_agreement(console, result)
        if pairs is not None:
            _write_pairs(result, pairs)
            console.say(f"wrote {pairs}")
        if figure is not None:
            _draw(result, figure)
            console.say(f"drew {figure}")
        if as_json:
            written = {"figure": figure and str(figure), "csv": pairs and str(pairs)}
            console.emit({**asdict(result), "store": str(result.store), **written})
        else:
            console.emit(result.element)


def _gene_pairs(values: list[str] | None) -> list[tuple[str, str]]:
    """``A:B`` as (A, B)."""
    found = []
    for value in values or []:
        parts = [part.strip() for part in value.split(":")]
        if len(parts) != 2 or not all(parts):
            raise UsageError(f"--lag is two genes as A:B, not {value!r}")
        found.append((parts[0], parts[1]))
    return found


def _check_pairs(path: Path | None) -> None:
    """Refuse a table of pairs that cannot be written, before the work."""
    if path is None:
        return
    if path.suffix.lower() != ".csv":
        raise UsageError(f"pairs are written as csv, not as {path.name!r}; name the file of --pairs .csv")
    options.check_place(path, "--pairs")


def _summary(result) -> str:
    kind = "cells" if result.bin_um is None else f"bins of {result.bin_um:g} um"
    correlated, of = result.correlated
    return (
        f"wrote {result.element}: {result.genes:,} genes of {result.source} over {result.places:,} {kind} in "
        f"{clock(result.seconds)}; {correlated:,} of {of:,} pairs correlate at a false discovery rate of 5 %"
    )


def _show_agreement(console, result) -> None:
    if not result.agreement:
        return
    columns = ["map", "against", "rmse", "bias", "pattern"]
    rows = [
        [row["map"], f"{row['truth']} {row['correlation']}", *(f"{row[key]:.3f}" for key in columns[2:])]
        for row in result.agreement
    ]
    console.table(columns, rows, title=f"distance from the matrix of {result.truth}")


def _write_pairs(result, path: Path) -> None:
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(result.pairs).to_csv(path, index=False)


def _draw(result, path: Path) -> None:
    from stsr.store.section import open_section
    from stsr.verbs.gec.figure import gec_figure

    section = open_section(result.store)
    kind = "cells" if result.bin_um is None else f"bins of {result.bin_um:g} µm"
    title = f"{section.name}: {result.genes:,} genes of {result.source} over {result.places:,} {kind}"
    gec_figure(section.sdata.tables[result.element], path, title)
