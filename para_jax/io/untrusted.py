"""Files from untrusted sources: JSON read within bounds, and their text as an error or a report shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .checks import shorten, without_repeats

#: The maximum size of a config. Published ones have a few kB.
MAX_JSON_BYTES = 2**20
#: The maximum nesting of JSON. A config has three levels.
MAX_DEPTH = 64


def read_json(file: Path, most: int = MAX_JSON_BYTES) -> dict:
    """The mapping in a JSON file. Raises ValueError, naming the file, for more than `most` bytes, for anything but a
    mapping, and for a mapping that repeats a name."""
    with file.open("rb") as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{file}: larger than {most} bytes, so it describes no model or adapter; fetch it again")
    try:
        return json_mapping(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def json_mapping(text: bytes) -> dict:
    """The mapping in a JSON text (UTF-8). Raises ValueError for anything else, for more than MAX_DEPTH levels, and for
    a repeated name, because readers differ in which of its values they use."""
    try:
        found = json.loads(str(text, "utf-8"), object_pairs_hook=without_repeats, parse_int=bounded_int)
    except UnicodeDecodeError:
        raise ValueError("not JSON: the bytes are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
    require_flat(found)
    if not isinstance(found, dict):
        raise ValueError(f"{shorten(found)} is not a mapping")
    return found


def bounded_int(text: str) -> int:
    if len(text) > 1000:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def require_flat(value: object) -> None:
    """Raises ValueError for a value that nests deeper than MAX_DEPTH. Errors show values by `repr`, which recurses."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in values_in(outer) if type(inner) in (dict, list) and inner]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")


def values_in(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def require_unicode(name: str, value: object) -> None:
    """Raises ValueError for half a surrogate pair, which cannot be tokenised or written to a file, and for a value that
    is not JSON or is nested too deeply."""
    try:
        require_flat(value)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {error.object[error.start : error.end]!r} is half a surrogate pair") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None


def safe_names(names: Iterable[str]) -> str:
    """The first five names, each cut and without control characters, and how many there are."""
    names = list(dict.fromkeys(names))
    named = ", ".join(safe_name(name) for name in names[:5])
    return named + (f" ... ({len(names)} in all)" if len(names) > 5 else "")


def safe_name(name: str, width: int = 200) -> str:
    """The name itself, or its `shorten` if it is long or not printable."""
    return name if name.isprintable() and len(name) <= width else shorten(name, width)


def one_line(text: str, width: int = 500) -> str:
    """A text as one line without control characters, cut to `width`."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:width]).split())
