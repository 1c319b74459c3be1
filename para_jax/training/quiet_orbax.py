"""Keeps orbax's tracebacks off the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silences what orbax's threads report about an error that orbax raises as well: tracebacks of several pages, by
    the loggers of absl and asyncio, and by the interpreter for a write that a failed one left behind. If the body
    raises, it stays quiet, because the threads outlive the error."""
    hook = sys.unraisablehook

    def unraisable(found) -> None:
        if str(found.exc_value) != "Event loop is closed":
            hook(found)

    logging.getLogger("absl").addFilter(not_from_orbax)
    logging.getLogger("asyncio").addFilter(not_unretrieved)
    sys.unraisablehook = unraisable
    yield
    logging.getLogger("absl").removeFilter(not_from_orbax)
    logging.getLogger("asyncio").removeFilter(not_unretrieved)
    sys.unraisablehook = hook


def not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def not_unretrieved(record: logging.LogRecord) -> bool:
    """Of many reads that fail together, orbax raises one. asyncio would log the others."""
    return "exception was never retrieved" not in str(record.msg)
