"""Progress of work that takes longer than two seconds, by tqdm: a bar on a terminal and in a notebook, lines elsewhere.

A log, a pipe or CI gets a line through `say` every 15 seconds. Only the first process of a run shows anything. With
TQDM_DISABLE=1 in the environment, lines replace the bars.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from .messages import say, speaks

with warnings.catch_warnings():  # in a notebook without ipywidgets, tqdm warns here, and then draws the bar as text
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

#: Work that ends within these seconds shows nothing.
SHOWN_AFTER = 2.0
#: Seconds between two lines where there is no bar.
LINE_EVERY = 15.0


class Progress:
    """Shows the progress of some work: `with Progress("loading", 300, unit="tensor") as bar: ... bar.advance()`.

    An exception takes the bar away.
    """

    def __init__(self, what: str, total: int | None = None, *, unit: str = "it", done: int = 0, keep: bool = False):
        """
        Args:
            total: the number of units to do; None: unknown.
            unit: one of what is counted, such as "step".
            done: the units that were done before this began.
            keep: whether the last state of finished work stays on the screen.
        """
        self.done, self.details = done, {}
        how: dict[str, Any] = {"file": sys.stderr}
        self._lines = not shows_bars()
        if self._lines:
            form = "{desc}: {n_fmt} of {total_fmt} {unit}s{postfix}, {rate_fmt}, {remaining} left"
            without_total = "{desc}: {n_fmt} {unit}s{postfix}, {rate_fmt}"
            how = {"file": Lines(), "bar_format": form if total else without_total, "miniters": 1, "position": 0}
        how |= {"total": total, "initial": done, "desc": what, "unit": unit, "leave": keep, "smoothing": 0.5}
        self._bar = tqdm(**how, delay=SHOWN_AFTER, mininterval=0.1, disable=not speaks())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind, *_) -> None:
        self._bar.leave = self._bar.leave and kind is None  # a bar of failed work says nothing
        self._bar.close()

    def advance(self, count: int = 1, **details: Any) -> None:
        """Adds units that are done. Details, such as loss="0.43", are shown until they are given again."""
        self.done += count
        self.details |= details
        texts = [
            f"{value} {name}" if name.endswith("/s") else f"{name} {value}" for name, value in self.details.items()
        ]
        self._bar.set_postfix_str(", ".join(texts), refresh=False)
        if self._bar.update(count) and self._lines:
            self._bar.mininterval = LINE_EVERY  # the first line comes as soon as a bar would


class Lines:
    """A file for tqdm that logs what tqdm draws."""

    def write(self, text: str) -> None:
        if line := text.strip():
            say(line)

    def flush(self) -> None:
        """tqdm calls it."""


def shows_bars() -> bool:
    """Whether a line that changes can be shown: on a terminal, or in a notebook."""
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return False
    is_terminal = getattr(sys.stderr, "isatty", bool)  # a program may have put another object there
    return is_terminal() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook: Jupyter, Colab or an editor's."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
