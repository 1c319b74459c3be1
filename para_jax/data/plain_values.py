"""The values of rows as plain Python, whatever library gave them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np


def plain_value(value: Any) -> Any:
    """A field's value without NumPy types, and with bytes as text. Bytes that are no text stay, and are an error where
    they are used."""
    if isinstance(value, dict):
        return {name: plain_value(part) for name, part in value.items()}
    if isinstance(value, np.floating) and value.itemsize != 8:
        return float(str(value))  # the shortest number that rounds to it: 0.1 and not 0.10000000149011612
    if isinstance(value, np.ndarray) and not value.ndim:
        return plain_value(value[()])
    if isinstance(value, np.datetime64 | np.timedelta64):
        return plain_time(value)
    if isinstance(value, np.ndarray | np.generic):
        each = isinstance(value, np.ndarray) and value.dtype.kind in "fmM"
        found = list(value) if each else value.tolist()  # pyright: ignore[reportArgumentType]
        return value if isinstance(found, np.generic) else plain_value(found)
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def plain_time(value: np.datetime64 | np.timedelta64) -> Any:
    """A date, time or duration of Python, cut to microseconds; None for NaT. Text if Python has no such value: NumPy
    would give a number."""
    if np.datetime_data(value.dtype)[0] in ("ns", "ps", "fs", "as"):
        value = value.astype(f"{value.dtype.kind}8[us]")
    found = value.item()
    return str(value) if isinstance(found, int) else found
