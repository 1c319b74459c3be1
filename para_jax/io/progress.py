"""Progress of work that takes longer than two seconds: a bar on a terminal and in a notebook, lines elsewhere.

A log, a pipe or CI gets a line through `say` every 15 seconds, such as
`training: step 20 of 60, loss 0.4312, 4.4 s per step, 3 min left`. Work that ends within two seconds shows nothing.
Only the first process of a run shows anything. With TQDM_DISABLE=1 in the environment, lines replace the bars.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .messages import say, speaks

with warnings.catch_warnings():  # in a notebook without ipywidgets, tqdm warns here, and then draws the bar as text
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

#: Work that ends within these seconds shows nothing.
SHOWN_AFTER = 2.0
#: Seconds between two lines where there is no bar.
LINE_EVERY = 15.0
#: The rate is an average over the time of this many lines.
RATE_LINES = 4


class Progress:
    """Shows the progress of some work: `with Progress("loading", 300, unit="tensor") as bar: ... bar.advance()`.

    A thread makes sure that work appears after two seconds even if nothing advances until then. An exception takes the
    bar away, and nothing follows it.
    """

    def __init__(
        self, what: str, total: int | None = None, *, unit: str = "", done: int = 0, keep: bool = False, clock=None
    ):
        """
        Args:
            total: the number of units to do; None: unknown.
            unit: one of what is counted, such as "step".
            done: the units that were done before this began.
            keep: whether the bar of finished work stays on the screen.
            clock: gives the seconds; default: time.monotonic.
        """
        self.what, self.total, self.unit, self.done, self.keep = what, total, unit, done, keep
        self.details: dict[str, Any] = {}
        self._clock = clock or time.monotonic
        self._lock = threading.RLock()
        self._open = self._shown = False
        self._bar: tqdm | None = None
        self._begun = self._last_line = self._away = 0.0
        self._done_away = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_LINES + 1)
        """(seconds away left out, units done away left out) at the first advance and at each line"""

    def __enter__(self) -> Progress:
        self._begun, self._open = self._clock(), True
        self._timer = threading.Timer(SHOWN_AFTER, self._show)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._timer.cancel()
        with self._lock:
            self._open = False
            if self._bar is not None:
                self._bar.leave = self.keep and kind is None
                self._bar.close()
            elif self._shown and kind is None:
                say(f"{self.what} took {duration(self._clock() - self._begun)}")

    def advance(self, count: int = 1, **details: Any) -> None:
        """Adds units that are done. Details, such as loss="0.43", are shown until they are given again."""
        now = self._clock()
        with self._lock:
            self.done += count
            self.details |= details
            if not self._open:
                return
            if not self._marks:  # the time until now may have gone into compiling
                self._mark(now)
            if not self._shown:
                if now - self._begun >= SHOWN_AFTER:
                    self._show()
            elif self._bar is not None:
                self._bar.set_postfix_str(", ".join(self._detail_texts()), refresh=False)
                self._bar.update(self.done - self._bar.n)
            elif now - self._last_line >= LINE_EVERY:
                self._line(now)

    @contextmanager
    def away(self, count: int = 0) -> Iterator[None]:
        """Leaves the body out of the seconds per unit: its time, such as that of compiling, and the `count` units that
        are done in it, which `advance` counts later."""
        begun = self._clock()
        yield
        with self._lock:
            self._away += self._clock() - begun
            self._done_away += count

    def _show(self) -> None:
        """Shows the work for the first time."""
        with self._lock:
            if not self._open or self._shown:
                return
            self._shown = True
            if not shows_bars():
                self._line(self._clock())
            elif speaks():
                how: dict[str, Any] = dict(total=self.total, initial=self.done, desc=self.what, unit=self.unit or "it")
                self._bar = tqdm(**how, file=sys.stderr)
                self._bar.start_t -= self._clock() - self._begun
                self._bar.set_postfix_str(", ".join(self._detail_texts()))

    def _line(self, now: float) -> None:
        self._last_line = now
        parts = [self._position(), *self._detail_texts(), *self._rate(now - self._away)]
        if self._marks:
            self._mark(now)
        say(f"{self.what}: {', '.join(filter(None, parts))}" if any(parts) else f"{self.what} ...")

    def _mark(self, now: float) -> None:
        self._marks.append((now - self._away, self.done - self._done_away))

    def _position(self) -> str:
        units = plural(self.unit, self.total or self.done)
        if self.total is None:
            return f"{self.done} {units}".rstrip() if self.done else ""
        if self.unit == "step":
            return f"step {self.done} of {self.total}"
        return f"{self.done} of {self.total} {units}".rstrip()

    def _detail_texts(self) -> list[str]:
        """Each detail as "loss 0.43", and a rate as "350 tokens/s"."""
        return [f"{value} {name}" if name.endswith("/s") else f"{name} {value}" for name, value in self.details.items()]

    def _rate(self, now: float) -> list[str]:
        """The seconds per unit, if a unit takes at least one, and the time left, once both can be told."""
        if not self._marks:
            return []
        begun, before = self._marks[0]
        done = self.done - self._done_away - before
        if done < 1 or now <= begun:
            return []
        seconds = (now - begun) / done
        pace = [f"{seconds:.1f} s per {self.unit}"] if self.unit and seconds >= 0.95 else []
        return pace + ([f"{duration(seconds * (self.total - self.done))} left"] if self.total else [])


def shows_bars() -> bool:
    """Whether a line that changes can be shown: on a terminal, or in a notebook."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    is_terminal = getattr(sys.stderr, "isatty", bool)  # a program may have put another object there
    return in_notebook() or (is_terminal() and has_width())


def has_width() -> bool:
    """Whether the terminal says how wide it is. One that a program such as `script` or `docker run -t` made may not,
    and tqdm then draws nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):
        return True


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook: Jupyter, Colab or an editor's."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 3 min, 2 h 10 min."""
    if seconds < 99.5:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def plural(unit: str, count: int) -> str:
    return unit if count == 1 or not unit else f"{unit}s"
