"""Signals that ask a long run to save and stop at its next step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from stsr.errors import StsrError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(StsrError):
    """A signal stopped the run after it had saved its state; the same command goes on.

    Parameters
    ----------
    number
        The signal. Exit code 130 for SIGINT, 143 for the others: SIGUSR1 is how Slurm announces SIGTERM.
    message
        One sentence for the user.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 143


class Interruption:
    """Whether a signal came.

    Attributes
    ----------
    number
        The signal, or None.
    """

    def __init__(self):
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        """True once a signal came: finish the step, save, and stop."""
        return self.number is not None

    def stop(self, message: str = "interrupted; run the same command again to go on") -> None:
        """Stop here if a signal came: call it when everything is saved.

        Raises
        ------
        Interrupted
            If a signal came.
        """
        if self.number is not None:
            raise Interrupted(self.number, message)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them; a second SIGINT or SIGTERM acts at once.

    Outside of the main thread signals cannot be caught, and nothing is.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number, frame):
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
