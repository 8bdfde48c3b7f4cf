"""Output of a command: results on stdout, messages and progress on stderr, an error as one sentence."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from stsr.cli.progress import ProgressBar
from stsr.errors import StsrError

if TYPE_CHECKING:
    from stsr.store.section import Section

_BROKEN_PIPE = 141
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "DASK_NUM_WORKERS",
)


class _Terminated(BaseException):
    """A signal asked the command to stop. Not an `Exception`, so that no error handler catches it."""


class Console:
    """The output of one command.

    Parameters
    ----------
    out
        The real stdout. It carries what the next command reads, and nothing else.
    quiet
        Suppress messages, tables and progress.
    as_json
        Print the result as JSON.
    """

    def __init__(self, out: TextIO, quiet: bool = False, as_json: bool = False) -> None:
        self._out = out
        self.quiet = quiet
        self.as_json = as_json
        self._bar: ProgressBar | None = None

    def emit(self, value: Any) -> None:
        """Print a result on stdout: a string as a line, anything else as JSON."""
        text = value if isinstance(value, str) else json.dumps(value, indent=2, default=str)
        self._out.write(text + "\n")
        self._out.flush()

    def finish(self, text: str, record: Any) -> None:
        """Print the result of the command: ``record`` as JSON with ``--json``, else ``text``."""
        self.emit(record if self.as_json else text)

    def say(self, sentence: str) -> None:
        """Print a message."""
        if not self.quiet:
            self.close_bar()
            print(sentence, file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Print a warning, even with ``--quiet``."""
        self.close_bar()
        print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def table(self, columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
        """Print a table. Columns of numbers are aligned to the right."""
        if self.quiet:
            return
        from rich.console import Console as RichConsole
        from rich.table import Table

        self.close_bar()
        shown = Table(title=title, title_justify="left", header_style="bold")
        for number, column in enumerate(columns):
            numeric = bool(rows) and rows[0][number][:1].isdigit()
            shown.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        RichConsole(file=sys.stderr).print(shown)

    def draw(self, path: Path | None, store: Path, figure: Callable[[Section, Path], object]) -> None:
        """Draw a figure of the section in ``store``, if one is wanted (``path`` is not None)."""
        if path is not None:
            from stsr.store.section import open_section

            figure(open_section(store), path)
            self.say(f"drew {path}")

    def progress(self, done: float, total: float, label: str) -> None:
        """Show the progress of a stage; a `stsr.progress.Progress`."""
        if self.quiet:
            return
        if self._bar is None:
            self._bar = ProgressBar()
        self._bar.show(label, min(max(done / total, 0.0), 1.0) if total else 1.0)

    def close_bar(self) -> None:
        """Remove the progress bar from the screen before a line is printed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def session(
    *,
    quiet: bool = False,
    verbose: bool = False,
    debug: bool = False,
    threads: int | None = None,
    as_json: bool = False,
) -> Iterator[Console]:
    """Set up output, threads and signals for a command, and report its errors.

    Raises
    ------
    typer.Exit
        With exit code 1 or 2 for an error of the user, 1 for an internal error, 130 for Ctrl-C, 143 for SIGTERM.
    """
    limit_threads(threads)
    console = Console(sys.stdout, quiet, as_json)
    try:
        with _terminable(), _quiet_libraries(verbose), redirect_stdout(sys.stderr):
            yield console
    except typer.Exit:
        raise
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(_BROKEN_PIPE) from None
    except (Exception, KeyboardInterrupt, _Terminated) as error:
        console.close_bar()
        if debug:
            traceback.print_exc()
        _fail(error, debug)
    finally:
        console.close_bar()


def limit_threads(threads: int | None) -> None:
    """Limit the threads of numerical libraries; call it before they are imported."""
    if threads is None:
        return
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _fail(error: BaseException, debug: bool) -> NoReturn:
    """Print an error as one sentence and exit."""
    code = 1
    match error:
        case KeyboardInterrupt():
            sentence, code = "stopped", 128 + signal.SIGINT
        case _Terminated():
            sentence, code = "stopped", 128 + signal.SIGTERM
        case StsrError():
            code = error.exit_code
            sentence = str(error) if code > 128 else f"error: {error}"  # above 128: a signal, not a failure
        case MemoryError():
            sentence = "error: out of memory; request fewer genes or a smaller --region"
        case _:
            first = str(error).partition("\n")[0]
            hint = "" if debug else "; run again with --debug and report the traceback"
            sentence = f"internal error: {type(error).__name__}: {first}{hint}"
    print(sentence, file=sys.stderr, flush=True)
    raise typer.Exit(code) from None


def _drop_stdout() -> None:
    """Redirect stdout to the null device after the reader closed the pipe, so that Python's last flush succeeds."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Unwind the stack on SIGTERM, and on SIGUSR1 (Slurm's advance notice), so that unfinished files are removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_libraries(verbose: bool) -> Iterator[None]:
    """Hide warnings and log messages of libraries, unless ``verbose``.

    Filters are not enough, because libraries set their own when they are imported; so no warning is shown at all.
    """
    if verbose:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.showwarning = lambda *args, **kwargs: None
        try:
            yield
        finally:
            logging.disable(disabled)
