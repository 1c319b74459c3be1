"""Values of a YAML file as the types of a dataclass's fields."""

import dataclasses
import json
import typing
from typing import Annotated, Any, Literal

from ..io.checks import require, shorten
from ..io.yaml_text import as_text
from .adapter import ADAPTER_CONFIGS
from .bounds import JsonObject, field_types, without_none
from .model import SITES
from .unknown_field import unknown_field

#: Truth values that a file may give as quoted text.
TRUTH: dict[str, bool] = {
    "true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def typed_fields(values: Any, template: Any, section: str = "", root: Any = None) -> dict[str, Any]:
    """The mapping with each value as the type of its field: texts, numbers, tuples, and the same for sections.

    Raises ValueError that names the field: for one that the dataclass lacks, with the nearest that it has, and for a
    value of another type. Bounds are not checked here.

    Args:
        template: a dataclass instance. Its values are not used, but for the classes of its sections.
        root: the template of the whole config; default: `template` is that.
    """
    root = template if root is None else root
    require(isinstance(values, dict), section.rstrip("."), values, "a mapping of fields")
    known = field_types(type(template))
    typed = {}
    for name, value in values.items():
        if name not in known:
            methods = [method for method, kind in ADAPTER_CONFIGS.items() if kind is type(template)]
            owner = methods[0] if methods else section.rstrip(".") or "a run"
            raise ValueError(unknown_field(section, str(name), template, root, owner))
        current = getattr(template, name)
        if dataclasses.is_dataclass(current):
            typed[name] = typed_fields(value, current, f"{section}{name}.", root)
        else:
            typed[name] = typed_value(section + name, value, known[name])
    return typed


def typed_value(name: str, value: Any, kind: Any) -> Any:
    """A value of YAML as a field's type: bool, int, float, str, Literal, or a tuple of these; each perhaps `| None`."""
    kind, optional = without_none(kind)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else None
        sites = f"a list of one or more of {', '.join(SITES)}"
        expected = sites if name.endswith("target_modules") else "a list, such as [a, b] or []"
        require(items is not None, name, value, expected)
        return tuple(typed_value(name, item, typing.get_args(kind)[0]) for item in items or ())
    if kind is JsonObject:
        return value if isinstance(value, str) else json.dumps(value, default=str)
    others = ""
    if typing.get_origin(kind) is Annotated:
        kind, bounds = typing.get_args(kind)[:2]
        if bounds.words:
            if isinstance(value, str) and value in bounds.words:
                return value
            kind, others = float, "".join(f", or {word}" for word in bounds.words)
    if kind is bool:
        truth = TRUTH.get(value.lower()) if isinstance(value, str) else value
        require(isinstance(truth, bool | int) and truth in (0, 1), name, value, "true or false")
        return bool(truth)
    if value is False and "off" in typing.get_args(kind):
        return "off"
    if isinstance(value, bool):  # YAML 1.1 reads yes, no, on and off as booleans
        raise ValueError(f'{name}: {value} is a truth value in YAML; quote the text, such as \'["yes", "no"]\'')
    if kind is int:
        return parsed_number(name, value, int, "a whole number")
    if kind is float:
        return parsed_number(name, value, float, f"a number{others}")
    assert kind is str or typing.get_origin(kind) is Literal, f"{name}: fields of type {kind} are not read"
    if isinstance(value, dict):
        raise ValueError(f"{name}: {shorten(value)} is a mapping in YAML; quote the text, such as '{{question}}'")
    require(isinstance(value, str | int | float), name, value, "text")
    return as_text(value)


def parsed_number(name: str, value: Any, kind: type, expected: str) -> Any:
    """The number in a number or text, such as 3 or "3"."""
    fits = isinstance(value, (int, str, kind))
    require(fits, name, value, expected)
    try:
        return int(as_text(value), 0) if kind is int else kind(value)  # YAML 1.1 reads 010 as 8, and 1:30 as 90
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be {expected}; got {shorten(getattr(value, 'written', value), 200)}") from None
