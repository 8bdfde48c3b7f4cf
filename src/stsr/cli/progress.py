"""The progress bar on stderr: a bar on a terminal, a line from time to time in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE_S = 2.0  # shorter work shows no bar
_LINE_EVERY_S = 10.0  # between lines where stderr is not a terminal


class ProgressBar:
    """A bar with the time left on a terminal, plain lines elsewhere, and nothing for short work.

    A new stage begins where the completed fraction falls. Labels may change within a stage.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: tuple[Progress, TaskID] | None = None
        self._fraction = 0.0
        self._first: float | None = None  # a stage may continue where an earlier run stopped
        self._started = self._told = time.monotonic()

    def show(self, label: str, fraction: float) -> None:
        """Show the completed fraction (0 to 1) of a stage."""
        now = time.monotonic()
        if fraction < self._fraction:
            self.close()
            self._first = None
            self._started = self._told = now
        if self._first is None:
            self._first = fraction
        self._fraction = fraction
        if self._terminal:
            self._draw(label, fraction, now)
        elif fraction < 1 and now - self._told >= self._pause(now):
            self._told = now
            print(f"{label}: {fraction:.0%}{self._left(fraction, now)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar[0].stop()
        self._bar = None

    def _pause(self, now: float) -> float:
        """Seconds between lines: longer for long work, which keeps its log readable."""
        return min(max(_LINE_EVERY_S, 0.05 * (now - self._started)), 12 * _LINE_EVERY_S)

    def _left(self, fraction: float, now: float) -> str:
        gone = fraction - (self._first or 0.0)
        if gone <= 0:
            return ""
        return f", {duration((now - self._started) * (1 - fraction) / gone)} left"

    def _draw(self, label: str, fraction: float, now: float) -> None:
        if self._bar is None:
            if now - self._started < _PATIENCE_S:
                return
            shown = _rich_bar()
            shown.start()
            self._bar = shown, shown.add_task(label, total=1.0)
        shown, task = self._bar
        shown.update(task, completed=fraction, description=label)


def _rich_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,  # results may be printed while the bar is shown
        redirect_stderr=False,
        speed_estimate_period=120,
    )


def duration(seconds: float) -> str:
    """Format a duration: ``45 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
