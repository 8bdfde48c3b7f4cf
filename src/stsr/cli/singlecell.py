"""``stsr singlecell``: bins to cells, as a table in a section's store."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import clock, session
from stsr.errors import UsageError
from stsr.genes import ALL_GENES, listed_genes

_CELLS, _SCORES, _DRAWING = "Cells", "Scores", "Figure"
_FIGURE_GENES = 4
_SCORE_ROWS = 10


def singlecell(
    store: options.Store,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="ELEMENT", help="Map to add up; the newest super-resolved one by default."
        ),
    ] = None,
    genes: options.Genes = None,
    cells: Annotated[
        str | None,
        typer.Option(
            metavar="ELEMENT",
            help="Shapes or labels of the store; its own cells by default.",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    segmentation: Annotated[
        Path | None,
        typer.Option(
            help="Cells to import: .geojson, .parquet, .csv, .tif or .zarr.", rich_help_panel=_CELLS
        ),
    ] = None,
    coordinates: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT",
            help="Of that file: um, or px of the H&E. GeoJSON is taken as px, tables as um.",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    segment: Annotated[
        bool, typer.Option("--segment", help="Find nuclei on the H&E.", rich_help_panel=_CELLS)
    ] = False,
    expand_um: Annotated[
        float,
        typer.Option(min=0, help="How far such cells reach beyond their nuclei.", rich_help_panel=_CELLS),
    ] = 5.0,
    name: Annotated[
        str | None, typer.Option(help="Name of the table in the store; cells_xSCALE by default.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Write scores against measured cells here.", rich_help_panel=_SCORES
        ),
    ] = None,
    score_region: Annotated[
        str | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1", help="Score only cells of this area, in um.", rich_help_panel=_SCORES
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw cells on the H&E: .png, .pdf or .svg.", rich_help_panel=_DRAWING),
    ] = None,
    figure_genes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Genes to draw; the most counted by default.", rich_help_panel=_DRAWING
        ),
    ] = None,
    figure_region: Annotated[
        str | None,
        typer.Option(metavar="X0,Y0,X1,Y1", help="Draw only this area, in um.", rich_help_panel=_DRAWING),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Add up the bins of a map over cells, by exact areas. Prints the name of the table in the store."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
        wanted, drawn = listed_genes(genes), listed_genes(figure_genes)
        area = options.region_um(figure_region, "--figure-region")
        if figure is None and (drawn or area):
            raise UsageError(
                "--figure-genes and --figure-region say what to draw but not where; add --figure FILE.png"
            )
        options.check_figure(figure)
        import stsr

        result = stsr.singlecell(
            store,
            source=source,
            genes=wanted,
            including=drawn or (),
            cells=cells,
            segmentation=segmentation,
            coordinates=coordinates,
            segment=segment,
            expand_um=expand_um,
            name=name,
            scores=scores,
            score_region=options.region_um(score_region, "--score-region"),
            overwrite=overwrite,
            progress=console.progress,
            report=console.say,
        )
        console.say(_summary(result))
        if result.scores is not None:
            _show(console, result)
        if figure is not None:
            _draw(result, drawn or wanted, figure, area)
            console.say(f"drew {figure}")
        if as_json:
            console.emit(_plain(result, scores, figure))
        else:
            console.emit(result.element)


def _summary(result) -> str:
    part = result.counts_in_cells / result.counts_in_map if result.counts_in_map else 0.0
    return (
        f"wrote {result.element}: {result.cells:,} cells of {result.annotates} x {result.genes:,} genes of "
        f"{result.source} in {clock(result.seconds)}; {part:.1%} of its counts lie in cells, {1 - part:.1%} outside"
    )


def _show(console, result) -> None:
    """Scores for people: the most counted genes, and means over all genes and over cells."""
    scores = result.scores
    measures = [name for name in scores if name.startswith("pcc_")]
    measures += [name.replace("pcc_", "rmse_", 1) for name in measures]
    of_genes, of_cells = (scores[scores["of"] == of] for of in ("gene", "cell"))
    top = of_genes.sort_values("counts", ascending=False).head(_SCORE_ROWS)
    rows = [[row["name"], f"{row['counts']:,.0f}", *_numbers(row[measures])] for _, row in top.iterrows()]
    rows.append([f"{len(of_genes)} genes", "mean", *_numbers(of_genes[measures].mean())])
    rows.append([f"{len(of_cells):,} cells", "mean", *_numbers(of_cells[measures].mean())])
    methods = [name.partition("_")[2].replace(result.source, "map") for name in measures]
    heads = [
        f"{name.partition('_')[0].upper()}\n{method}" for name, method in zip(measures, methods, strict=True)
    ]
    console.table(["", "counts", *heads], rows, title=f"{result.source} against measured cells")


def _numbers(values) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _draw(result, genes: list[str] | None, path: Path, area) -> None:
    from stsr.store.section import open_section
    from stsr.verbs.singlecell.figure import cells_figure

    named = None if genes is None or genes == [ALL_GENES] else genes[:_FIGURE_GENES]
    cells_figure(open_section(result.store), result.element, named, path, region_um=area)


def _plain(result, scores: Path | None, figure: Path | None) -> dict:
    """The result as JSON: of the scores their means and the file."""
    plain = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "scores"}
    if result.scores is not None:
        means = result.scores.drop(columns="name").groupby("of").mean()
        plain["mean_scores"] = {of: row.drop("counts").dropna().to_dict() for of, row in means.iterrows()}
    files = {"scores": scores and str(scores), "figure": figure and str(figure)}
    return {**plain, "store": str(result.store), **files}
