"""Values of a YAML file as the types of a dataclass's fields."""

import dataclasses
import difflib
import json
import typing
from typing import Annotated, Any, Literal

from ..io.checks import printable, require
from ..io.yaml_text import as_text
from .adapter import ADAPTER_CONFIGS
from .bounds import JsonObject, field_types, names_in_files, without_none

#: Truth values that a file may give as quoted text.
TRUTH: dict[str, bool] = {
    "true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def typed_fields(values: Any, template: Any, section: str = "", root: Any = None) -> dict[str, Any]:
    """The mapping with each value as the type of its field: texts, numbers, tuples, and the same for sections.

    Raises ValueError for a field that the dataclass lacks. Other values are checked when the dataclass is made.

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
            raise ValueError(unknown_field(section, name, template, root))
        current = getattr(template, name)
        if dataclasses.is_dataclass(current):
            typed[name] = typed_fields(value, current, f"{section}{name}.", root)
        else:
            typed[name] = typed_value(section + name, value, known[name])
    return typed


def typed_value(name: str, value: Any, kind: Any) -> Any:
    """A value of YAML as a field's type, such as 3 for "3". One that can't be of this type is returned as it is."""
    kind, _ = without_none(kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return tuple(typed_value(name, item, arguments[0]) for item in value) if isinstance(value, list) else value
    if kind is JsonObject:
        return value if isinstance(value, str | None) else json.dumps(value, default=str)
    if kind is bool:
        truth = TRUTH.get(value.lower()) if isinstance(value, str) else value
        return bool(truth) if truth in (0, 1) else value
    if kind is str or typing.get_origin(kind) is Literal:
        if value is False and "off" in arguments:
            return "off"
        if isinstance(
            value, bool | dict
        ):  # YAML 1.1 reads yes, no, on and off as booleans, and {question} as a mapping
            raise ValueError(f"{name}: YAML reads this as {printable(str(value), 200)}; put the text in quotes")
        return as_text(value) if isinstance(value, int | float) else value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    number = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    try:
        return int(as_text(value), 0) if number is int else float(value)  # YAML 1.1 reads 010 as 8, and 1:30 as 90
    except (ValueError, OverflowError):
        return as_text(value)


def unknown_field(section: str, name: str, template: Any, root: Any) -> str:
    """Two lines: the field that is not there, with the one that was meant if that is clear, and the fields there are.

    Args:
        section: where it was given: "train.", or "" for the config itself.
        template, root: the dataclass of the section, and the whole config.
    """
    methods = [method for method, kind in ADAPTER_CONFIGS.items() if kind is type(template)]
    owner = methods[0] if methods else section.rstrip(".") or "a run"
    others = [method for method, kind in ADAPTER_CONFIGS.items() if name in names_in_files(kind)]
    meant = meant_field(section, name, template, root)
    advice = f"; did you mean {meant}?" if meant else ""
    if section == "adapter." and others:
        advice = f"; it is one of adapter.method={' and '.join(others)}"
    fields = ", ".join(names_in_files(template))
    return f"{section}{printable(name, 100)}: no such field of {owner}{advice}\nthe fields of {owner} are {fields}"


def meant_field(section: str, name: str, template: Any, root: Any) -> str | None:
    """The dotted name of the field that was probably meant: of this name in another section, or of a name like it."""
    plain = name[:100].lower().replace("-", "_")
    elsewhere = [field for field in dotted_fields(root) if field.rpartition(".")[2] == plain]
    near = [section + field for field in difflib.get_close_matches(plain, names_in_files(template), n=1)]
    return next(iter(near if section + plain in near else elsewhere + near), None)


def dotted_fields(root: Any) -> list[str]:
    """The fields of a config and of its sections: train, train.learning_rate, and so on."""
    names = []
    for field in dataclasses.fields(root):
        value = getattr(root, field.name)
        inner = names_in_files(value) if dataclasses.is_dataclass(value) else []
        inner += ["method"] if field.name == "adapter" else []
        names += [field.name, *(f"{field.name}.{name}" for name in inner)]
    return names
