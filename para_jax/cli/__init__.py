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
import select
import shlex
import signal
import sys
import traceback

from .. import __version__
from ..config import RunConfig, dotted_fields, meant_field
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

#: What the commands of vLLM, lm-eval and others call our options.
OTHER_NAMES = {
    "--adapters": "enable-lora lora-modules lora-path lora peft",
    "--backbone": "model model-path model-name-or-path base-model pretrained",
    "--max-length": "max-model-len max-seq-len max-seq-length",
    "--quantize": "quantization load-in-8bit",
    "--rows": "batch-size",
    "--slots": "max-num-seqs batch-size",
}


def program() -> int:
    """Runs `main` and returns its exit code. If `main` raises, prints the traceback and returns 70: with Python's own
    exit code, 1, a job that broke off would look like one that answered every line. After Ctrl-C, another one ends the
    process at once, without a traceback of what runs at its end."""
    try:
        code = main()
    except KeyboardInterrupt:  # while the first Ctrl-C was handled
        code = 130
    except Exception:
        traceback.print_exc()
        return 70
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0; 1 if the quickstart fell short, a tenant's loss was not finite, or
    some lines of a job were answered with errors; 2 for a user's mistake or too little memory; 130 for Ctrl-C; 141 if
    the reader of the output has closed it, as `head` does. Raises the error of a defect or of a device that failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:  # after --help too
            flush_output()
    except BrokenPipeError:
        discard_output()
        return 141


def flush_output() -> None:
    """Writes what is left of the output. Ends with exit code 2 if it can't be written, such as into a file on a full
    disk."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        print(f"para-jax: error: the output can't be written: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def discard_output() -> None:
    """Drops what is left of the output, which Python would try to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    options.command_line = shlex.join(["para-jax", *arguments])
    log_to_stderr()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("PARA_JAX_TRACEBACK") or (isinstance(error, BrokenPipeError) and output_is_closed()):
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


def output_is_closed() -> bool:
    """Whether the reader of standard output has closed it. If not, a broken pipe error is about another pipe."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


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
    require_config(options, arguments)
    return options


def require_config(options: argparse.Namespace, arguments: list[str]) -> None:
    """Ends with an error if CONFIG was forgotten, so that a FIELD=VALUE is in its place."""
    given = str(getattr(options, "config", None) or getattr(options, "target", None))
    root, equals, _ = given.partition("=")
    is_field = bool(equals) and root.partition(".")[0] in dotted_fields(RunConfig()) and not os.path.exists(given)
    if is_field and not getattr(options, "backbone", None):  # it replaces CONFIG
        data = ["--data"] * (options.command == "inspect" and not options.data)
        line = shlex.join(["para-jax", options.command, "own-data", *arguments[1:], *data])
        subparsers(parser())[options.command].error(f"CONFIG is missing: {line}")


def raise_unknown(command: str, text: str) -> None:
    """Ends with an error for an argument that the command lacks, and names the option or field that was meant."""
    name = text.partition("=")[0]
    own = subparsers(parser())[command]
    options = [option for one in own._actions if one.help != argparse.SUPPRESS for option in one.option_strings]
    plain = name.replace("_", "-")
    near = [option for option, names in OTHER_NAMES.items() if option in options and plain.lstrip("-") in names.split()]
    near += difflib.get_close_matches(plain, options, n=1, cutoff=0.7)
    near += ["CONFIG alone"] if name == "--config" and any(action.dest == "config" for action in own._actions) else []
    advice = f"; did you mean {near[0]}?" if near else ""
    if not near and any(action.dest == "overrides" for action in own._actions):
        field = name.lstrip("-").replace("-", "_")
        section, dot, last = field.rpartition(".")
        root, known = RunConfig(), dotted_fields(RunConfig())
        template = getattr(root, section) if section in known and "." not in section else root
        meant = field if field in known else meant_field(section + dot, last, template, root)
        advice = f"; fields are given as {meant}=VALUE" if meant in known else ""
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
