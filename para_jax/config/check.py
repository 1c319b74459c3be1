"""Checks of configs and command lines: types and bounds of fields, paths, and values as an error shows them."""

import dataclasses
import math
import numbers
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from ..storage.bucket import BucketPath, bucket_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that a field accepts: `Annotated[float, Bounds(above=0)]`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    """math.inf: any finite number"""

    def accept(self, number: Any) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        limits = [("at least", self.at_least), ("more than", self.above), ("at most", self.at_most)]
        said = [f"{words} {limit}" for words, limit in limits if limit is not None]
        if self.below is not None:
            said.append("finite" if self.below == math.inf else f"less than {self.below}")
        return " and ".join(said)


PositiveInt = Annotated[int, Bounds(at_least=1)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)]
PositiveFloat = Annotated[float, Bounds(above=0, below=math.inf)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0, below=math.inf)]
Fraction = Annotated[float, Bounds(at_least=0, below=1)]


def check_fields(config: Any, section: str = "") -> None:
    """Raises ValueError for a field of a dataclass whose value its Literal or Bounds does not allow.

    Args:
        section: what stands before the field's name in an error, such as "train.".
    """
    for field in dataclasses.fields(config):
        check_value(section + field.name, getattr(config, field.name), field.type)


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a value is not of a type with Literal or Bounds; other types are not checked."""
    kind, optional = without_none(kind)
    arguments = typing.get_args(kind)
    if value is None and optional:
        return
    if typing.get_origin(kind) is Literal:
        require(value in arguments, name, value, one_of(arguments))
    elif typing.get_origin(kind) is Annotated:
        whole = arguments[0] is int
        is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        expected = f"a whole number, {arguments[1]}" if whole else f"a number, {arguments[1]}"
        require(is_number and arguments[1].accept(value), name, value, expected)
    elif arguments and isinstance(value, tuple | list):
        for item in value:
            check_value(name, item, arguments[0])


def without_none(kind: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether it had that."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
    assert len(kinds) == 1, f"a field has one type, and may be None: {kind}"
    return kinds[0], True


def allowed_values(config: type, field: str) -> tuple[str, ...]:
    """The values that a field with a Literal type accepts, without None."""
    kind, _ = without_none(next(each.type for each in dataclasses.fields(config) if each.name == field))
    return typing.get_args(kind)


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError with the value and what `name` must be: `expected` completes "NAME must be ...".

    Where that makes no plain sentence, raise a ValueError with one of its own.
    """
    if not holds:
        raise ValueError(f"{name} must be {expected}; got {shorten(value, 200)}")


def one_of(names: typing.Iterable[object]) -> str:
    return "one of " + ", ".join(map(str, names))


def shorten(value: object, width: int = 80) -> str:
    """A value as an error shows it: its repr, cut to `width`, so without control characters."""
    try:
        text = repr(value[: width + 1] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deep, or a number with too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= width else text[: width - 3] + "..."


def printable(text: str, width: int = 500) -> str:
    """A text on one line, cut to `width`, with control characters written out, as in \\x1b."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: width + 1])
    return text if len(text) <= width else text[: width - 3] + "..."


def require_location(name: str, path: str | None) -> None:
    """Raises ValueError for a location that is neither a path nor gs://bucket/folder."""
    try:
        bucket_path(path or "")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


#: The most characters of a path.
MAX_PATH = 2000


def expanded(path: str | Path | BucketPath) -> Any:
    """The path with ~ and ~user replaced; a BucketPath for gs://bucket/folder.

    Raises ValueError for an unknown user, for another kind of address, and for a text that no file system accepts as a
    path: longer than MAX_PATH characters, or with NUL or half a surrogate pair.
    """
    text = str(path)
    if len(text) > MAX_PATH:
        raise ValueError(f"{shorten(text)} has {len(text)} characters; a path has at most {MAX_PATH}")
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udbff" for c in text):
        raise ValueError(f"{shorten(text)} has characters that no path can have; remove NUL and half surrogate pairs")
    if (found := bucket_path(path)) is not None:
        return found
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{printable(text)}: there is no such home folder; give the full path") from None
