"""Signals that make a long run save its state and stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stsr.errors import StsrError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(StsrError):
    """A signal stopped the run after it saved its state; the same command resumes.

    Parameters
    ----------
    number
        The signal. The exit code is 130 for SIGINT and 143 for the others; Slurm sends SIGUSR1 before SIGTERM.
    message
        One sentence for the user.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Interruption:
    """Records whether a signal arrived.

    Attributes
    ----------
    number
        The signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        """True once a signal arrived: finish the step, save and stop."""
        return self.number is not None

    def stop(self, message: str = "interrupted; run the same command again to resume") -> None:
        """Stop if a signal arrived; to be called when everything is saved.

        Raises
        ------
        Interrupted
            If a signal arrived.
        """
        if self.number is not None:
            raise Interrupted(self.number, message)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Record SIGINT, SIGTERM and SIGUSR1 instead of ending; a second SIGINT or SIGTERM ends the process.

    Signals can only be caught in the main thread; elsewhere this does nothing.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        if interruption.requested and number != getattr(signal, "SIGUSR1", None):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(143)
        if not interruption.requested:
            interruption.number = number

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
