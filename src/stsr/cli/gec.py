"""``stsr gec``: gene expression correlation."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console
from stsr.cli.progress import duration
from stsr.errors import UsageError
from stsr.genes import listed_genes

if TYPE_CHECKING:
    from stsr.store.section import Section
    from stsr.verbs.gec.verb import Gec

_comparison = partial(typer.Option, rich_help_panel="Comparison")
_output = partial(typer.Option, rich_help_panel="Output")

Source = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="ELEMENT", help="Map or table of cells. Default: the newest super-resolved map."
    ),
]
BinUm = Annotated[
    float | None,
    typer.Option(help="Aggregate bins to this size in um first. Default: the bin size of the map."),
]
Lag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A:B",
        help="Also compute the correlation of genes A and B as a function of distance. Can be repeated.",
    ),
]
Truth = Annotated[
    str | None, _comparison(metavar="ELEMENT", help="Measured map to compare with, e.g. hr_10um.")
]
Beside = Annotated[
    list[str] | None,
    _comparison(
        metavar="ELEMENT",
        help="Another map to compare with the truth. Can be repeated. Default: interpolated maps.",
    ),
]
DenoiseTruth = Annotated[
    bool,
    _comparison("--denoise-truth", help="Also compare with the truth after correction for counting noise."),
]
Pairs = Annotated[Path | None, _output(help="Write the most correlated gene pairs to this .csv.")]
Top = Annotated[int, _output(min=1, help="Number of gene pairs to list.")]
Figure = Annotated[
    Path | None, _output(help="Draw the clustered matrix and the top pairs: .png, .pdf or .svg.")
]
Name = Annotated[str | None, _output(help="Name of the table. Default: gec_xSCALE or gec_cells.")]


@command
def gec(
    console: Console,
    store: options.Store,
    source: Source = None,
    per: Annotated[str, typer.Option(help="Observations to correlate over: bin or cell.")] = "bin",
    genes: options.Genes = None,
    bin_um: BinUm = None,
    region: options.RegionOfInterest = None,
    lag: Lag = None,
    truth: Truth = None,
    beside: Beside = None,
    denoise_truth: DenoiseTruth = False,
    pairs: Pairs = None,
    top: Top = 100,
    figure: Figure = None,
    name: Name = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Compute gene expression correlation over bins or cells. Prints the name of the table in the store."""
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
    console.draw(figure, result.store, partial(_draw, result))
    console.finish(result.element, {**asdict(result), "figure": figure, "csv": pairs})


def _gene_pairs(values: list[str] | None) -> list[tuple[str, str]]:
    """Parse ``A:B`` as (A, B)."""
    found = []
    for value in values or []:
        parts = [part.strip() for part in value.split(":")]
        if len(parts) != 2 or not all(parts):
            raise UsageError(f"--lag takes two genes as A:B, not {value!r}")
        found.append((parts[0], parts[1]))
    return found


def _check_pairs(path: Path | None) -> None:
    """Refuse a file for gene pairs that cannot be written, before the work."""
    if path is None:
        return
    if path.suffix.lower() != ".csv":
        raise UsageError(
            f"gene pairs are written as .csv, not as {path.name!r}; give --pairs a .csv file name"
        )
    options.check_file(path, "--pairs")


def _places(result: Gec, unit: str) -> str:
    """The observations in words, e.g. ``1,200 bins of 10 um``."""
    kind = "cells" if result.bin_um is None else f"bins of {result.bin_um:g} {unit}"
    return f"{result.genes:,} genes of {result.source} over {result.places:,} {kind}"


def _summary(result: Gec) -> str:
    correlated, of = result.correlated
    return (
        f"wrote {result.element}: {_places(result, 'um')} in {duration(result.seconds)}; {correlated:,} of {of:,} "
        "gene pairs are correlated at a false discovery rate of 5 %"
    )


def _show_agreement(console: Console, result: Gec) -> None:
    if not result.agreement:
        return
    columns = ["map", "against", "rmse", "bias", "pattern"]
    rows = [
        [row["map"], f"{row['truth']} {row['correlation']}", *(f"{row[key]:.3f}" for key in columns[2:])]
        for row in result.agreement
    ]
    console.table(columns, rows, title=f"difference from the correlation matrix of {result.truth}")


def _write_pairs(result: Gec, path: Path) -> None:
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(result.pairs).to_csv(path, index=False)


def _draw(result: Gec, section: Section, path: Path) -> None:
    from stsr.verbs.gec.figure import gec_figure

    gec_figure(section.sdata.tables[result.element], path, f"{section.name}: {_places(result, 'µm')}")
