"""Parse and check gene names given by users."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from stsr.errors import StsrError, UsageError, did_you_mean

ALL_GENES = "all"
_SUGGESTIONS = 3  # similar names offered for an unknown one


def listed_genes(asked: Sequence[str] | None) -> list[str] | None:
    """Parse the gene names given by a user.

    Parameters
    ----------
    asked
        Names, lists of names separated by commas, semicolons or spaces, or ``@FILE`` for a text file of such lists, in
        which ``#`` starts a comment.

    Returns
    -------
    names
        Unique names in the order given; ``["all"]`` if ``all`` is among them; None if no genes were requested.

    Raises
    ------
    UsageError
        If a file cannot be read, or it contains no gene names.
    """
    if not asked:
        return None
    names: list[str] = []
    for entry in asked:
        names += _in_file(Path(entry[1:])) if entry.startswith("@") else _split(entry)
    if not names:
        raise UsageError("--genes names no gene; give names, @FILE or 'all'")
    return [ALL_GENES] if ALL_GENES in names else list(dict.fromkeys(names))


def wanted_genes(asked: Sequence[str] | None, measured: Sequence[str], panel: Sequence[str]) -> list[str]:
    """Choose the genes to predict.

    Parameters
    ----------
    asked
        As for `listed_genes`; by default the panel genes that were measured, or the whole panel without spots.
    measured
        Genes measured in the section's spots; empty without spots.
    panel
        Genes of the model.

    Raises
    ------
    UsageError
        If a gene is neither measured nor in the panel (similar names are suggested), or a file cannot be read.
    StsrError
        If the model and the section have no gene in common.
    """
    names = listed_genes(asked)
    if names is None:
        shared = [gene for gene in panel if gene in set(measured)] if len(measured) else list(panel)
        if not shared:
            raise StsrError(
                "the model and the section have no gene in common; name genes with --genes, or --genes all"
            )
        return shared
    if names == [ALL_GENES]:
        return list(measured) if len(measured) else list(panel)
    return _known(
        names,
        dict.fromkeys([*measured, *panel]),
        "gene {!r} is neither measured here nor in the model's panel",
        "stsr info --json lists the genes of the spots",
    )


def genes_of(asked: Sequence[str] | None, available: Sequence[str], source: str) -> list[str]:
    """Choose the genes to read from a map or table.

    Parameters
    ----------
    asked
        As for `listed_genes`; all by default.
    available
        Genes of the map or table.
    source
        Its name, for error messages.

    Raises
    ------
    UsageError
        If a gene is not in it (similar names are suggested), or a file cannot be read.
    """
    names = listed_genes(asked)
    if names is None or names == [ALL_GENES]:
        return list(available)
    remedy = f"it has {len(available):,} genes, such as {available[0]}" if available else "it has no genes"
    return _known(names, available, f"{source} has no gene {{!r}}", remedy)


def _known(names: list[str], known: Sequence[str] | dict[str, None], problem: str, remedy: str) -> list[str]:
    places = set(known)
    for name in names:
        if name not in places:
            raise UsageError(f"{problem.format(name)}; {did_you_mean(name, known, remedy, _SUGGESTIONS)}")
    return names


def _in_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"the gene list {path} cannot be read; give --genes @FILE a text file with one name per line"
        ) from None
    return [name for line in lines for name in _split(line.partition("#")[0])]


def _split(text: str) -> list[str]:
    return [name for name in re.split(r"[,;\s]+", text.strip()) if name]
