"""Parts of the commands' parsers: one-line errors, types of arguments, and the options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Annotated, Any, Literal, get_args, get_origin

from ..config import BackboneSection, RuntimeSection, template_variables
from ..config.bounds import Bounds, PositiveFloat, PositiveInt, check_value, field_types, without_none
from ..config.fields import typed_value
from ..io.checks import expanded, near_name, printable
from ..io.hub import BUILT_IN, backbone_of
from ..io.messages import say
from ..io.shards import parse_shard

#: Defaults of --slots and, for models with as many positions, of --max-length.
SLOTS, MAX_LENGTH = 8, 1024


class Parser(argparse.ArgumentParser):
    """argparse, with errors of two lines: what is wrong, and what to do. An option is never abbreviated: --api-key,
    which others on the machine can read, is not --api-key-file."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        if (wrong := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)) is not None:
            message += near_name(wrong[1], re.findall(r"[a-z-]+", wrong[2]))
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


# ------------------------------------------------------------------------------------------------------------ arguments


def value_of(kind: Any) -> Callable[[str], Any]:
    """The `type` of an argument: reads its text as the type of a config's field (config/bounds.py), or by a function.
    An empty text, such as an unset "$VARIABLE" of a shell, is an error."""

    def read(text: str) -> Any:
        if not text:
            raise argparse.ArgumentTypeError("the text is empty; give a value, or leave the option out")
        try:
            if isinstance(kind, FunctionType):
                return kind(text)
            value = typed_value("the value", text, kind)
            check_value("the value", value, kind)
            return value
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def checked_variables(text: str) -> str:
    template_variables("the object", text)
    return text


#: Types of arguments. A shell leaves the ~ of --output=~/file to us.
filled, place = value_of(str), value_of(expanded)


def option(group, flag: str, text: str, kind: Any = str, default: Any = None, **more: Any) -> None:
    """Adds an option that takes a value. The help ends with its default, if it has one.

    Args:
        kind: as of `value_of`.
    """
    if get_origin(kind) is Literal:
        more |= {"choices": get_args(kind)}
    elif kind is not str:
        more.setdefault("metavar", "N")
    text += "" if default is None else " (default: %(default)s)"
    group.add_argument(flag, type=value_of(kind), default=default, help=text, **more)


def repeated(group, flag: str, text: str, metavar: str, **more: Any) -> None:
    """Adds an option that may be given several times, or with nargs="+" takes several values."""
    more = {"action": "append"} | more if "nargs" not in more else {"type": filled} | more
    group.add_argument(flag, default=[], metavar=metavar, help=text, **more)


def add_fields(group, options: type, *names: str) -> None:
    """Options for these fields of a dataclass, with the metadata that the fields have for argparse."""
    for one in dataclasses.fields(options):
        if one.name in names:
            flag, kind = f"--{one.name.replace('_', '-')}", field_types(options)[one.name]
            if kind is bool:
                group.add_argument(flag, action="store_true", **one.metadata)
            else:
                text, more = one.metadata["help"], {k: v for k, v in one.metadata.items() if k != "help"}
                option(group, flag, text, without_none(kind)[0], one.default, **more)


def add_overrides(parser) -> None:
    """The fields of a config."""
    text = "fields of the config, such as train.learning_rate=3e-3 or 'data.prompt={question}\\n' (text is literal)"
    parser.add_argument("overrides", nargs="*", default=[], metavar="FIELD=VALUE", help=text)


def add_results(group) -> None:
    option(group, "--results", "write config, device and scores to this JSON file", expanded, metavar="FILE")


def add_shard(group, what: str) -> None:
    text = f"answer {what}. I is from 0 to N - 1, as JOB_COMPLETION_INDEX is, and SLURM_ARRAY_TASK_ID with "
    text += "--array=0-(N-1). Each shard needs an --output of its own; `para-jax merge` joins them"
    option(group, "--shard", text, parse_shard, metavar="I/N")


def add_chat_template_kwargs(group) -> None:
    text = "variables of the chat template, such as '{\"enable_thinking\": false}'; give the same as in training "
    text += "(data.chat_template_kwargs)"
    option(group, "--chat-template-kwargs", text, checked_variables, metavar="JSON")


def add_engine_size(group) -> None:
    """The options --slots, --max-length, --kv-cache-gb and --max-prefill-tokens."""
    option(group, "--slots", "rows that decode together", PositiveInt, SLOTS)
    text = f"tokens per row, prompt and answer (default: {MAX_LENGTH}, or the model's positions if it has fewer)"
    option(group, "--max-length", text, Annotated[int, Bounds(at_least=2)])
    text = "memory for keys and values on each device, shared by the rows as they grow (default: enough for all slots "
    text += "at their longest, but at most a quarter of a CPU's memory, or 0.9 of what is free on another device)"
    option(group, "--kv-cache-gb", text, PositiveFloat, metavar="GB")
    add_prefill_tokens(group)


def add_prefill_tokens(group) -> None:
    text = "tokens of new prompts that are computed between steps of answers: more fill empty slots sooner, fewer "
    text += "keep the gaps in answers short (default: 1024 on a CPU, else 4096)"
    option(group, "--max-prefill-tokens", text, PositiveInt)


def bytes_of(gb: float | None) -> int | None:
    return None if gb is None else int(gb * 1e9)


def engine_length(options, model_config) -> int:
    """The tokens of a row: --max-length or its default."""
    return options.max_length or min(MAX_LENGTH, model_config.max_positions)


