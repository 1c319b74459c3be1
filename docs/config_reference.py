"""The page of the config's fields: name, type, default, bounds and text of each, from the dataclasses themselves."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from sphinx.pycode import ModuleAnalyzer

from para_jax import RunConfig
from para_jax.config.adapter import ADAPTER_CONFIGS
from para_jax.config.bounds import JsonObject, field_types, names_in_files, without_none

KINDS = {bool: "true or false", str: "text", int: "whole number", float: "number", JsonObject: "mapping"}


def config_reference() -> str:
    """The definitions of all fields, in MyST."""
    config = RunConfig()
    lines = list[str]()
    for name in names_in_files(config):
        value = getattr(config, name)
        if name == "adapter":
            for method, kind in ADAPTER_CONFIGS.items():
                lines += [f"## adapter, method {method}", "", *described("adapter", kind, kind())]
        elif dataclasses.is_dataclass(value):
            lines += [f"## {name}", "", *described(name, type(value), value)]
    tops = [name for name in names_in_files(config) if not dataclasses.is_dataclass(getattr(config, name))]
    return "\n".join([*lines, "## Outside the sections", "", *described("", RunConfig, config, tops)])


def described(section: str, kind: type, values: Any, names: list[str] | None = None) -> Iterator[str]:
    """A definition for each field."""
    texts, types = field_texts(kind), field_types(kind)
    for name in names or names_in_files(values):
        default = getattr(values, name)
        text = " ".join(texts.get(name, [])).strip()
        said = "null" if default is None else repr(default) if isinstance(default, str) else default
        yield f"`{section}{'.' * bool(section)}{name}`: {type_text(types[name])}, default {said}"
        if not text:
            raise ValueError(f"{kind.__name__}.{name} has no text below it")
        yield f": {text[:1].upper()}{text[1:]}"
        yield ""


def field_texts(kind: type) -> dict[str, list[str]]:
    """The text below each field, also of the classes that the class extends."""
    texts: dict[str, list[str]] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("para_jax"):
            found = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            texts |= {name: lines for (owner, name), lines in found.items() if owner == base.__name__}
    return texts


def type_text(kind: Any) -> str:
    kind, optional = without_none(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        text = " or ".join(f"`{value}`" for value in arguments)
    elif origin is Annotated:
        number, bounds = arguments
        base = int if number is int else float
        text = f"{KINDS[base]}, {bounds}"
    elif origin is tuple:
        text = f"list of {type_text(arguments[0])}"
    else:
        text = KINDS.get(kind, getattr(kind, "__name__", str(kind)))
    return f"{text}, or null" if optional else text
