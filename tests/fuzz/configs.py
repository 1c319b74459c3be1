"""Configs of runs as YAML files and overrides. No environment variable ever shows up in one."""

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import yaml

from para_jax.config import ADAPTER_CONFIGS, RunConfig, config_dict, load_config, save_config

from . import mutate
from .cases import Trial, Wrong

SECRET = "PARA_JAX_FUZZ"
EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SECTIONS = {field.name: field for field in dataclasses.fields(RunConfig)}
#: Values as YAML writes them: references to the environment in every spelling, tags, anchors, nesting, odd scalars.
SNIPPETS = (
    "${oc.env:PARA_JAX_FUZZ}", "'${oc.env:PARA_JAX_FUZZ}'", '"\\u0024{oc.env:PARA_JAX_FUZZ}"',
    '"\\x24{oc.env:PARA_JAX_FUZZ}"', '"\\U00000024{oc.env:PARA_JAX_FUZZ}"', '"$\\\n          {oc.env:PARA_JAX_FUZZ}"',
    '"a\\u0024\\x7boc.env:PARA_JAX_FUZZ}"', '["\\x24{oc.env:PARA_JAX_FUZZ}"]', '{a: "\\x24{oc.env:PARA_JAX_FUZZ}"}',
    '"\\x24{oc.decode:\\x24{oc.env:PARA_JAX_FUZZ}}"', '"\\x24{seed}"', "${seed}", '"\\x24{.data}"', '"\\x24{a"',
    "$${a}",
    "!!python/object/apply:os.getenv [PARA_JAX_FUZZ]", "!!binary aGk=", "!!set {a, b}", "!!float 1", "!x y",
    "&a [*a]", "*nowhere", "&b {a: *b}", "[" * 80 + "]" * 80, "[" * 300 + "]" * 300, "{a: " * 200 + "1" + "}" * 200,
    "[" * 5000,
    "0o17", "010", "0x1F", "0b11", "1_000", "1:30", "1e3", "1e-3", "-1", "1e999", "9" * 5000, ".inf", "-.inf",
    ".nan", "~", "null", "yes", "no", "on", "true", "'true'", "=", "2001-01-01", "2001-01-01 10:00:00", "|\n  a\n  b",
    "a: b", "- a", "[a, b]", "{a: b}", "", "''", '"\\0"', '"\\e]0;owned\\a"', '"\\ud83d"', "\ufeff", "\t", "a" * 6000,
    "[1]", "[[1]]", "[1.5]", "['1']", "[yes]", "[null]", "3", "3.0", "0.5", "0", "100000000000000000000", "---", "%a",
)  # fmt: skip


