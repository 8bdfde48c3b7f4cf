"""``stsr evaluate``: which settings suit a slide, tested on its own hidden spots."""

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
    from stsr.verbs.evaluate.verb import Evaluation

Folds = Annotated[int, typer.Option(min=2, help="Number of folds: each hides one part of the spots.")]
NoImage = Annotated[bool, typer.Option("--no-image", help="Compare interpolations only, without the H&E.")]
Adapt = Annotated[
    int,
    typer.Option(
        "--adapt",
        metavar="STEPS",
        min=0,
        help="Also compare the model adapted to the visible spots of each fold; slower.",
    ),
]
Table = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="CSV", help="Write the scores of each gene.")
]
Figure = Annotated[
    Path | None, typer.Option(help="Draw the scores of the ways and of the genes: .png, .pdf or .svg.")
]


@command
def evaluate(
    console: Console,
    store: options.Store,
    model: options.Model = None,
    genes: options.Genes = None,
    folds: Folds = 5,
    no_image: NoImage = False,
    adapt: Adapt = 0,
    output: Table = None,
    figure: Figure = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Predict hidden spots of a slide in several ways. Prints the options of 'stsr superres' that suit it best."""
    wanted = listed_genes(genes)
    options.check_figure(figure)
    if output is not None:
        if output.suffix.lower() != ".csv":
            raise UsageError(
                f"scores are written as .csv, not as {output.name!r}; give --output a .csv file name"
            )
        options.check_file(output, "--output")
    import stsr

    result = stsr.evaluate(
        store,
        model=model,
        genes=wanted,
        folds=folds,
        image=not no_image,
        adapt_steps=adapt,
        seed=seed,
        device=device,
        progress=console.progress,
    )
    _show(console, result)
    if output is not None:
        result.per_gene.to_csv(output, index=False)
        console.say(f"wrote {output}")
    console.draw(figure, store, partial(_draw, result))
    console.say(f"{result.verdict}. Predicted in {duration(result.seconds)}")
    record = asdict(result) | {
        "ways": result.ways.to_dict("records"),
        "per_gene": result.per_gene.to_dict("records"),
        "figure": figure,
        "csv": output,
    }
    console.finish(result.options, record)


def _show(console: Console, result: Evaluation) -> None:
    for kind, part in result.ways.groupby("hidden", sort=False):
        rows = [
            [
                row["way"],
                f"{row['pcc']:.3f}",
                f"{row['pcc_gain']:+.3f} ({row['pcc_gain_low']:+.3f}, {row['pcc_gain_high']:+.3f})",
                f"{row['slope']:.2f}",
            ]
            for _, row in part.iterrows()
        ]
        console.table(
            ["way", "PCC", "gain (95 %)", "slope"],
            rows,
            title=f"{kind}: {result.spots:,} hidden spots, {result.genes:,} genes; gain over kriged spots",
        )


def _draw(result: Evaluation, section: Section, path: Path) -> None:
    from stsr.verbs.evaluate.figure import evaluation_figure

    evaluation_figure(result, path)
