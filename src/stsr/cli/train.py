"""``stsr train``: a model from sections with measured bins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console


@command
def train(
    console: Console,
    sections: Annotated[
        list[Path],
        typer.Argument(metavar="SECTION...", help="Sections with measured bins, from 'stsr prepare'."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model file to write (.safetensors).")],
    method: Annotated[
        str | None, typer.Option(help="Method to train: unet, corrdiff, c3diff or diffst.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting. Can be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None,
    val: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Fraction of each section's tissue, or spots, held out for validation."
        ),
    ] = 0.15,
    regions: Annotated[
        Path | None, typer.Option(help="JSON file of rectangles to exclude or to validate on.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Model to fine-tune; it must have the same method, settings and gene panel."),
    ] = None,
    features: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Patch features for all sections: encoder or folder; or one array per section. Can be repeated.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and stop.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Train a super-resolution model on sections with measured bins, or with spots. Prints the path of the model."""
    import stsr

    made = stsr.train(
        sections,
        output,
        method=method,
        config=config,
        settings=settings or (),
        steps=steps,
        val=val,
        regions=regions,
        device=device,
        seed=seed,
        init=init,
        features=features or (),
        overwrite=overwrite,
        dry_run=dry_run,
        progress=console.progress,
        report=console.say,
    )
    if dry_run:
        console.emit(made)
    else:
        console.finish(str(made), {"model": made})
