"""The values that fields of a config accept: `Bounds` of numbers, Literal types, and the check of a dataclass."""

import dataclasses
import math
import numbers
import os
import types
import typing
from typing import Annotated, Any, Literal, NewType

from ..io.checks import require, require_one_of, shorten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that a field accepts: `Annotated[float, Bounds(above=0)]`."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    """math.inf: any number that is finite in float32"""
    words: tuple[str, ...] = ()
    """texts that are accepted instead of a number"""

    def accept(self, number: Any) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or -(2.0**128) < number < min(self.below, 2.0**128))
        )

    def __str__(self) -> str:
        limits = [("at least", self.at_least), ("more than", self.above), ("at most", self.at_most)]
        said = [f"{words} {limit}" for words, limit in limits if limit is not None]
        if self.below is not None:
            said.append("finite" if self.below == math.inf else f"less than {self.below}")
        return " and ".join(said) + "".join(f", or {word}" for word in self.words)


PositiveInt = Annotated[int, Bounds(at_least=1)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)]
PositiveFloat = Annotated[float, Bounds(above=0, below=math.inf)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0, below=math.inf)]
Finite = Annotated[float, Bounds(below=math.inf)]
Fraction = Annotated[float, Bounds(at_least=0, below=1)]
#: The text of a JSON object. A file may give it as a mapping.
JsonObject = NewType("JsonObject", str)


def field_types(config: type) -> dict[str, Any]:
    """The fields of a dataclass that a file may hold and their types, also where `from __future__ import annotations`
    made them texts."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {name: hints[name] for name in names_in_files(config)}


def names_in_files(config: Any) -> list[str]:
    """The fields of a dataclass that a file or an override may set."""
    return [field.name for field in dataclasses.fields(config) if field.metadata.get("in_file", True)]


def check_fields(config: Any, section: str = "") -> None:
    """Raises ValueError for a field of a dataclass whose value has the wrong type, or is outside the field's Literal or
    Bounds. Values become Python's own types, which a file can hold and which can be hashed.

    Args:
        section: what stands before the field's name in an error, such as "train.".
    """
    for name, kind in field_types(type(config)).items():
        object.__setattr__(config, name, in_python_types(getattr(config, name)))
        check_value(section + name, getattr(config, name), kind)


def in_python_types(value: Any) -> Any:
    """The value with Python's numbers instead of NumPy's and JAX's, tuples instead of lists and arrays, and texts
    instead of paths."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple | list | range):
        return tuple(map(in_python_types, value))
    return str(value) if isinstance(value, os.PathLike) else value


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a value is not of its field's type, or not what a Literal or Bounds allows. Fields of
    type Any or JsonObject are not checked."""
    kind, optional = without_none(kind)
    kind = Finite if kind is float else kind
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value is None and optional:
        return
    if origin is Literal:
        require_one_of(arguments, name, value)
    elif origin is Annotated or kind is int:
        number, bounds = arguments[:2] if arguments else (int, Bounds())
        whole = number is int
        is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        expected = ", ".join(filter(None, ["a whole number" if whole else "a number", str(bounds)]))
        fits = value in bounds.words if isinstance(value, str) else is_number and bounds.accept(value)
        require(fits, name, value, expected)
    elif origin is tuple:
        require(isinstance(value, tuple), name, value, "a list, such as [a, b] or []")
        for item in value:
            check_value(f"{name} {shorten(list(value))}: each item", item, arguments[0])
    elif kind is not Any and isinstance(kind, type):
        names = {bool: "true or false", str: "a text"}
        require(isinstance(value, kind), name, value, names.get(kind, f"a {kind.__name__}"))


def without_none(kind: Any) -> tuple[Any, bool]:
    """A field's type without `| None`, and whether it had that."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    kinds = [each for each in typing.get_args(kind) if each is not types.NoneType]
    assert len(kinds) == 1, f"a field has one type, and may be None: {kind}"
    return kinds[0], True


def allowed_values(config: type, field: str) -> tuple[str, ...]:
    """The values that a field with a Literal type accepts, without None."""
    kind, _ = without_none(field_types(config)[field])
    return typing.get_args(kind)
