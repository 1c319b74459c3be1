"""Checks that configs and command lines share, and values of others as an error shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..storage import bucket as storage
from ..storage.bucket import BucketPath


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises the ValueError that names a wrong value and says what was expected."""
    if not holds:
        raise ValueError(f"{name}: {shorten(value, 200)} is not possible; expected {expected}")


def shorten(value: object, width: int = 80) -> str:
    """A value as an error shows it: bounded, and without raw control characters."""
    try:
        text = repr(value[: width + 1] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deep; a number of too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= width else text[: width - 3] + "..."


def printable(text: str, width: int = 500) -> str:
    """A text of others in one line: bounded, and what a terminal could act on written out, as in \\x1b."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def require_place(name: str, path: str | None) -> None:
    """Raises the ValueError for an address that is neither a path nor gs://bucket/folder."""
    try:
        storage.address(path or "")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


#: Characters of a path.
LONGEST_PATH = 2000


def expanded(path: str | Path | BucketPath) -> Any:
    """The path with ~ and ~user replaced; a storage.BucketPath for gs://bucket/folder.

    Raises ValueError for a user who is not known here, for another address, and for a text that no file system has as a
    path: of more than LONGEST_PATH characters, with NUL or half a character.
    """
    text = str(path)
    if len(text) > LONGEST_PATH:
        raise ValueError(f"{shorten(text)}: {len(text)} characters; expected a path, which has {LONGEST_PATH} at most")
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udbff" for c in text):
        raise ValueError(f"{shorten(text)}: expected a path, which has neither NUL nor half a character")
    if (found := storage.address(path)) is not None:
        return found
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{printable(text)}: no such home folder; give the path itself") from None


def one_of(names) -> str:
    return "one of " + ", ".join(names)
