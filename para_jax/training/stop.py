"""Graceful shutdown: on SIGTERM or the first Ctrl-C, a run finishes its current step, or the batch of an evaluation,
and saves. A second one ends it at once.

The hosts of one run must stop after the same step. There, JAX's preemption service receives SIGTERM and agrees on it,
and an evaluation is finished first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax

from ..runtime.processes import is_first


class Stopped(SystemExit):
    """A run was told to stop and has saved its state. If this is not caught, the program exits with its code: that of
    runtime.stopped_exit_code."""


class Interrupted(BaseException):
    """A signal arrived during work that can be repeated."""


class StopSignal:
    """The signal received, if any. `stop_signals` notes it."""

    received: int | None = None
    repeatable: StopSignal | None = None
    """of the run whose work can be repeated just now"""
    asked = 0
    """the last number that this process asked the preemption service about, of all runs: the trials of a learning rate
    and methods that are compared are several. The service stops at the number after those that the hosts have asked
    about, so a run that counted from its own first step might never reach it"""
    before: int | None = None
    """this number minus the run's step"""

    def __init__(self, exit_code: int = 0):
        self.exit_code = exit_code

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. All processes call it after every step and get the same answer."""
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if self.before is None:
            self.before = StopSignal.asked + 1 - step
        StopSignal.asked = self.before + step
        return reached_preemption_sync_point(StopSignal.asked)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets a signal end the body, by Interrupted, at its next `interruption_point`. The body must only compute."""
        if self.received is not None:
            raise Interrupted
        StopSignal.repeatable = self
        try:
            yield
        finally:
            StopSignal.repeatable = None

    def end(self) -> NoReturn:
        """Ends a run that has saved, by KeyboardInterrupt after Ctrl-C, else by Stopped."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else Stopped(self.exit_code)


def interruption_point() -> None:
    """Raises Interrupted if a signal has come and the work can be repeated. Called between batches: an error raised by
    the signal's handler could leave JAX, which it interrupts, without its own state, and the save would fail."""
    stop = StopSignal.repeatable
    if stop is not None and stop.received is not None and threading.current_thread() is threading.main_thread():
        raise Interrupted


@contextmanager
def stop_signals(given: bool = False, exit_code: int = 0) -> Iterator[StopSignal]:
    """Receives SIGTERM and Ctrl-C during the body. Only the main thread can receive signals.

    Args:
        given: the calling program handles signals (runtime.distributed=given), so none is received here.
        exit_code: of Stopped.
    """
    stop = StopSignal(exit_code)
    here = not given and jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if here else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(number: int, frame) -> None:
        # The next signal acts as it would without us.
        restore()
        if is_first():
            what = "stopping; saving first" if StopSignal.repeatable else "stopping after this step, to save"
            second = "Ctrl-C" if number == signal.SIGINT else "signal"
            with suppress(OSError):  # whoever read it may have ended by the same Ctrl-C
                os.write(2, f"\npara-jax: {what} (a second {second} stops at once)\n".encode())
        stop.received = number

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
