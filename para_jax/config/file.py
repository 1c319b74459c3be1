"""A run's YAML file: `load_config` reads one, with overrides, and `save_config` writes one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import atomic
from ..yaml_text import MAX_LENGTH, parse_yaml
from .adapter import ADAPTER_CONFIGS
from .check import expanded, one_of, printable, require, shorten
from .run import RunConfig

# Fields whose override is taken as it stands (OmegaConf would read "{output}" as a mapping), with \n for a newline.
TEXT_FIELDS = ("data.prompt", "data.completion")


def load_config(file: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A RunConfig from a YAML file (None: the defaults) and overrides such as "train.learning_rate=3e-3". An override
    of adapter.method drops what the file says of the other method's fields.

    Raises ValueError, naming the field and the nearest known one, for an unknown key, a wrong type or a bad value.
    """
    given = {} if file is None else read_yaml(expanded(file))
    changes: dict = {}
    for text in overrides:
        changes = merged(changes, parse_override(text))
    if method_of(changes) not in (None, method_of(given) or "para"):
        given.pop("adapter", None)  # whose fields are another method's
    run = merged(given, changes)
    adapter = run.get("adapter", {})
    require(isinstance(adapter, dict), "adapter", adapter, "a mapping, such as {method: para, r: 12}")
    method = adapter.get("method", "para")
    require(method in tuple(ADAPTER_CONFIGS), "adapter.method", method, one_of(ADAPTER_CONFIGS))
    run["adapter"] = {name: value for name, value in adapter.items() if name != "method"}
    template = RunConfig(adapter=ADAPTER_CONFIGS[method]())
    require_readable(run, template)
    schema = OmegaConf.structured(template)
    unfreeze(schema)
    try:
        found = OmegaConf.merge(schema, hidden(run))
    except (OmegaConfBaseException, TypeError, ValueError, IndexError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        key = getattr(error, "full_key", None)
        said = f"{key}: {lines[0]}" if key else lines[0]
        raise ValueError(f"config{f' {file}' if file else ''}: {printable(shown(said))}") from None
    return to_dataclass(found, template)


def merged(below: dict, above: dict, section: str = "") -> dict:
    """The fields of both; where both have one, `above` wins, and sections are merged."""
    joined = below | above
    for name in below.keys() & above.keys():
        low, high = below[name], above[name]
        if isinstance(high, dict) and low is not None:
            require(isinstance(low, dict), f"{section}{name}", low, "a mapping of fields")
            joined[name] = merged(low, high, f"{section}{name}.")
    return joined


def method_of(given: dict) -> Any:
    """What a file or overrides say of adapter.method."""
    adapter = given.get("adapter")
    return adapter.get("method") if isinstance(adapter, dict) else None


def save_config(config: RunConfig, file: str | Path) -> None:
    """Writes a config as YAML that `load_config` reads back to an equal one; what is there before stays whole."""
    text = yaml.dump(config_dict(config), Dumper=Quoting, sort_keys=False, allow_unicode=True)
    atomic.write_text(expanded(file), text)


class Quoting(yaml.SafeDumper):
    """Quotes texts such as 1e3 too, which OmegaConf reads as numbers, unlike PyYAML."""


def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


Quoting.add_representer(str, quoted)


def config_dict(config: RunConfig) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, with `adapter.method`."""
    plain = _plain(dataclasses.asdict(config))
    return plain | {"adapter": {"method": adapter_method(config.adapter)} | plain["adapter"]}


def adapter_method(config) -> str:
    """The name under which an adapter config stands in ADAPTER_CONFIGS."""
    return next(name for name, kind in ADAPTER_CONFIGS.items() if kind is type(config))


def read_yaml(file: Path) -> dict:
    if file.is_dir():
        raise ValueError(f"config {file}: a folder; expected a .yaml file, such as the config.yaml of a run's folder")
    if not file.is_file():
        raise ValueError(f"config {file}: no such file")
    try:
        with file.open("rb") as stream:  # of any size
            read = parse_yaml(str(stream.read(4 * MAX_LENGTH + 1), "utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"config {file}: not text: {error}") from None
    except ValueError as error:
        raise ValueError(f"config {file}: {printable(str(error))}") from None
    if not isinstance(read, dict):
        raise ValueError(f"config {file}: a run is a mapping of sections (backbone, adapter, data, train, ...)")
    return read


def parse_override(text: str) -> dict:
    """The fields that an override sets, as nested dictionaries."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ValueError(f"override {shorten(text)}: expected section.field=value, such as train.learning_rate=3e-3")
    try:
        found = value.replace("\\n", "\n") if key in TEXT_FIELDS else parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {shorten(text)}: not YAML: {printable(str(error))}") from None
    for name in reversed(key.split(".")):
        found = {name: found}
    return found


def hidden(value: Any) -> Any:
    """The values with their texts written so that OmegaConf takes none of them for a reference (`${...}`, to the
    environment even) or for a missing value (???)."""
    if isinstance(value, dict):
        return {hidden(name): hidden(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = value.replace(MARK, MARK + "m").replace("${", f"${MARK}{{")
    return MARK + text if text == "???" else text


def shown(value: Any) -> Any:
    """A text as it was before `hidden`."""
    if not isinstance(value, str):
        return value
    return re.sub(f"{MARK}(m?)", lambda found: MARK if found[1] else "", value)


#: Of Unicode's private use: no text means it.
MARK = "\ue000"


def require_readable(given: Any, template, section: str = "") -> None:
    """Refuses a YAML boolean (yes, no, true ...) where a text is meant, which would become "True", and what is not a
    number in a list of numbers, which OmegaConf's error would not name."""
    for f in dataclasses.fields(template):
        value = given.get(f.name) if isinstance(given, dict) else None
        for kind, wanted in ((int, "whole numbers"), (float, "numbers")):
            if isinstance(value, list) and f.type in (tuple[kind, ...], tuple[kind, ...] | None):
                wrong = [v for v in value if not reads_as(kind, v)]
                require(not wrong, section + f.name, wrong, f"a list of {wanted}")
        if isinstance(value, list):
            wrong = [v for v in value if isinstance(v, list | dict)]
            require(not wrong, section + f.name, wrong, "texts or numbers in the list, no lists and mappings")
        if dataclasses.is_dataclass(getattr(template, f.name)):
            require_readable(value, getattr(template, f.name), f"{f.name}.")
        elif f.type is bool and isinstance(value, int | float):
            require(value in (0, 1), section + f.name, value, "true or false")
        elif f.type is not bool and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"{section}{f.name}: {shorten(value)} is a truth value in YAML; "
                'quote the text, such as \'["yes", "no"]\''
            )


def reads_as(kind: type[int] | type[float], value: Any) -> bool:
    """Whether OmegaConf takes the value for such a number."""
    if not isinstance(value, (str, int, kind)):
        return False
    try:
        kind(value)
    except ValueError:
        return False
    return True


def unfreeze(node: DictConfig) -> None:
    """Lets a merge write into the nodes of frozen dataclasses, which OmegaConf marks read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if OmegaConf.is_dict(node[key]):
            unfreeze(node[key])


def to_dataclass(node, template) -> Any:
    """The frozen dataclass with a node's values, lists as tuples; __post_init__ checks each section."""
    values = {}
    for f in dataclasses.fields(template):
        value = node[f.name]
        if isinstance(value, DictConfig):
            value = to_dataclass(value, getattr(template, f.name))
        elif OmegaConf.is_config(value):
            value = tuple(map(shown, value))
        values[f.name] = shown(value)
    return type(template)(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