def add_tenants(group) -> None:
    """The options --adapters and --adapters-from, where each adapter is a tenant with a name."""
    text = "the tenants: adapter folders or hub ids, each with a name (default: the run's or folder's own name); the "
    text += "folder of a run of many tenants, for all of them; or a pattern in quotes, such as 'runs/*/adapter'"
    repeated(group, "--adapters", text, "NAME=DIR", nargs="+")
    add_adapters_from(group)


def add_adapters_from(group) -> None:
    """The option for more adapters than fit a command line."""
    text = "a file with more adapters: DIR or NAME=DIR on each line, relative to where the command runs"
    option(group, "--adapters-from", text, expanded, metavar="FILE")


def add_adapter_memory(group, when_more: str) -> None:
    """The option for more adapters than fit the memory."""
    text = f"host memory for adapters. If they need more, {when_more}"
    option(group, "--adapter-memory", text, PositiveFloat, 8.0, metavar="GB")


def add_chat(parser) -> None:
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message before it; implies --chat")


def prompt_of(options, text: str) -> str | list[dict]:
    """The prompt of an argument, in which \\n is a newline: with --chat or --system, the chat that these make of it."""
    text = with_newlines(text)
    if options.system is None:
        return [{"role": "user", "content": text}] if options.chat else text
    return [{"role": "system", "content": with_newlines(options.system)}, {"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------------ shared options
# Each function returns a parser for `parents`.


def backbone(default: str | None = None) -> argparse.ArgumentParser:
    """--backbone. A command without a default gives it to `chosen_backbone`, with its adapters."""
    shared = Parser(add_help=False)
    text = "a folder, a hub id, a .gguf file, or smollm2-135m"
    text += "" if default else "; with adapters: what the first of them names (default: smollm2-135m)"
    option(shared.add_argument_group("backbone"), "--backbone", text, default=default, metavar="SOURCE")
    return shared


def dtype() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    text = "the type of weights and computation (default: float32 on a CPU, else bfloat16)"
    option(shared.add_argument_group("backbone"), "--dtype", text, Literal["float32", "bfloat16"])
    return shared


def precision() -> argparse.ArgumentParser:
    shared = Parser(add_help=False, parents=[dtype()])
    group = shared.add_argument_group("backbone")
    option(group, "--quantize", "store linear layers in 8 bits (default: no)", Literal["int8"])
    option(group, "--attention", "the attention kernel (default: auto)", field_types(BackboneSection)["attention"])
    text = "split weights and caches by heads over N devices of this host"
    option(group, "--tensor-parallel-size", text, PositiveInt, 1)
    return shared


def runtime() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    group = shared.add_argument_group("runtime")
    group.add_argument("--allow-cpu", action="store_true", help="run on the CPU even if the machine has an accelerator")
    group.add_argument("--no-compilation-cache", action="store_true", help="compile everything again")
    return shared


def sampling() -> argparse.ArgumentParser:
    """The options of a Sampling, which checks their values."""
    shared = Parser(add_help=False)
    group = shared.add_argument_group("sampling")
    option(group, "--max-new-tokens", "tokens per answer", int, 64)
    option(group, "--temperature", "0 is greedy", float, 0.0, metavar="T")
    option(group, "--top-k", "draw from the K likeliest tokens; 0: all", int, 0, metavar="K")
    option(group, "--top-p", "draw from the likeliest tokens that together have probability P", float, 1.0, metavar="P")
    text = "prompt i is drawn with SEED + i; a line of --input without a seed derives its own from SEED and the line's "
    option(group, "--seed", text + "number", int, 0, metavar="SEED")
    repeated(group, "--stop", "text that ends an answer; may be repeated", "TEXT")
    option(group, "--num-beams", "beams of a beam search; 1: none", int, 1, metavar="K")
    text = "a beam's score is the sum of its log-probabilities / length**P; above 0 favors long answers"
    option(group, "--length-penalty", text, float, 1.0, metavar="P")
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

    size = options.tensor_parallel_size
    if size == 1:
        return load_backbone(**backbone)
    mesh = make_mesh(tensor=size, devices=jax.local_devices()[:size])
    model = load_backbone(**backbone, mesh=mesh)
    for line in replicated_lines(model, mesh, model.config):
        say(line)
    return model


def chosen_backbone(given: str | None, adapters: Iterable[Any]) -> str:
    """The backbone of a command: --backbone, else what the first adapter names, else the built-in one. Fetches that
    adapter if it is elsewhere."""
    first = next(iter(adapters), None)
    if given or first is None:
        return given or BUILT_IN
    named = backbone_of(first) or BUILT_IN
    if named != BUILT_IN:
        say(f"backbone: {printable(named)}, which {first} names")
    return named


def bank_within_memory(options, found: dict, model_config, load: Callable[[str], Any]):
    """The bank of --adapters; None if there are none. Those that --adapter-memory has no room for are loaded when they
    are needed.

    Args:
        found: the previews of the adapters by name.
        load: gives the adapter of a name.
    """
    from ..adapters.loading_bank import bank_of

    if not found:
        return None
    bank = bank_of(found, model_config, load, int(options.adapter_memory * 1e9))
    say(str(bank))
    return bank


def write_results(options, config, scores: dict, seconds: float) -> None:
    """Writes the JSON file of --results. Call it before the command prints anything: a closed output can't lose
    the scores."""
    from ..io.record_file import write_record
    from ..reports.inspect import results

    write_record(options.results, results(options.command_line, config, scores, seconds))
    say(f"wrote {options.results}")


def with_newlines(text: str) -> str:
    r"""The text of an argument, in which \n is a newline."""
    return text.replace("\\n", "\n")
