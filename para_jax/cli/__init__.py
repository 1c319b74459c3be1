"""para-jax: the command line. A user's mistake gives one or two lines and exit code 2, never a traceback.

Each command is a file with `add`, which adds its parser, and `run`. Modules are imported when their command runs, so
that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import select
import shlex
import sys

from ..config import printable, shorten
from . import bench, convert, evaluate, generate, inspect, lm_eval, plot, prepare, quickstart, train
from .options import Parser

COMMANDS = (quickstart, train, evaluate, lm_eval, generate, inspect, convert, prepare, plot, bench)
LONGEST_ERROR = 1900  # characters of each of the two lines of an error


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Its exit code: 0; 1 if the quickstart fell short, a tenant's loss was not finite, or some lines
    of a job were answered with errors; 2 for a user's mistake; 130 for Ctrl-C; 141 if the reader of the output has
    closed it, as `head` does."""
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:  # of --help too
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left of it goes at the exit
        return 141


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    options.command_line = shlex.join(["para-jax", *arguments])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("PARA_JAX_TRACEBACK") or (isinstance(error, BrokenPipeError) and output_is_closed()):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print("para-jax: error: " + "\n".join(printable(line, LONGEST_ERROR) for line in lines[:2]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("para-jax: interrupted", file=sys.stderr)
        return 130


def output_is_closed() -> bool:
    """Whether it is standard output, and no other pipe, that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return bool(asked.poll(0))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; overrides may stand before and after flags, which argparse by itself does not take."""
    if arguments[:1] == ["lm-eval"]:  # whose arguments are lm-eval's to read
        return argparse.Namespace(run=lm_eval.run, arguments=arguments[1:])
    options, rest = parser().parse_known_args(arguments)
    overrides = [text for text in rest if hasattr(options, "overrides") and not text.startswith("-")]
    if len(overrides) < len(rest):
        parser().error(f"unknown argument {shorten(next(text for text in rest if text not in overrides))}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def installed_version() -> str:
    try:
        return importlib.metadata.version("para_jax")
    except importlib.metadata.PackageNotFoundError:
        return "of a source folder that is not installed"


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="para-jax", description="Fine-tune and serve one frozen language model for many tenants with PARA."
    )
    top.add_argument("--version", action="version", version=f"para-jax {installed_version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return top
