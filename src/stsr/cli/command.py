"""The options and the session that all commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

from stsr.cli import options
from stsr.cli.console import session

_SHARED: dict[str, tuple[Any, bool | None]] = {
    "as_json": (options.AsJson, False),
    "threads": (options.Threads, None),
    "quiet": (options.Quiet, False),
    "verbose": (options.Verbose, False),
    "debug": (options.Debug, False),
}
"""{argument of `session`: (type of the option, default)}."""


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a command: add the shared options and run it in a `session`.

    Parameters
    ----------
    run
        Does the work. Its first argument is the `stsr.cli.console.Console`; the others become options.

    Returns
    -------
    callable
        A function for typer.
    """

    @wraps(run)
    def start(**given: Any) -> None:
        with session(**{name: given.pop(name) for name in _SHARED}) as console:
            run(console, **given)

    _, *own = signature(run, eval_str=True).parameters.values()
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _SHARED.items()
    ]
    start.__dict__["__signature__"] = made = Signature([*own, *shared])  # read by typer
    start.__annotations__ = {name: parameter.annotation for name, parameter in made.parameters.items()}
    return start
