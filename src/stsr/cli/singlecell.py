"""``stsr singlecell``: a cells x genes table from a map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console
from stsr.cli.progress import duration
from stsr.errors import UsageError
from stsr.genes import ALL_GENES, listed_genes

if TYPE_CHECKING:
    import pandas as pd

    from stsr.store.section import Section
    from stsr.verbs.singlecell.verb import SingleCell

_cells = partial(typer.Option, rich_help_panel="Cells")
_scoring = partial(typer.Option, rich_help_panel="Scores")
_drawing = partial(typer.Option, rich_help_panel="Figure")

_FIGURE_GENES = 4
_SCORE_ROWS = 10

Source = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="ELEMENT", help="Map to aggregate. Default: the newest super-resolved map."
    ),
]
Cells = Annotated[
    str | None,
    _cells(
        metavar="ELEMENT", help="Shapes or labels element with the cells. Default: the cells of the section."
    ),
]
Segmentation = Annotated[
    Path | None, _cells(help="Cell segmentation to import: .geojson, .parquet, .csv, .tif or .zarr.")
]
Coordinates = Annotated[
    str | None,
    _cells(
        metavar="UNIT",
        help="Unit of --segmentation: um, or px of the H&E. Default: px for GeoJSON, um for tables.",
    ),
]
Segment = Annotated[bool, _cells("--segment", help="Segment nuclei on the H&E.")]
ExpandUm = Annotated[
    float, _cells(min=0, help="Expand segmented nuclei by this distance in um to form cells.")
]
Name = Annotated[str | None, typer.Option(help="Name of the table in the store. Default: cells_xSCALE.")]
Scores = Annotated[
    Path | None,
    _scoring(metavar="FILE.csv", help="Compare with measured cells and write the scores to this file."),
]
ScoreRegion = Annotated[
    str | None, _scoring(metavar="X0,Y0,X1,Y1", help="Score only cells in this area (um).")
]
Figure = Annotated[Path | None, _drawing(help="Draw cells on the H&E: .png, .pdf or .svg.")]
FigureGenes = Annotated[
    list[str] | None, _drawing(metavar="NAMES", help="Genes to draw. Default: those with most counts.")
]
FigureRegion = Annotated[str | None, _drawing(metavar="X0,Y0,X1,Y1", help="Draw only this area (um).")]


@command
def singlecell(
    console: Console,
    store: options.Store,
    source: Source = None,
    genes: options.Genes = None,
    cells: Cells = None,
    segmentation: Segmentation = None,
    coordinates: Coordinates = None,
    segment: Segment = False,
    expand_um: ExpandUm = 5.0,
    name: Name = None,
    scores: Scores = None,
    score_region: ScoreRegion = None,
    figure: Figure = None,
    figure_genes: FigureGenes = None,
    figure_region: FigureRegion = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Aggregate a map over cells into a cells x genes table. Prints the name of the table in the store."""
    wanted, drawn = listed_genes(genes), listed_genes(figure_genes)
    area = options.region_um(figure_region, "--figure-region")
    if figure is None and (drawn or area):
        raise UsageError("--figure-genes and --figure-region need a figure file; add --figure FILE.png")
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
        _show(console, result, result.scores)
    console.draw(figure, result.store, partial(_draw, result.element, drawn or wanted, area))
    console.finish(result.element, {**_record(result), "scores": scores, "figure": figure})


def _summary(result: SingleCell) -> str:
    inside = result.counts_in_cells / result.counts_in_map if result.counts_in_map else 0.0
    return (
        f"wrote {result.element}: {result.cells:,} cells of {result.annotates} x {result.genes:,} genes of "
        f"{result.source} in {duration(result.seconds)}; {inside:.1%} of its counts lie in cells, "
        f"{1 - inside:.1%} outside"
    )


def _show(console: Console, result: SingleCell, scores: pd.DataFrame) -> None:
    """Print the scores of the genes with most counts, and the means over genes and over cells."""
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


def _numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _draw(
    element: str, genes: list[str] | None, area: options.Region | None, section: Section, path: Path
) -> None:
    from stsr.verbs.singlecell.figure import cells_figure

    named = None if genes is None or genes == [ALL_GENES] else genes[:_FIGURE_GENES]
    cells_figure(section, element, named, path, region_um=area)


def _record(result: SingleCell) -> dict[str, Any]:
    """The result for JSON, with the means of the scores in place of the scores."""
    record = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "scores"}
    if result.scores is not None:
        means = result.scores.drop(columns="name").groupby("of").mean()
        record["mean_scores"] = {of: row.drop("counts").dropna().to_dict() for of, row in means.iterrows()}
    return record
