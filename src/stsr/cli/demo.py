"""``stsr demo``: the whole way on a simulated tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stsr.cli import options
from stsr.cli.console import session


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path(
        "stsr-demo"
    ),
    size_um: Annotated[float, typer.Option(help="Side of the simulated tissue in um.")] = 1500.0,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Model by 'stsr train'; the packaged one by default.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Simulate a tissue, super-resolve it and compare with its truth. Prints the paths of what it made."""
    with session(quiet=quiet, verbose=verbose, debug=debug, threads=threads) as console:
        import stsr

        made = stsr.demo(
            output,
            size_um=size_um,
            model=model,
            seed=seed,
            device=device,
            progress=console.progress,
            say=console.say,
        )
        genes = made.scores.gene.nunique()
        title = f"Correlation with the true counts per bin, and RMSE of the finest; means of {genes} genes"
        console.table(*comparison(made.summary), title)
        if as_json:
            console.emit(
                {
                    "stores": {name: str(path) for name, path in made.stores.items()},
                    "figures": {name: str(path) for name, path in made.figures.items()},
                    "summary": made.summary.to_dict("records"),
                }
            )
        else:
            console.emit("\n".join(str(path) for path in made.files))


def comparison(summary) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that people see: correlation at each bin size, and the error at the finest."""
    sizes = sorted(summary.bin_um.unique())
    columns = ["section", "method", *(f"{size:g} um" for size in sizes), "RMSE"]
    rows = []
    for section, part in summary.groupby("section", sort=False):
        place = part.set_index(["method", "bin_um"])
        methods = list(dict.fromkeys(part.method))
        for method in methods:
            correlations = [f"{place.pcc[method, size]:.3f}" for size in sizes]
            rows.append([section, method, *correlations, f"{place.rmse[method, sizes[0]]:.3f}"])
        ceilings = [f"{place.noise_ceiling[methods[0], size]:.3f}" for size in sizes]
        rows.append([section, "(highest possible)", *ceilings, ""])
    return columns, rows
