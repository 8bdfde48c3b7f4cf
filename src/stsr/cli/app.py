"""The ``stsr`` command and its subcommands. A new command is a file in this folder and a line below."""

from __future__ import annotations

from typing import Annotated

import typer

from stsr.cli import celltype, demo, evaluate, gec, info, prepare, singlecell, superres, train
from stsr.cli.usage import Commands
from stsr.version import __version__

app = typer.Typer(
    name="stsr",
    cls=Commands,
    help="Super-resolution of spatial transcriptomics by conditional diffusion, guided by H&E.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _command in (
    prepare.prepare,
    train.train,
    superres.superres,
    evaluate.evaluate,
    singlecell.singlecell,
    celltype.celltype,
    gec.gec,
    info.info,
    demo.demo,
):
    app.command()(_command)


def main() -> None:
    """Run the command line. The entry point of the console script."""
    app(prog_name="stsr")
