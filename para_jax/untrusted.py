"""What files of others hold: JSON read within bounds, and their words as an error or a report shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .config import shorten

#: The most that is read of a config. Published ones have a few kB.
MAX_JSON_BYTES = 2**20
#: The most levels that JSON may nest. A config has three.
MAX_DEPTH = 64


def read_json(file: Path, most: int = MAX_JSON_BYTES) -> dict:
    """The mapping in a JSON file. Raises ValueError, naming the file, for more than `most` bytes, for what is not a
    mapping, and for a mapping that has a name twice."""
    with file.open("rb") as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{file}: larger than {most} bytes; such a file describes no model or adapter")
    try:
        return json_mapping(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def json_mapping(text: bytes) -> dict:
    """The mapping that a JSON text (UTF-8) is. Raises ValueError for anything else, for more than MAX_DEPTH levels, and
    for a name that stands twice: readers differ in which of the two they take."""
    try:
        found = json.loads(str(text, "utf-8"), object_pairs_hook=once_each, parse_int=whole_number)
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


def once_each(pairs: list[tuple[str, object]]) -> dict:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shorten(name)} stands there twice")
        found[name] = value
    return found


def whole_number(text: str) -> int:
    if len(text) > 1000:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def require_flat(value: object) -> None:
    """Raises ValueError for a value that nests deeper than MAX_DEPTH: `repr` recurses, and an error has to show it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in inside(outer)]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")


def inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def some(names: Iterable[str]) -> str:
    """The first five names, each bounded and without control characters, and how many there are."""
    names = list(dict.fromkeys(names))
    named = ", ".join(shown(name) for name in names[:5])
    return named + (f" ... ({len(names)} in all)" if len(names) > 5 else "")


def shown(name: str, width: int = 200) -> str:
    """A name as it is, unless it is long or not printable: then as `shorten` has it."""
    return name if name.isprintable() and len(name) <= width else shorten(name, width)


def one_line(text: str, width: int = 500) -> str:
    """A text as one line without control characters, cut to `width`."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:width]).split())
