"""``stsr prepare``: a section store from the output of an instrument."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console
from stsr.cli.info import describe
from stsr.genes import ALL_GENES, listed_genes

Alignment = Annotated[
    Path | None,
    typer.Option(help="csv with the 3 x 3 affine from H&E pixels to instrument pixels (Xenium) or to um."),
]


@command
def prepare(
    console: Console,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Xenium, Space Ranger or ST output folder, SpatialData store, or .h5ad file.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Store to write. Default: <name of INPUT>.zarr in the current folder."
        ),
    ] = None,
    he: Annotated[Path | None, typer.Option(help="H&E image, if it is not found next to the data.")] = None,
    alignment: Alignment = None,
    um_per_px: Annotated[
        float | None, typer.Option(help="Pixel size in um, if it is not given in the data.")
    ] = None,
    spots: Annotated[
        str | None,
        typer.Option(
            help="Spots to simulate: square (100 um) or visium (55 um diameter); bins uses Visium HD's own bins of "
            "16 um. Default: visium for Visium HD, otherwise square."
        ),
    ] = None,
    bin_um: Annotated[float, typer.Option(help="Size of high-resolution bins in um.")] = 10.0,
    min_qv: Annotated[float, typer.Option(help="Drop transcripts below this quality value (QV).")] = 20.0,
    genes: options.Genes = None,
    refine: Annotated[
        bool, typer.Option(help="Refine the H&E alignment by registering nuclei to transcripts.")
    ] = True,
    organ: Annotated[
        str | None, typer.Option(help="Organ of the section; training balances sections by it.")
    ] = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert the output of an instrument to a section store. Prints the path of the store."""
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
        seed=seed,
        organ=organ,
        progress=console.progress,
        warn=console.warn,
    )
    if console.as_json:
        console.emit(stsr.info(store))
        return
    if not console.quiet:
        for line in describe(stsr.info(store)):
            console.say(line)
    console.emit(str(store))
