"""Parts of the commands' parsers: one-line errors, types of arguments, and the options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from pathlib import Path

from ..config import ATTENTION, RuntimeSection, template_variables
from ..io.checks import expanded, printable, shorten
from ..io.messages import say
from ..io.storage.bucket import BucketPath, Place

#: Defaults of --slots and, for models with as many positions, of --max-length.
SLOTS, MAX_LENGTH = 8, 1024


class Parser(argparse.ArgumentParser):
    """argparse, with errors of two lines: what is wrong, and what to do."""

    def error(self, message: str):
        if (wrong := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)) is not None:
            known = re.findall(r"[a-z-]+", wrong[2])
            near = [name for name in known if name.startswith(wrong[1])]
            near += difflib.get_close_matches(wrong[1], known, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
        if message.startswith("ambiguous option: --adapter could match --adapters,"):
            message = "no option --adapter here; did you mean --adapters?"
        message = re.sub(r"(--api[\w-]*)=[^\s']*", r"\1", message)  # what follows may be a key
        self.exit(2, f"{self.prog}: error: {printable(message)}\nsee {self.prog} --help\n")


def add_command(commands, name: str, text: str, example: str, parents: list | None = None) -> argparse.ArgumentParser:
    """The parser of a new command; its help ends with the example."""
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  para-jax {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents or [],
    )


def filled(text: str) -> str:
    """The text of an argument. An empty one, such as an unset "$VARIABLE" of a shell, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty; give a value, or leave the option out")
    return text


