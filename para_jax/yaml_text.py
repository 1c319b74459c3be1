"""YAML as plain dictionaries, lists and scalars, within bounds: no objects, no dates, no repeated keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: Bounds of a text: characters, levels, and values. An alias counts as all values that it repeats.
MAX_LENGTH, MAX_LEVELS, MAX_VALUES = 2**18, 32, 10_000


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; None where it is empty.

    Raises ValueError, with the line, for a text that is not YAML or exceeds the bounds, and for a value that is neither
    text, number, truth value nor null.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    try:
        read = yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{problem or 'not YAML: ' + str(error).splitlines()[0]}{line}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_LEVELS} levels") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"a tag or number that is not YAML ({error})") from None  # !!bool x, 1:1: ... :1.0
    return plain(read)


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

    def construct_document(self, node: yaml.Node) -> Any:
        require_bounded(node)  # before anything is built: merge keys (<<) copy their values
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.value in keys:
                what = f"found duplicate key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key is not text"
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


def require_bounded(document: yaml.Node) -> None:
    """Raises a YAML error for too many levels (a recursive alias has infinitely many) and for too many values."""
    level, values = [document], 1
    for _ in range(MAX_LEVELS):
        values += sum(len(node.value) * (1 + isinstance(node, yaml.MappingNode)) for node in level if parts(node))
        if values > MAX_VALUES:
            break
        level = [inner for node in level for inner in parts(node)]
        if not level:
            return
    what = f"more than {MAX_VALUES} values" if values > MAX_VALUES else f"nested deeper than {MAX_LEVELS} levels"
    raise yaml.constructor.ConstructorError(None, None, what, level[0].start_mark)


def parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def plain(value: Any) -> Any:
    """A copy of the value that shares nothing. Raises ValueError for objects and for numbers beyond 64 bits."""
    if isinstance(value, dict):
        return {plain_key(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number has more than 64 bits")
    if value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError(f"a value of type {type(value).__name__}; use text, a number, true, false or null")
    return value


def plain_key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {plain(key)!r} is not text; quote it")
    return key
