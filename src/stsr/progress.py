"""How verbs report progress and remarks to their caller."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]
"""Called as ``progress(done, total, label)``. When ``done / total`` falls, a new stage has begun."""

Report = Callable[[str], None]
"""Called with one sentence for the user."""


def silent(*_: object) -> None:
    """Ignore what is reported: a `Progress` or `Report` for callers that do not need one."""
