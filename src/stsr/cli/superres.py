"""``stsr superres``: super-resolved maps into a section's store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import clock, session
from stsr.errors import UsageError
from stsr.genes import ALL_GENES, listed_genes

_MODEL, _DRAWING = "Model and sampling", "Figure"
_FIGURE_GENES = 5


def superres(
    store: options.Store,
    scale: Annotated[float, typer.Option(help="100 um / bin size: 10 for 10 um bins, 5 for 20 um.")] = 10.0,
    genes: options.Genes = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Model by 'stsr train'; the packaged one by default.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A baseline that needs no model: bicubic or bilinear.", rich_help_panel=_MODEL),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draws to average; two or more also give their spread.", rich_help_panel=_MODEL
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps of a draw.", rich_help_panel=_MODEL)
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ancestral, ddim, euler, heun or dpmpp_2m.", rich_help_panel=_MODEL)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Weight of the conditions; 1 is none extra.", rich_help_panel=_MODEL)
    ] = None,
    no_lr: Annotated[
        bool, typer.Option("--no-lr", help="Ignore measured spots: infer from the image alone.")
    ] = False,
    no_consistency: Annotated[
        bool, typer.Option("--no-consistency", help="Leave the map as inferred, not adding up to the spots.")
    ] = False,
    region: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Only this area, in um.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the map in the store; superres_xSCALE by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this store instead of into STORE.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw H&E, spots and map: .png, .pdf or .svg.", rich_help_panel=_DRAWING),
    ] = None,
    figure_genes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Genes to draw; the most counted by default.", rich_help_panel=_DRAWING
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Infer genes in small bins from the H&E and the spots. Prints the name of the map in the store."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
        wanted = listed_genes(genes)
        drawn = listed_genes(figure_genes)
        if drawn and figure is None:
            raise UsageError("--figure-genes says what to draw but not where; add --figure FILE.png")
        options.check_figure(figure)
        import stsr

        result = stsr.superres(
            store,
            scale=scale,
            genes=wanted,
            including=drawn or (),
            model=model,
            method=method,
            samples=samples,
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            use_lr=not no_lr,
            consistency=not no_consistency,
            region=options.region_um(region),
            name=name,
            output=output,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=console.progress,
            report=console.say,
        )
        console.say(_summary(result))
        if figure is not None:
            _draw(result, drawn or _genes_to_draw(result, wanted), figure)
            console.say(f"drew {figure}")
        if as_json:
            console.emit({**asdict(result), "store": str(result.store), "figure": figure and str(figure)})
        else:
            console.emit(result.element)


def _summary(result) -> str:
    spread = f" and {result.spread}" if result.spread else ""
    error = result.consistency_error
    agrees = "" if error is None else f"; added up over spots it is within {error:.1g} of the measured counts"
    genes = "1 gene" if result.genes == 1 else f"{result.genes:,} genes"
    return f"wrote {result.element}{spread}: {genes} in {clock(result.seconds)}{agrees}"


def _draw(result, genes: list[str], path: Path) -> None:
    from stsr.figures import superres_figure
    from stsr.store.section import open_section

    superres_figure(open_section(result.store), result.element, genes, path)


def _genes_to_draw(result, wanted: list[str] | None) -> list[str]:
    """The first that were asked for by name, else the most counted ones of the map."""
    import numpy as np

    from stsr.store.section import open_section

    section = open_section(result.store)
    there = section.map(result.element).genes
    if wanted and wanted != [ALL_GENES]:
        return wanted[:_FIGURE_GENES]
    if section.spots is None:
        return there[:_FIGURE_GENES]
    totals = np.asarray(section.spots.select(there).sum(0)).ravel()
    return [there[number] for number in totals.argsort()[::-1][:_FIGURE_GENES]]
