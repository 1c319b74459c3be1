"""lm-eval's own command line, with the model `para` as its default. This module needs lm-eval."""

from __future__ import annotations

import subprocess
import sys

import lm_eval.evaluator

from . import completions as completions  # registers the model `para-completions`
from . import lm as lm  # registers the model `para`


def harness_command(arguments: list[str]) -> None:
    """Runs lm-eval's own command line, with the model `para` as the default. `--use_cache` becomes ParaLM's cache,
    which knows the adapter."""
    from lm_eval.__main__ import cli_evaluate

    setattr(lm_eval.evaluator, "get_git_commit_hash", commit_here)  # noqa: B010 (its own prints git's "fatal: ...")
    sys.argv = ["lm-eval", *with_para(arguments)]
    cli_evaluate()


def commit_here() -> str | None:
    """The commit of the repository that this process runs in, for lm-eval's results; None outside of one."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def with_para(arguments: list[str]) -> list[str]:
    """The arguments of `lm-eval run` with the model `para`, unless they name another model or a config file."""
    if arguments[:1] in (["ls"], ["validate"], []) or {"-h", "--help"} & set(arguments):
        return arguments
    if value_of(arguments, "--config", "-C") or value_of(arguments, "--model", "-M") not in (None, "para"):
        return arguments
    folder = value_of(arguments, "--use_cache", "-c")
    made = without(without(arguments, "--use_cache", "-c"), "--model", "-M") + ["--model", "para"]
    made += [] if value_of(made, "--batch_size", "-b") else ["--batch_size", "8"]
    return made + ([] if folder is None else ["--model_args", f"cache={folder}"])


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
