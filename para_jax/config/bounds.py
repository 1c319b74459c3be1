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
            and (self.below is None or number < min(self.below, 2.0**128))
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
Finite = Annotated[float, Bounds(above=-(2.0**128), below=math.inf)]
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
    Bounds. NumPy's and JAX's numbers become Python's, and paths become texts, because files can hold these. Lists
    become tuples, because configs are hashed.

    Args:
        section: what stands before the field's name in an error, such as "train.".
    """
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        own = in_python_types(value)
        own = tuple(own) if isinstance(own, list | range) else own
        if own is not value:
            object.__setattr__(config, name, own)
        check_value(section + name, own, kind)


def in_python_types(value: Any) -> Any:
    """The value with Python's numbers instead of other libraries', a tuple instead of an array and a text instead of a
    path; the same object if it has none of them."""
    if isinstance(value, tuple | list):
        own = [in_python_types(item) for item in value]
        return value if all(a is b for a, b in zip(own, value, strict=True)) else tuple(own)
    if isinstance(value, os.PathLike):
        return str(value)
    own = value.tolist() if hasattr(value, "tolist") else value
    return tuple(own) if own is not value and isinstance(own, list) else own


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where a value is not of its field's type, or not what a Literal or Bounds allows. Fields of
    type Any or JsonObject are not checked."""
    kind, optional = without_none(kind)
    arguments = typing.get_args(kind)
    if value is None and optional:
        return
    if typing.get_origin(kind) is Literal:
        require_one_of(arguments, name, value)
    elif typing.get_origin(kind) is Annotated:
        if isinstance(value, str) and value in arguments[1].words:
            return
        integer = arguments[0] is int
        is_number = isinstance(value, numbers.Integral if integer else numbers.Real) and not isinstance(value, bool)
        expected = f"a whole number, {arguments[1]}" if integer else f"a number, {arguments[1]}"
        require(is_number and arguments[1].accept(value), name, value, expected)
    elif kind in (bool, str):
        require(isinstance(value, kind), name, value, "true or false" if kind is bool else "a text")
    elif kind is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(whole, name, value, "a whole number")
    elif kind is float:
        check_value(name, value, Finite)
    elif typing.get_origin(kind) is tuple:
        require(isinstance(value, tuple), name, value, "a list")
        items = f"each item of {name} {shorten(list(value or ()))}"
        for item in value or ():
            check_value(items, item, arguments[0])
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        require(isinstance(value, kind), name, value, f"a {kind.__name__}")


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
