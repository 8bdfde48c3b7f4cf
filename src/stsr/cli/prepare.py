"""``stsr prepare``: a vendor's folder to a section store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import session
from stsr.cli.info import describe
from stsr.genes import ALL_GENES, listed_genes


def prepare(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Xenium, Space Ranger or ST folder, SpatialData store, or .h5ad file."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Store to make; <name of INPUT>.zarr here by default."),
    ] = None,
    he: Annotated[Path | None, typer.Option(help="H&E image, where it is not found beside the data.")] = None,
    alignment: Annotated[
        Path | None,
        typer.Option(help="csv of the 3 x 3 affine: H&E pixels to instrument pixels (Xenium) or to um."),
    ] = None,
    um_per_px: Annotated[
        float | None, typer.Option(help="Size of a pixel in um, where the data do not tell it.")
    ] = None,
    spots: Annotated[
        str, typer.Option(help="Spots to simulate from transcripts: square (100 um) or visium (55 um discs).")
    ] = "square",
    bin_um: Annotated[float, typer.Option(help="High-resolution bin in um.")] = 10.0,
    min_qv: Annotated[float, typer.Option(help="Drop transcripts of lower quality.")] = 20.0,
    genes: options.Genes = None,
    refine: Annotated[
        bool, typer.Option(help="Correct the alignment so that nuclei and transcripts fall together.")
    ] = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Turn what an instrument wrote into a section: checked, aligned, in um. Prints the store's path."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
        import stsr

        wanted = listed_genes(genes)
        store = stsr.prepare(
            path,
            output,
            he=he,
            alignment=alignment,
            um_per_px=um_per_px,
            spots=spots,
            bin_um=bin_um,
            overwrite=overwrite,
            min_qv=min_qv,
            genes=None if wanted == [ALL_GENES] else wanted,
            refine=refine,
            progress=console.progress,
            warn=console.warn,
        )
        if as_json:
            console.emit(stsr.info(store))
            return
        if not quiet:
            for line in describe(stsr.info(store)):
                console.say(line)
        console.emit(str(store))
