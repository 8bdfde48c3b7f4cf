"""``stsr demo``: all steps on a simulated tissue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console

if TYPE_CHECKING:
    import pandas as pd


@command
def demo(
    console: Console,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")] = Path("stsr-demo"),
    size_um: Annotated[float, typer.Option(help="Side length of the simulated tissue in um.")] = 1500.0,
    model: options.Model = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Super-resolve a simulated tissue and compare with its ground truth. Prints the paths of the output."""
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
    title = f"Pearson correlation with the true counts per bin, and RMSE at the finest bins; means of {genes} genes"
    console.table(*comparison(made.summary), title)
    record = {"stores": made.stores, "figures": made.figures, "summary": made.summary.to_dict("records")}
    console.finish("\n".join(map(str, made.files)), record)


def comparison(summary: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the printed table: correlation at each bin size, and RMSE at the finest."""
    sizes = sorted(summary.bin_um.unique())
    columns = ["section", "method", *(f"{size:g} um" for size in sizes), "RMSE"]
    rows = []
    for section, part in summary.groupby("section", sort=False):
        values = part.set_index(["method", "bin_um"])
        methods = list(dict.fromkeys(part.method))
        for method in methods:
            correlations = [f"{values.pcc[method, size]:.3f}" for size in sizes]
            rows.append([section, method, *correlations, f"{values.rmse[method, sizes[0]]:.3f}"])
        ceilings = [f"{values.noise_ceiling[methods[0], size]:.3f}" for size in sizes]
        rows.append([section, "(highest possible)", *ceilings, ""])
    return columns, rows
