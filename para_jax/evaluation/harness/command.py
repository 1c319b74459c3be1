"""lm-eval's own command line, with the model `para` as its default. This module needs lm-eval."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ...io.yaml_text import parse_yaml
from . import completions as completions  # registers the model `para-completions`
from . import lm as lm  # registers the model `para`

#: The names by which lm-eval finds what to call a model in its results.
NAMES = {"backbone": "pretrained", "adapter": "peft"}
THEIR_NAMES = re.compile(r"(^|,)(backbone|adapter)(?==)")


def harness_command(arguments: list[str]) -> None:
    """Runs lm-eval's own command line, with the model `para` as the default. `--use_cache` becomes ParaLM's cache,
    which knows the adapter."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *with_para(arguments)]
    cli_evaluate()


def with_para(arguments: list[str]) -> list[str]:
    """The arguments of `lm-eval run` with the model `para`, unless they or a config file name another model."""
    if arguments[:1] in (["ls"], ["validate"], []) or {"-h", "--help"} & set(arguments):
        return arguments
    config = config_of(value_of(arguments, "--config", "-C"))
    if config is None or (value_of(arguments, "--model", "-M") or config.get("model", "para")) != "para":
        return arguments
    folder = value_of(arguments, "--use_cache", "-c")
    made = without(without(arguments, "--use_cache", "-c"), "--model", "-M") + ["--model", "para"]
    made = [THEIR_NAMES.sub(lambda found: found[1] + NAMES[found[2]], text) for text in made]
    made += [] if value_of(made, "--batch_size", "-b") or "batch_size" in config else ["--batch_size", "8"]
    return made + ([] if folder is None else ["--model_args", f"cache={folder}"])


def config_of(file: str | None) -> dict | None:
    """The fields of lm-eval's config file; none where there is no file, and None for one that lm-eval will refuse."""
    try:
        found = parse_yaml(Path(file).read_text()) if file else {}
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def value_of(arguments: list[str], *names: str) -> str | None:
    """The value of an option, given as `--name value` or `--name=value`."""
    for i, text in enumerate(arguments):
        name, equals, value = text.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def without(arguments: list[str], *names: str) -> list[str]:
    """The arguments without an option and its value."""
    made, skip = [], False
    for text in arguments:
        name, equals, _ = text.partition("=")
        if skip or name in names:
            skip = name in names and not equals
            continue
        made.append(text)
    return made
