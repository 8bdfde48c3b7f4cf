"""Gene names as users write them, and genes outside a panel as mixtures of panel genes whose spots behave alike."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from stsr.errors import StsrError, UsageError


def wanted_genes(asked: Sequence[str] | None, measured: Sequence[str], panel: Sequence[str]) -> list[str]:
    """The genes to predict.

    Parameters
    ----------
    asked
        Names as given: single ones, comma lists, ``@file`` with one name per line, or ``all``; None or nothing for
        the panel genes that were measured, all of the panel where nothing was.
    measured
        Genes of the section's spots; empty without spots.
    panel
        Genes of the model.

    Raises
    ------
    UsageError
        For names that are neither measured nor in the panel, with near ones; for a file that cannot be read.
    StsrError
        If the model and the section have no gene in common.
    """
    known = list(dict.fromkeys([*measured, *panel]))
    names = [name for entry in asked or [] for name in _expanded(entry)]
    if not names:
        shared = [gene for gene in panel if gene in set(measured)] if len(measured) else list(panel)
        if not shared:
            raise StsrError(
                "the model and the section have no gene in common; name genes with --genes, or --genes all"
            )
        return shared
    if names == ["all"]:
        return list(measured) if len(measured) else list(panel)
    places = set(known)
    for name in names:
        if name not in places:
            raise UsageError(
                f"gene {name!r} is neither measured here nor in the model's panel{_near(name, known)}"
            )
    return list(dict.fromkeys(names))


def _expanded(entry: str) -> list[str]:
    if not entry.startswith("@"):
        return [name.strip() for name in entry.split(",") if name.strip()]
    try:
        lines = Path(entry[1:]).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the gene list {entry[1:]} cannot be read; give a text file with one name per line"
        ) from error
    return [name.strip() for line in lines for name in line.split("#")[0].split(",") if name.strip()]


def _near(name: str, known: list[str]) -> str:
    upper = {gene.upper(): gene for gene in known}
    near = difflib.get_close_matches(name.upper(), upper, n=3, cutoff=0.6)
    return (
        f"; did you mean {' or '.join(upper[match] for match in near)}?"
        if near
        else "; stsr info --json lists the genes of the spots"
    )
