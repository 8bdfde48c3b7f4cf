"""Usage errors as one sentence, like every other error, instead of typer's box."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

# Some versions of typer contain their own copy of click: find the class of usage errors by its name.
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Commands(TyperGroup):
    """The commands. A wrong option or argument prints one sentence on stderr and exits with 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; as in typer, except for usage errors."""
        given: dict[str, Any] = {
            "args": args,
            "prog_name": prog_name,
            "complete_var": complete_var,
            "windows_expand_args": windows_expand_args,
            **extra,
        }
        if not standalone_mode:
            return super().main(standalone_mode=False, **given)
        try:
            code = super().main(standalone_mode=False, **given)
        except typer.Abort:
            code = 130
        except _USAGE_ERROR as error:
            _show(error)
            code = error.exit_code
        sys.exit(code or 0)


def _show(error: Any) -> None:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    words = " ".join(error.format_message().split()).removesuffix(".")
    where = f"; see {context.command_path} --help" if context else ""
    print(f"error: {words[:1].lower()}{words[1:]}{where}", file=sys.stderr)