def config(draw: random.Random, folder: Path) -> Trial:
    """load_config gives what the YAML says, or an error that names the file, the field or the override."""
    file = folder / "run.yaml"
    file.write_bytes(yaml_text(draw))
    overrides = [override(draw) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
    without = draw.random() < 0.2
    if not without and draw.random() < 0.03:
        mutate.file(draw, file)
    names = ("run.yaml", "override", *field_names())
    run = lambda: load_config(None if without else file, overrides)  # noqa: E731
    return Trial(run, names, lambda found: check(found, None if without else file, overrides, folder))


def field_names() -> tuple[str, ...]:
    """One of these stands in the error of a config."""
    return ("config", *SECTIONS, *adapter_fields(), *section_fields())


def section_fields() -> tuple[str, ...]:
    return tuple(
        name
        for section in SECTIONS.values()
        if dataclasses.is_dataclass(section.type)
        for name in (f"{section.name}.{field.name}" for field in dataclasses.fields(section.type))
    )


def adapter_fields() -> tuple[str, ...]:
    return tuple(field.name for kind in ADAPTER_CONFIGS.values() for field in dataclasses.fields(kind))


def any_field(draw: random.Random) -> str:
    """A dotted name that a config has, or nearly has."""
    adapter = [f"adapter.{name}" for name in (*adapter_fields(), "method")]
    name = draw.choice([*section_fields(), *adapter, *SECTIONS, "data.prompt", "data.completion"])
    strange = (name + "x", name.upper(), name + ".a", "." + name, name + ".", name.replace(".", "["), "", name + "[0]")
    return draw.choice(strange) if draw.random() < 0.1 else name


def yaml_text(draw: random.Random) -> bytes:
    text = draw.choice(EXAMPLES).read_text()
    change = draw.random()
    if change < 0.25:
        made = mutate.tree(draw, yaml.safe_load(text), tuple(name.split(".")[-1] for name in section_fields()))
        return yaml.safe_dump(made, allow_unicode=draw.random() < 0.5).encode(errors="surrogatepass")
    if change < 0.7:  # one value is a snippet
        made = yaml.safe_load(text)
        name = any_field(draw).split(".")
        node = made
        for part in name[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[name[-1]] = "SNIPPET"
        return yaml.safe_dump(made, sort_keys=False).replace("SNIPPET", draw.choice(SNIPPETS)).encode()
    if change < 0.85:
        lines = text.splitlines()
        for _ in range(draw.choice((1, 2))):
            at = draw.randrange(len(lines))
            other = draw.choice(
                (draw.choice(lines), draw.choice(SNIPPETS), " " + lines[at], "x: &x 1", "<<: *x", "---")
            )
            lines[at:at] = [other]
        return "\n".join(lines).encode()
    return mutate.data(draw, text.encode())


def override(draw: random.Random) -> str:
    if draw.random() < 0.1:
        return draw.choice(
            ("", "=", "a", "a=", "=a", "train", "data=[1]", "data.train", "[0]=1", "a b=c", "\0=\0", "a.b.c=1")
        )
    if draw.random() < 0.2:
        return draw.choice(("train.learning_rate=3e-3", "adapter.method=lora", "adapter.method=ia3", "seed=7"))
    return f"{any_field(draw)}={draw.choice((*SNIPPETS, *mutate.TEXTS))}"


# -------------------------------------------------------------------------------------------------------------- oracle


def check(found: RunConfig, file: Path | None, overrides: list[str], folder: Path) -> None:
    if os.environ[SECRET] in repr(found):
        raise Wrong("an environment variable's value stands in the config")
    try:
        wanted = {} if file is None else yaml.safe_load(file.read_bytes()) or {}
        changes = [(key, value_of(key, value)) for key, _, value in (text.partition("=") for text in overrides)]
    except (yaml.YAMLError, RecursionError, ValueError):
        changes = None  # another reader's limits; the secret was looked for, and the round trip is still checked
    if changes is not None and not any("[" in key for key, _ in changes):
        require_same(found, wanted, changes)
    saved = folder / "saved.yaml"
    save_config(found, saved)
    if load_config(saved) != found and "nan" not in repr(found):
        raise Wrong("saved and read again it is another config")


def value_of(key: str, text: str) -> Any:
    """What plain YAML says of an override's value; prompts and completions are literal text."""
    return text.replace("\\n", "\n") if key in ("data.prompt", "data.completion") else yaml.safe_load(text)


def require_same(found: RunConfig, wanted: dict, changes: list[tuple[str, Any]]) -> None:
    held = config_dict(found)
    leaves = dict(leaves_of(wanted))
    if any(key == "adapter.method" for key, _ in changes):
        leaves = {name: value for name, value in leaves.items() if not name.startswith("adapter.")}
    for key, value in changes:
        leaves = {name: old for name, old in leaves.items() if name != key and not name.startswith(key + ".")}
        leaves |= dict(leaves_of(value, key))
    for name, value in leaves.items():
        node: Any = held
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                raise Wrong(f"accepted {name}, which no config has")
            node = node[part]
        if isinstance(node, dict) and value in (None, {}, "", []):
            continue  # an empty section
        if name == "train.learning_rate" and value is None:
            continue  # the method's own rate
        if not same(node, value, name):
            raise Wrong(f"{name} is {str(node)[:80]!r}, the YAML says {str(value)[:80]!r}")


def leaves_of(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(name, tree)] if name else []
    return [leaf for key, part in tree.items() for leaf in leaves_of(part, f"{name}.{key}" if name else str(key))]


def same(node: Any, value: Any, name: str) -> bool:
    """Whether a field holds what YAML says, as a field of its type takes it."""
    if isinstance(node, list):
        if name.endswith(("target_modules", "feedforward_modules")):
            return set(node) <= set(map(str, value))
        return isinstance(value, list) and len(node) == len(value) and all(map(same, node, value, [name] * len(node)))
    if isinstance(node, bool) or node is None or value is None:
        return node == value or (isinstance(node, bool) and str(value).lower() in TRUTHS[node])
    if str(node) == str(value) or (name == "output_dir" and str(value).startswith("~")):
        return True
    if isinstance(node, str) and isinstance(value, int | float):
        read = yaml.safe_load(node)  # a text keeps how the number was written, such as 010
        return read == value or str(read) == str(value)
    try:
        if isinstance(node, int) and isinstance(value, str):
            return node == int(value, 0)  # YAML 1.2 reads 0o17 as 15, and so do we; PyYAML takes it for a text
        return float(node) == float(value) or node != node
    except (ValueError, TypeError, OverflowError):
        return False


TRUTHS = {True: ("true", "yes", "y", "on", "1"), False: ("false", "no", "n", "off", "0")}