def place(text: str) -> Place:
    """The path of an argument, on this host or in a bucket. A shell leaves the ~ of --output=~/file to us."""
    try:
        return expanded(filled(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local(text: str) -> Path:
    """The path of an argument, on this host."""
    found = place(text)
    if isinstance(found, BucketPath):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket; give a path on this host")
    return found


def shard(text: str):
    """The shard of an argument I/N."""
    from ..io.shards import parse_shard

    try:
        return parse_shard(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_overrides(parser) -> None:
    """The fields of a config."""
    text = "fields of the config, such as train.learning_rate=3e-3 or 'data.prompt={question}\\n' (text is literal)"
    parser.add_argument("overrides", nargs="*", default=[], metavar="FIELD=VALUE", help=text)


def add_fields(group, options: type, *names: str) -> None:
    """Flags for these fields of a dataclass of options, with the help that the fields have: switches, and whole numbers
    unless a field names another type."""
    for one in dataclasses.fields(options):
        if one.name in names:
            made = {"action": "store_true"} if one.default is False else {"type": int, "default": one.default}
            kind = made | one.metadata
            if kind.get("type") is str:
                kind["type"] = filled
            group.add_argument(f"--{one.name.replace('_', '-')}", **kind)


def add_shard(group, what: str) -> None:
    """The option --shard."""
    group.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help=f"answer {what}. I is from 0 to N - 1, as JOB_COMPLETION_INDEX is, and SLURM_ARRAY_TASK_ID with "
        "--array=0-(N-1). Each shard needs an --output of its own; `para-jax merge` joins them",
    )


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def variables(text: str) -> str:
    """The variables of a chat template, as the JSON text of an argument."""
    try:
        template_variables("the object", filled(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


def add_chat_template_kwargs(group) -> None:
    """The option --chat-template-kwargs."""
    group.add_argument(
        "--chat-template-kwargs",
        type=variables,
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'; give the same as in training "
        "(data.chat_template_kwargs)",
    )


def add_engine_size(group) -> None:
    """The options --slots, --max-length and --max-prefill-tokens."""
    group.add_argument("--slots", type=int, default=SLOTS, help="rows that decode together (default: %(default)s)")
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens per row, prompt and answer (default: {MAX_LENGTH}, or the model's positions if it has fewer)",
    )
    add_prefill_tokens(group)


def add_prefill_tokens(group) -> None:
    """The option --max-prefill-tokens."""
    group.add_argument(
        "--max-prefill-tokens",
        type=count,
        metavar="N",
        help="tokens of new prompts that are computed between steps of answers: more fill empty slots sooner, fewer "
        "keep the gaps in answers short (default: 1024 on a CPU, else 4096)",
    )


def check_engine_size(options) -> None:
    """Raises ValueError for --slots and --max-length that no engine can have."""
    for name, value, least in (("--slots", options.slots, 1), ("--max-length", options.max_length, 2)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}\ngive a number of at least {least}")


def engine_length(options) -> int:
    """The tokens of a row: --max-length or its default. Raises ValueError for more than the backbone's positions."""
    from ..backbone.load import load_model_config

    most = load_model_config(options.backbone).max_positions
    if options.max_length is not None and options.max_length > most:
        raise ValueError(
            f"--max-length {options.max_length}: {options.backbone} has {most} positions\ngive 2 to {most}"
        )
    return options.max_length or min(MAX_LENGTH, most)


def add_tenants(group) -> None:
    """The options --adapters and --adapters-from, where each adapter is a tenant with a name."""
    group.add_argument(
        "--adapters",
        type=filled,
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="the tenants: adapter folders or hub ids, each with a name (default: the run's or folder's own name); the "
        "folder of a run of many tenants, for all of them; or a pattern in quotes, such as 'runs/*/adapter'",
    )
    add_adapters_from(group)


def add_adapters_from(group) -> None:
    """The option for more adapters than fit a command line."""
    group.add_argument(
        "--adapters-from",
        type=place,
        metavar="FILE",
        help="a file with more adapters: DIR or NAME=DIR on each line, relative to where the command runs",
    )


def add_adapter_memory(group, when_more: str) -> None:
    """The option for more adapters than fit the memory."""
    group.add_argument(
        "--adapter-memory",
        type=positive,
        default=8.0,
        metavar="GB",
        help=f"host memory for adapters. If they need more, {when_more} (default: %(default)s)",
    )


def add_chat(parser) -> None:
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it; \\n is a newline")


def require_chat(options) -> None:
    """Raises ValueError for a system message without a chat."""
    if options.system is not None and not options.chat:
        raise ValueError(f"--system {shorten(options.system)} goes with --chat\ngive that too, or leave it out")


def turns(options, text: str) -> list[dict]:
    """The chat that --chat makes of a prompt."""
    system = [] if options.system is None else [{"role": "system", "content": with_newlines(options.system)}]
    return [*system, {"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------------ shared options
# Each function returns a parser for `parents`.


def backbone(default: str | None = None) -> argparse.ArgumentParser:
    """--backbone. A command without a default gives it to `chosen_backbone`, with its adapters."""
    named = "" if default else "; with adapters: what the first of them names"
    shared = Parser(add_help=False)
    group = shared.add_argument_group("backbone")
    group.add_argument(
        "--backbone",
        type=filled,
        default=default,
        metavar="SOURCE",
        help=f"a folder, a hub id, a .gguf file, or smollm2-135m{named} (default: smollm2-135m)",
    )
    return shared


def dtype() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    group = shared.add_argument_group("backbone")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="the type of weights and computation (default: float32 on a CPU, else bfloat16)",
    )
    return shared


def precision() -> argparse.ArgumentParser:
    shared = Parser(add_help=False, parents=[dtype()])
    group = shared.add_argument_group("backbone")
    group.add_argument("--quantize", choices=("int8",), help="store linear layers in 8 bits (default: no)")
    group.add_argument("--attention", choices=ATTENTION, help="the attention kernel (default: auto)")
    group.add_argument(
        "--tensor-parallel-size",
        type=count,
        default=1,
        metavar="N",
        help="split weights and caches by heads over N devices of this host (default: %(default)s)",
    )
    return shared


def runtime() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    group = shared.add_argument_group("runtime")
    group.add_argument("--allow-cpu", action="store_true", help="run on the CPU even if the machine has an accelerator")
    group.add_argument("--no-compilation-cache", action="store_true", help="compile everything again")
    return shared


def sampling() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    group = shared.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens per answer (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: all (default: 0)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="prompt i is drawn with SEED + i; a line of --input without a seed derives its own from SEED and the "
        "line's number (default: %(default)s)",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; may be repeated"
    )
    return shared


# ---------------------------------------------------------------------------------------------- what the options mean


def start_devices(options) -> None:
    """Starts JAX as the options of `runtime` say."""
    from ..runtime import devices

    devices.start(RuntimeSection(compilation_cache=not options.no_compilation_cache, allow_cpu=options.allow_cpu))


def model_options(options) -> dict:
    """Arguments of load_backbone, from the options of `precision`."""
    return {"dtype": options.dtype, "quantize": options.quantize, "attention": options.attention or "auto"}


def load_model(options, **backbone):
    """The backbone of these arguments of load_backbone, over the devices that --tensor-parallel-size asks for."""
    import jax

    from ..backbone.load import load_backbone
    from ..runtime.sharding import make_mesh, replicated_lines

    size, devices = options.tensor_parallel_size, jax.local_device_count()
    if size == 1:
        return load_backbone(**backbone)
    if size > devices:
        there = f"{devices} device{'' if devices == 1 else 's'}"
        raise ValueError(f"--tensor-parallel-size {size}: this host has {there}\ngive at most {devices}")
    mesh = make_mesh(tensor=size, devices=jax.local_devices()[:size])
    model = load_backbone(**backbone, mesh=mesh)
    for line in replicated_lines(model, mesh, model.config):
        say(line)
    return model


def with_newlines(text: str) -> str:
    r"""The text of an argument, in which \n is a newline."""
    return text.replace("\\n", "\n")
