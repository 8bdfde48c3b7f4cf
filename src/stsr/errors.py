"""Errors a user can mend: one sentence that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StsrError(Exception):
    """Something in the data or on the machine is not as needed; the message names the remedy. Exit code 1."""

    exit_code = 1


class UsageError(StsrError):
    """The command asked for something impossible; the message names what is possible. Exit code 2."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """A question with the nearest known names, compared without case.

    Parameters
    ----------
    name
        What was typed.
    known
        What would have been right.
    otherwise
        The remedy where nothing is near.
    most
        Number of names to offer.

    Returns
    -------
    str
        ``"did you mean GATA3?"``, or ``otherwise``.
    """
    upper = {each.upper(): each for each in known}
    near = difflib.get_close_matches(name.upper(), upper, n=most)
    return f"did you mean {' or '.join(upper[match] for match in near)}?" if near else otherwise
