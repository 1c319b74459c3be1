"""YAML as plain dictionaries, lists and scalars: no objects, no dates, no repeated keys."""

from __future__ import annotations

import re
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; None where it is empty.

    Raises ValueError, with the line, for a text that is not YAML.
    """
    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{problem or 'not YAML: ' + str(error).splitlines()[0]}{line}") from None


def dump_yaml(value: Any) -> str:
    """The YAML text that `parse_yaml` reads back to this value: dictionaries, lists and scalars."""
    return yaml.dump(value, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


class WrittenInt(int):
    """A whole number that knows how it was written. Where a text is wanted, 007 and 20261127_1530 are that text."""

    written: str


class WrittenFloat(float):
    """A number that knows how it was written, such as 2.50 or 1e3."""

    written: str


def as_text(value: Any) -> str:
    """A text or number of YAML as it was written."""
    return getattr(value, "written", str(value))


class PlainDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes texts such as 1e3 that PlainLoader reads as numbers."""


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, and with numbers such as 1e3, for which PyYAML requires a dot and a sign."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # <<, which may come several times
                continue
            if key.tag != "tag:yaml.org,2002:str" or key.value in keys:
                is_text = key.tag == "tag:yaml.org,2002:str"
                what = f"found duplicate key {key.value}" if is_text else f"the key {key.value!r} is not text; quote it"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> WrittenInt:
        number = WrittenInt(super().construct_yaml_int(node))
        number.written = node.value
        return number

    def construct_yaml_float(self, node: yaml.ScalarNode) -> WrittenFloat:
        number = WrittenFloat(super().construct_yaml_float(node))
        number.written = node.value
        return number


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SCIENTIFIC = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for kind in (PlainLoader, PlainDumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+0123456789"))
