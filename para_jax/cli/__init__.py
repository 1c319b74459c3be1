"""para-jax: the command line. A user's mistake gives exit code 2 and one or two lines (what is wrong, what to do), then
perhaps a list, but no traceback.

Each command is a file with `add`, which adds its parser, and `run`. A command imports its modules when it runs, so that
--help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shlex
import sys
import traceback

from .. import __version__
from ..io.checks import printable, shorten
from ..io.messages import log_to_stderr
from . import (
    bench,
    convert,
    evaluate,
    export,
    generate,
    inspect,
    lm_eval,
    merge,
    plot,
    prepare,
    quickstart,
    serve,
    train,
)
from .options import Parser
from .out_of_memory import out_of_memory

COMMANDS = (
    quickstart, train, evaluate, lm_eval, generate, serve, merge, inspect, export, convert, prepare, plot, bench
)  # fmt: skip
LONGEST_ERROR = 1900  # characters of each line of an error
LONGEST_LIST = 16  # lines of an error after the first two; they are indented


def program() -> int:
    """Runs `main` and returns its exit code. If `main` raises, prints the traceback and returns 70: with Python's own
    exit code, 1, a job that broke off would look like one that answered every line."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        return 70


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0; 1 if the quickstart fell short, a tenant's loss was not finite, or
    some lines of a job were answered with errors; 2 for a user's mistake or too little memory; 130 for Ctrl-C; 141 if
    the reader of the output has closed it, as `head` does. Raises the error of a defect or of a device that failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python writes the rest at exit
        return 141


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    options.command_line = shlex.join(["para-jax", *arguments])
    log_to_stderr()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return options.run(options) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("PARA_JAX_TRACEBACK"):
            raise
        return failed(str(error).strip() or type(error).__name__)
    except (RuntimeError, MemoryError) as error:
        said = out_of_memory(error, getattr(options, "command", None))
        if said is None or os.environ.get("PARA_JAX_TRACEBACK"):
            raise
        return failed(said)
    except KeyboardInterrupt:
        print("para-jax: interrupted", file=sys.stderr)
        return 130


def failed(message: str) -> int:
    """Prints an error, and returns its exit code."""
    lines = message.splitlines()
    shown = [*lines[:2], *[line for line in lines[2:] if line.startswith("  ")][:LONGEST_LIST]]
    print("para-jax: error: " + "\n".join(printable(line, LONGEST_ERROR) for line in shown), file=sys.stderr)
    return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command. Overrides may come before and after flags, which argparse alone does not allow."""
    if arguments[:1] == ["lm-eval"]:  # lm-eval parses its own arguments
        return argparse.Namespace(run=lm_eval.run, arguments=arguments[1:])
    options, rest = parser().parse_known_args(arguments)
    for text in rest:
        if text.startswith("-") or not hasattr(options, "overrides"):
            raise_unknown(options.command, text)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def raise_unknown(command: str, text: str) -> None:
    """Ends with an error for an argument that the command lacks, and names the option that was meant."""
    own = subparsers(parser())[command]
    options = [option for one in own._actions if one.help != argparse.SUPPRESS for option in one.option_strings]
    text = text.partition("=")[0]  # what follows may be a key
    near = difflib.get_close_matches(text.replace("_", "-"), options, n=1, cutoff=0.7)
    advice = f"; did you mean {near[0]}?" if near else ""
    if not near and any(action.dest == "overrides" for action in own._actions):
        advice = "; fields of the config are given as train.max_steps=VALUE, without dashes"
    own.error(f"unknown argument {shorten(text)}{advice}")


def subparsers(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands' parsers by name."""
    return next(dict(action.choices or {}) for action in top._actions if action.dest == "command")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="para-jax",
        description="Fine-tune and serve one frozen language model for many tenants with PARA.",
        epilog="Each command has its own help, such as para-jax train --help.",
    )
    top.add_argument("--version", action="version", version=f"para-jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return top
