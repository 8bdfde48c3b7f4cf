"""Wrong usage in one sentence, like every other error, where typer would draw a box."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

# typer has had its own copy of click, and not had one: what it raises is found by name.
_WRONG_USAGE = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Commands(TyperGroup):
    """The commands; exits with 2 and a sentence on stderr if an option or an argument is wrong."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """As typer's, but for the way errors are shown."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except typer.Abort:
            code = 130
        except _WRONG_USAGE as error:
            _show(error)
            code = error.exit_code
        sys.exit(code or 0)


def _show(error) -> None:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    words = " ".join(error.format_message().split()).removesuffix(".")
    where = f"; see {context.command_path} --help" if context else ""
    print(f"error: {words[:1].lower()}{words[1:]}{where}", file=sys.stderr)
