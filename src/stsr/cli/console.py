"""What a command says and where: results to stdout, people's words to stderr, errors as one sentence."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn

import typer

from stsr.errors import StsrError

_PATIENCE_S = 2.0  # work that ends sooner shows no bar
_PLAIN_EVERY_S = 10.0  # between lines where stderr is no terminal
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
    """A signal asked to stop; no handler of ordinary errors may swallow it."""


class Console:
    """One command's two channels.

    Parameters
    ----------
    out
        The real stdout: carries what the next command reads, and nothing else.
    quiet
        Keep `say` and `progress` to itself.
    """

    def __init__(self, out, quiet: bool = False):
        self._out = out
        self.quiet = quiet
        self._bar: ProgressBar | None = None

    def emit(self, value: Any, as_json: bool = False) -> None:
        """Print a result on stdout: a text as a line, anything else (or everything, if asked) as JSON."""
        text = json.dumps(value, indent=2, default=str) if as_json or not isinstance(value, str) else value
        self._out.write(text + "\n")
        self._out.flush()

    def say(self, sentence: str) -> None:
        """Tell a person something."""
        if not self.quiet:
            self.close_bar()
            print(sentence, file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Tell a person what they ought to know, even when quiet."""
        self.close_bar()
        print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def table(self, columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
        """Show a table to a person; what reads as a number stands to the right."""
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

    def progress(self, done: float, total: float, label: str) -> None:
        """Show how far a stage is: the verbs' `stsr.progress.Progress`."""
        if self.quiet:
            return
        if self._bar is None:
            self._bar = ProgressBar()
        self._bar.show(label, min(max(done / total, 0.0), 1.0) if total else 1.0)

    def close_bar(self) -> None:
        """Take the bar off the screen, so that a line can be written."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ProgressBar:
    """A bar with the time left on a terminal, a line now and then elsewhere; silent for what is soon done.

    A new stage begins where the part that is done falls; labels may change within a stage.
    """

    def __init__(self):
        self._terminal = sys.stderr.isatty()
        self._rich = self._task = None
        self._begin(time.monotonic())

    def show(self, label: str, part: float) -> None:
        """Show how far a stage has come."""
        now = time.monotonic()
        if part < self._part:
            self.close()
            self._begin(now)
        if self._first is None:
            self._first = part
        self._part = part
        if self._terminal:
            self._draw(label, part, now)
        elif part < 1 and now - self._told >= self._pause(now):
            self._told = now
            print(f"{label}: {part:.0%}{self._left(part, now)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._rich is not None:
            self._rich.stop()
        self._rich = self._task = None

    def _begin(self, now: float) -> None:
        self._part = 0.0
        self._first: float | None = None  # a stage may go on where an earlier run stopped
        self._started = self._told = now

    def _pause(self, now: float) -> float:
        """Seconds between lines: more for long work, whose log should stay readable."""
        return min(max(_PLAIN_EVERY_S, 0.05 * (now - self._started)), 12 * _PLAIN_EVERY_S)

    def _left(self, part: float, now: float) -> str:
        gone = part - (self._first or 0.0)
        if gone <= 0:
            return ""
        return f", {clock((now - self._started) * (1 - part) / gone)} left"

    def _draw(self, label: str, part: float, now: float) -> None:
        if self._rich is None:
            if now - self._started < _PATIENCE_S:
                return
            self._rich = _rich_bar()
            self._rich.start()
            self._task = self._rich.add_task(label, total=1.0, completed=part)
        self._rich.update(self._task, completed=part, description=label)


def _rich_bar():
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # Results are printed while a bar may be up, and stdout is not the bar's business.
    return Progress(
        *columns,
        console=RichConsole(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=120,
    )


def clock(seconds: float) -> str:
    """A duration for people: ``45 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def session(
    *, quiet: bool = False, verbose: bool = False, debug: bool = False, threads: int | None = None
) -> Iterator[Console]:
    """Everything around a command's work: channels, threads, signals and the way errors are told.

    Raises
    ------
    typer.Exit
        With 1 or 2 for a user's error, 1 for one of ours, 130 for Ctrl-C, 143 for SIGTERM.
    """
    limit_threads(threads)
    console = Console(sys.stdout, quiet)
    try:
        with _terminable(), _libraries(verbose), redirect_stdout(sys.stderr):
            yield console
    except typer.Exit:
        raise
    except BrokenPipeError:
        _drop_stdout()
        raise typer.Exit(_BROKEN_PIPE) from None
    except KeyboardInterrupt:
        console.close_bar()
        _fail("stopped", 128 + signal.SIGINT, debug)
    except _Terminated:
        console.close_bar()
        _fail("stopped", 128 + signal.SIGTERM, debug)
    except StsrError as error:
        console.close_bar()
        stopped = error.exit_code > 128  # a signal's doing: nothing went wrong
        _fail(str(error) if stopped else f"error: {error}", error.exit_code, debug)
    except MemoryError:
        console.close_bar()
        _fail("error: out of memory; ask for fewer genes or a smaller --region", 1, debug)
    except Exception as error:
        console.close_bar()
        first = str(error).partition("\n")[0]
        hint = "" if debug else "; run again with --debug and report what it shows"
        _fail(f"internal error: {type(error).__name__}: {first}{hint}", 1, debug)
    finally:
        console.close_bar()


def limit_threads(threads: int | None) -> None:
    """Make numerical libraries use so many threads; to be called before they are imported."""
    if threads is None:
        return
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(sentence, file=sys.stderr, flush=True)
    raise typer.Exit(code) from None


def _drop_stdout() -> None:
    """Nobody reads stdout any more: let Python's last flush go nowhere instead of complaining."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGUSR1 by which Slurm announces it, unwind the stack: half-written things are taken away."""

    def stop(number, frame):
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
def _libraries(verbose: bool) -> Iterator[None]:
    """Keep the warnings and logs of libraries off the screen.

    Filters alone do not hold, for libraries set their own when they are imported; so warnings are not shown at all.
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
