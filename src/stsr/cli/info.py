"""``stsr info``: the contents of a store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stsr.cli import options
from stsr.cli.command import command
from stsr.cli.console import Console


@command
def info(
    console: Console,
    store: options.Store,
    um_per_unit: Annotated[
        float | None,
        typer.Option(help="um per unit of the coordinate system, if the store does not give it."),
    ] = None,
    coordinate_system: Annotated[
        str | None, typer.Option(help="Coordinate system to use, if there are several.")
    ] = None,
) -> None:
    """Show what a store contains."""
    import stsr

    found = stsr.info(store, um_per_unit=um_per_unit, coordinate_system=coordinate_system)
    console.finish("\n".join(describe(found)), found)


def describe(found: dict[str, Any]) -> list[str]:
    """Format the result of `stsr.info` as lines of text."""
    width, height = found["size_um"]
    x0, y0, x1, y1 = found["extent_um"]
    lines = [
        f"section   {found['path']}",
        f"extent    {width:,.0f} x {height:,.0f} um, x {x0:,.0f} to {x1:,.0f}, y {y0:,.0f} to {y1:,.0f}"
        f" ({found['coordinate_system']}, {found['um_per_unit']:g} um per unit)",
        f"image     {_image(found['image'], found['image_overlap'])}",
        *_registration(found["provenance"].get("he", {})),
        f"spots     {_spots(found['spots'])}",
    ]
    if found["hr"]:
        hr = found["hr"]
        lines.append(
            f"bins      {hr['width']} x {hr['height']} of {hr['bin_um']:g} um, "
            f"{hr['genes']:,} genes, {hr['counts']:,.0f} counts"
            f"{_divided(found)}"
        )
    if found["cells"]:
        genes = found["cells"]["genes"]
        lines.append(
            f"cells     {found['cells']['number']:,}" + (f", {genes:,} genes" if genes else ", no counts")
        )
    for kind in ("images", "labels", "points", "shapes", "tables"):
        names = [name for name, of_kind in found["elements"].items() if of_kind == kind]
        if names:
            lines.append(f"{kind:<9} {', '.join(names)}")
    for name, made in found["provenance"].items():
        if made.get("command") == "superres":
            lines.append(f"{name}: {_made(made)}")
    return lines


def _image(image: dict[str, Any] | None, overlap: float | None) -> str:
    if image is None:
        return "none"
    inside = "" if overlap is None else f", covers {overlap:.0%} of the measured area"
    return f"{image['width']:,} x {image['height']:,} px of {image['um_per_px']:.4g} um{inside}"


def _registration(made: dict[str, Any]) -> list[str]:
    """How far `stsr prepare` moved the image."""
    if not made.get("refined"):
        return []
    before, after = made["fine_correlation"]
    return [
        f"aligned   H&E moved by {made['refined_by_um']:.3g} um to register nuclei to transcripts "
        f"(correlation {before:.2f} before, {after:.2f} after; --no-refine keeps the given alignment)"
    ]


def _divided(found: dict[str, Any]) -> str:
    """Whether counts of bins of another size were divided between these."""
    from stsr.store.names import hr_name

    made = found["provenance"].get(hr_name(found["hr"]["bin_um"]), {})
    if "divided_by_area_from_um" not in made:
        return ""
    return (
        f", divided by area from bins of {made['divided_by_area_from_um']:g} um (total of each gene kept to "
        f"{made['totals_per_gene_kept_to']:g})"
    )


def _spots(spots: dict[str, Any] | None) -> str:
    if spots is None:
        return "none"
    shape = {"disc": "discs", "square": "squares"}.get(spots["shape"], spots["shape"])
    return (
        f"{spots['number']:,} {shape} of {spots['size_um']:.4g} um, {spots['pitch_um']:.4g} um apart, "
        f"{spots['genes']:,} genes, {spots['counts']:,.0f} counts"
    )


def _made(made: dict[str, Any]) -> str:
    wanted = ("method", "model", "samples", "steps", "sampler", "seed", "consistency_error", "units")
    return ", ".join(f"{key.replace('_', ' ')} {made[key]}" for key in wanted if made.get(key) is not None)
