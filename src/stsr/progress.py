"""How long work tells its caller where it is: one type for every verb."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]
"""Called as ``progress(done, total, label)``. A new stage begins where ``done / total`` falls."""

Report = Callable[[str], None]
"""Called with one sentence for the user."""


def silent(*_: object) -> None:
    """Do nothing: a `Progress` or `Report` for callers that want none."""
