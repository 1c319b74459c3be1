"""Being told to stop: SIGTERM, or the first Ctrl-C, lets a run finish its step and save; a second one ends it at once.

Hosts of one run must stop after the same step: there JAX's preemption service receives SIGTERM and agrees on the step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax

from ..processes import is_first


class Stopped(SystemExit):
    """A run was told to stop, and has saved where it stood; where nobody catches this, the program exits with 0."""

    def __init__(self):
        super().__init__(0)


class Interrupted(BaseException):
    """A signal came while the run did something that can be repeated."""


class StopSignal:
    """What has been received. Its `handle` is installed by `stop_signals`."""

    received: int | None = None
    repeatable = False

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, on all processes alike; each calls it after every step."""
        if jax.process_count() == 1:
            return self.received is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """For a body that is only computing: a signal ends it at once, with Interrupted."""
        self.repeatable = True
        try:
            if self.received is not None:
                raise Interrupted
            yield
        finally:
            self.repeatable = False

    def handle(self, number: int, frame) -> None:
        self.received = number
        if self.repeatable:
            self.repeatable = False
            raise Interrupted

    def end(self) -> NoReturn:
        """Ends a run that has saved: KeyboardInterrupt after Ctrl-C, else Stopped."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else Stopped


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Receives SIGTERM and Ctrl-C while the body lasts (in the main thread; elsewhere nothing can be received)."""
    stop = StopSignal()
    here = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if here else {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(number: int, frame) -> None:
        restore()
        if is_first():
            os.write(2, b"\npara-jax: stopping after this step, to save; a second signal stops at once\n")
        stop.handle(number, frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
