"""``stsr superres``: super-resolved maps of gene expression."""

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
from stsr.genes import ALL_GENES, listed_genes

if TYPE_CHECKING:
    from stsr.store.section import Section
    from stsr.verbs.superres.verb import Superres

_sampling = partial(typer.Option, rich_help_panel="Model and sampling")
_drawing = partial(typer.Option, rich_help_panel="Figure")

_FIGURE_GENES = 5

Scale = Annotated[float, typer.Option(help="100 um / bin size: 10 for 10 um bins, 5 for 20 um bins.")]
Model = Annotated[
    Path | None, _sampling("--model", "-m", help="Model from 'stsr train'. Default: the packaged model.")
]
Method = Annotated[
    str | None, _sampling(help="Interpolation instead of a model: bilinear, bicubic or kriged.")
]
Samples = Annotated[
    int | None,
    _sampling(min=1, help="Number of samples to average; two or more also give their standard deviation."),
]
KeepSamples = Annotated[
    bool,
    _sampling("--keep-samples", help="Write each sample, so that sums can be taken before their spread."),
]
Steps = Annotated[int | None, _sampling(min=1, help="Number of denoising steps per sample.")]
Sampler = Annotated[str | None, _sampling(help="ancestral, ddim, euler, heun or dpmpp_2m.")]
Guidance = Annotated[
    float | None, _sampling(help="Weight of classifier-free guidance; 1 applies no extra guidance.")
]
NoLr = Annotated[bool, typer.Option("--no-lr", help="Ignore measured spots; infer from the H&E image alone.")]
SpotCounts = Annotated[
    str,
    typer.Option(
        "--spots",
        help="raw counts, or denoised ones (expected counts, from all genes). auto: denoised, unless spots "
        "were simulated as sums of all counts.",
    ),
]
Consistency = Annotated[
    str,
    typer.Option(
        help="What the map adds up to over spots: exact (measured counts), denoised (expected counts), smooth "
        "(expected counts, in the mean of neighbouring spots) or none. "
        "auto: exact for spots simulated as sums, else none.",
    ),
]
Base = Annotated[
    str,
    typer.Option(
        help="What models start from between spots: raster (interpolation) or kriged. auto: kriged if the model is "
        "adapted to the slide, else raster."
    ),
]
_adapting = partial(typer.Option, rich_help_panel="Adaptation to the slide")
Adapt = Annotated[
    str,
    _adapting(
        metavar="STEPS",
        help="off, auto or a number of steps: train the model on the slide's own spots first, and keep it if it "
        "predicts reserved spots better.",
    ),
]
AdaptMinutes = Annotated[float, _adapting(min=0, help="Time limit of the adaptation.")]
SaveModel = Annotated[
    Path | None, _adapting("--save-model", help="Write the model that was kept to this file.")
]
Features = Annotated[
    Path | None,
    _sampling(
        metavar="FILE", help="Patch features of the H&E: encoder or array. Default: those cached in STORE."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the map in the store. Default: superres_xSCALE.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this store instead of STORE.")]
Figure = Annotated[Path | None, _drawing(help="Draw H&E, spots and map: .png, .pdf or .svg.")]
FigureGenes = Annotated[
    list[str] | None, _drawing(metavar="NAMES", help="Genes to draw. Default: those with most counts.")
]


@command
def superres(
    console: Console,
    store: options.Store,
    scale: Scale = 10.0,
    genes: options.Genes = None,
    model: Model = None,
    method: Method = None,
    samples: Samples = None,
    keep_samples: KeepSamples = False,
    steps: Steps = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    features: Features = None,
    no_lr: NoLr = False,
    spots: SpotCounts = "auto",
    consistency: Consistency = "auto",
    base: Base = "auto",
    adapt: Adapt = "auto",
    adapt_minutes: AdaptMinutes = 10.0,
    save_model: SaveModel = None,
    region: options.RegionOfInterest = None,
    name: Name = None,
    output: Output = None,
    figure: Figure = None,
    figure_genes: FigureGenes = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Infer gene expression maps at 10-20 um from H&E and spots. Prints the name of the map in the store."""
    wanted, drawn = listed_genes(genes), listed_genes(figure_genes)
    if drawn and figure is None:
        raise UsageError("--figure-genes needs a figure file; add --figure FILE.png")
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
        keep_samples=keep_samples,
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        features=features,
        use_lr=not no_lr,
        spots=spots,
        consistency=consistency,
        base=base,
        adapt=adapt,
        adapt_minutes=adapt_minutes,
        save_model=save_model,
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
    console.draw(figure, result.store, partial(_draw, result.element, drawn, wanted))
    console.finish(result.element, {**asdict(result), "figure": figure})


def _summary(result: Superres) -> str:
    spread = f" and {result.spread}" if result.spread else ""
    error = result.consistency_error
    counts = "denoised" if result.consistency == "denoised" else "measured"
    agrees = "" if error is None else f"; summed over spots it is within {error:.1g} of the {counts} counts"
    genes = "1 gene" if result.genes == 1 else f"{result.genes:,} genes"
    return f"wrote {result.element}{spread}: {genes} in {duration(result.seconds)}{agrees}"


def _draw(
    element: str, drawn: list[str] | None, wanted: list[str] | None, section: Section, path: Path
) -> None:
    from stsr.figures import superres_figure

    superres_figure(section, element, drawn or _genes_to_draw(section, element, wanted), path)


def _genes_to_draw(section: Section, element: str, wanted: list[str] | None) -> list[str]:
    """The first genes requested by name, else the genes of the map with most counts."""
    import numpy as np

    mapped = section.map(element).genes
    if wanted and wanted != [ALL_GENES]:
        return wanted[:_FIGURE_GENES]
    if section.spots is None:
        return mapped[:_FIGURE_GENES]
    totals = np.asarray(section.spots.select(mapped).sum(0)).ravel()
    return [mapped[number] for number in totals.argsort()[::-1][:_FIGURE_GENES]]
