"""Errors that a user can fix: one sentence that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StsrError(Exception):
    """A problem with the data or the machine; the message names the remedy. Exit code 1."""

    exit_code = 1


class UsageError(StsrError):
    """An invalid request; the message names the valid choices. Exit code 2."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """Suggest the most similar known names, ignoring case.

    Parameters
    ----------
    name
        The unknown name.
    known
        Valid names.
    otherwise
        The remedy if no name is similar.
    most
        Largest number of suggestions.

    Returns
    -------
    str
        ``"did you mean GATA3?"``, or ``otherwise``.
    """
    upper = {each.upper(): each for each in known}
    near = difflib.get_close_matches(name.upper(), upper, n=most)
    return f"did you mean {' or '.join(upper[match] for match in near)}?" if near else otherwise
