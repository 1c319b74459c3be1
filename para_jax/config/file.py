"""A run's YAML file: `load_config` reads one, with overrides, and `save_config` writes one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..io import atomic
from ..io.checks import expanded, near_name, nearest, printable, require_one_of, shorten
from ..io.yaml_text import dump_yaml, parse_yaml
from .adapter import ADAPTER_CONFIGS
from .fields import typed_fields
from .run import RunConfig, TrainSection

#: Fields whose overrides are taken literally, not as YAML, which would read "{output}" as a mapping. \n is a newline.
TEXT_FIELDS = ("data.prompt", "data.completion")


def load_config(file: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A RunConfig from a YAML file, or from a shipped config by its name, such as own-data (None: the defaults), and
    overrides such as "train.learning_rate=3e-3". An override that changes adapter.method drops the adapter fields of
    the file, except scope and scope_window. A train.learning_rate of the file stays. An override of train.num_epochs
    drops the file's train.max_steps, which would win over it, and the other way round.

    Raises ValueError, naming the field and the nearest known one, for an unknown key, a wrong type or a bad value.

    >>> config = load_config("own-data", ["data.train=data/mine", "train.num_epochs=1"])
    >>> config.adapter.r
    12
    """
    in_file = {} if file is None else read_yaml(config_file(file))
    changes: dict[str, Any] = {}
    for text in overrides:
        changes = merged(changes, parse_override(text))
    train = changes.get("train")
    if isinstance(train, dict) and "num_epochs" in train:
        changes["train"] = {"max_steps": None} | train  # it would win over the override
    elif isinstance(train, dict) and train.get("max_steps") is not None:
        changes["train"] = {"num_epochs": TrainSection.num_epochs} | train
    # The file alone first, so that an error says whether the file has it or an override.
    try:
        config = run_config(in_file, {})
    except ValueError as error:
        raise ValueError(f"config {file}: {error}") from None
    return run_config(in_file, changes) if changes else config


def run_config(in_file: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    """The config of these fields of a file, and of changes that win over them."""
    file_method = named_method(in_file, "para")
    method = named_method(changes, file_method)
    require_one_of(ADAPTER_CONFIGS, "adapter.method", method)
    if method != file_method:
        kept = () if "scope" in changes["adapter"] else ("scope", "scope_window")
        adapter = {name: value for name, value in in_file.get("adapter", {}).items() if name in kept}
        in_file = in_file | {"adapter": adapter}
    template = RunConfig(adapter=ADAPTER_CONFIGS[method]())
    unset = {"train": {"learning_rate": None}}  # the template has its method's
    values = merged(unset, typed_fields(without_method(in_file), template))
    return replaced(template, merged(values, typed_fields(without_method(changes), template)))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The fields of both. Where both have a field, `above` wins; sections are merged."""
    sections = {name for name in below.keys() & above.keys() if isinstance(below[name], dict)}
    joined = {name: merged(below[name], above[name]) for name in sections if isinstance(above[name], dict)}
    return below | above | joined


def named_method(run: dict[str, Any], default: Any) -> Any:
    """The value of adapter.method in a mapping of sections."""
    adapter = run.get("adapter")
    return adapter.get("method", default) if isinstance(adapter, dict) else default


def without_method(run: dict[str, Any]) -> dict[str, Any]:
    """The sections without adapter.method, which is no field of an adapter's config."""
    if not isinstance(run.get("adapter"), dict):
        return run
    return run | {"adapter": {name: value for name, value in run["adapter"].items() if name != "method"}}


def replaced(config: Any, values: dict[str, Any]) -> Any:
    """The dataclass with these values replaced, in its sections too. Each __post_init__ checks its fields."""
    changes = {}
    for name, value in values.items():
        try:
            section = dataclasses.is_dataclass(getattr(config, name))
            changes[name] = replaced(getattr(config, name), value) if section else value
        except ValueError as error:  # an adapter's config does not know that it is in a section
            raise ValueError(f"adapter.{error}" if name == "adapter" else str(error)) from None
    return dataclasses.replace(config, **changes)


def save_config(config: RunConfig, file: str | Path) -> None:
    """Writes a config as YAML that `load_config` reads back to an equal one. A kill leaves the old file or the new."""
    atomic.write_text(expanded(file), dump_yaml(config_dict(config)))


def config_dict(config: RunConfig) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, with `adapter.method`."""
    without_rows = dataclasses.replace(config, data=dataclasses.replace(config.data, given=None))
    plain = lists_for_tuples(dataclasses.asdict(without_rows))
    del plain["data"]["given"]
    return plain | {"adapter": {"method": adapter_method(config.adapter)} | plain["adapter"]}


def lists_for_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: lists_for_tuples(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def adapter_method(config: Any) -> str:
    """The method of an adapter's config, as in ADAPTER_CONFIGS."""
    return next(name for name, kind in ADAPTER_CONFIGS.items() if kind is type(config))


def shipped_configs() -> dict[str, Path]:
    """The configs that come with para_jax, by name. They are in the installed package, and in a checkout next to it."""
    package = Path(__file__).parents[1]
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def config_file(file: str | Path) -> Path:
    """The path of a config. A file in the working directory comes before a shipped config of the same name."""
    path, shipped = expanded(file), shipped_configs().get(str(file))
    return shipped if shipped and not path.exists() else path


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping of sections in a YAML file. Raises ValueError, naming the file, for anything else."""
    if not file.exists():
        shipped = shipped_configs()
        others = f"; give the path of a .yaml file, or the name of a shipped config: {', '.join(shipped)}"
        advice = nearest(file) or near_name(file.stem.replace("_", "-"), shipped) or others
        raise ValueError(f"config {file}: no such file{advice}")
    try:
        read = parse_yaml(str(file.read_bytes(), "utf-8")) or {}
    except ValueError as error:
        raise ValueError(f"config {file}: {printable(str(error))}") from None
    if not isinstance(read, dict):
        raise ValueError(f"config {file} is not a mapping; write sections such as backbone, adapter, data and train")
    sections = [one.name for one in dataclasses.fields(RunConfig) if one.default_factory is not dataclasses.MISSING]
    return {name: held for name, held in read.items() if held is not None or name not in sections}  # "train:" alone


def parse_override(text: str) -> dict[str, Any]:
    """The field that an override sets, as nested dictionaries."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ValueError(
            f"override {shorten(text)}: write section.field=value without spaces around the =, such as "
            "train.learning_rate=3e-3"
        )
    try:
        inner: Any = value.replace("\\n", "\n") if key in TEXT_FIELDS else parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {shorten(text)} is not YAML: {printable(str(error))}") from None
    *sections, name = key.split(".")
    nested: dict[str, Any] = {name: inner}
    for section in reversed(sections):
        nested = {section: nested}
    return nested
