"""Checks that configs and command lines share: `require`, values as an error shows them, and paths."""

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from .storage.bucket import BucketPath, bucket_path


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError with the value and what `name` must be: `expected` completes "NAME must be ...".

    Where that makes no plain sentence, raise a ValueError with one of its own.
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}; got {shorten(value, 200)}")


def require_one_of(names: Iterable[object], name: str, value: object) -> None:
    """Raises ValueError for a value that is none of the names, with the one that was probably meant."""
    known = list(names)
    if value not in known:
        raise ValueError(f"{name} must be {one_of(known)}; got {shorten(value, 200)}{near_name(value, known)}")


def near_name(value: object, names: Iterable[object]) -> str:
    """ "; did you mean accuracy?" for acc, Accuracy and acuracy; nothing if no name is near."""
    text, known = str(value)[:100].lower(), list(map(str, names))
    near = [name for name in known if len(text) > 1 and name.startswith(text)]  # to difflib, acc is not near accuracy
    near += difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(names: Iterable[object]) -> str:
    """The names as "one of a, b, c"; a single name as it is."""
    texts = list(map(str, names))
    return texts[0] if len(texts) == 1 else "one of " + ", ".join(texts)


def shorten(value: object, width: int = 80) -> str:
    """A value as an error shows it: its repr, cut to `width`, so without control characters."""
    try:
        text = repr(value[: width + 1] if isinstance(value, str | list) else value)  # the whole of it takes long
    except (RecursionError, ValueError):  # nested too deep, or a number with too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= width else text[: width - 3] + "..."


def without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object from its pairs, as object_pairs_hook of json.loads. Raises ValueError for a repeated name, because
    readers differ in which of its values they use."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shorten(name)} is there twice")
        found[name] = value
    return found


def printable(text: str, width: int = 500) -> str:
    """A text on one line, cut to `width`, with control characters written out, as in \\x1b."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def expanded(path: str | Path | BucketPath) -> Any:
    """The path with ~ and ~user replaced; a BucketPath for gs://bucket/folder.

    Raises ValueError for what is no path, for an unknown user, and for another kind of address.
    """
    if not isinstance(path, str | os.PathLike | BucketPath):
        raise ValueError(f"a path must be a text or a Path; got {type(path).__name__}")
    text = str(path)
    if (found := bucket_path(path)) is not None:
        return found
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{printable(text)}: there is no such home folder; give the full path") from None


def nearest(path: Path) -> str:
    """The path that was probably meant by a missing one, as "; did you mean runs/mine?", or nothing."""
    missing = path
    try:
        while not missing.parent.is_dir():
            missing = missing.parent
        names = sorted(entry.name for entry in islice(missing.parent.iterdir(), 1000) if entry.name[:1] != ".")
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    if not near:
        return ""
    found = missing.parent / near[0] / path.relative_to(missing)
    return f"; did you mean {printable(str(found if found.exists() else missing.parent / near[0]), 200)}?"
