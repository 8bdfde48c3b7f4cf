"""``stsr train``: a model from sections with measured bins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import session


def train(
    sections: Annotated[
        list[Path],
        typer.Argument(metavar="SECTION...", help="Sections by 'stsr prepare' with measured bins."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model to write (.safetensors).")],
    method: Annotated[
        str | None, typer.Option(help="What to train: corrdiff, c3diff, diffst or unet.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    val: Annotated[
        float, typer.Option(min=0, max=0.9, help="Part of each section's tissue kept for validation.")
    ] = 0.15,
    regions: Annotated[
        Path | None,
        typer.Option(help="JSON file of rectangles to leave out or to validate on."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Model to start from, of the same method, config and panel.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and stop.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Learn from sections how expression lies inside a spot. Prints the model's path."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
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
            overwrite=overwrite,
            dry_run=dry_run,
            progress=console.progress,
        )
        if dry_run:
            console.emit(made)
        elif as_json:
            console.emit({"model": str(made)})
        else:
            console.emit(str(made))
