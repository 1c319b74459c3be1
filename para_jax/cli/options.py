"""Parts of the commands' parsers: one-line errors, types of arguments, and the options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import ATTENTION, printable
from ..storage.bucket import BucketPath, Place, address

RUN_FIELDS = "fields of the config, such as train.learning_rate=3e-3 or 'data.prompt={question}\\n' (text is literal)"


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def place(text: str) -> Place:
    """A path, also one in a bucket, of an argument."""
    try:
        return address(text) or Path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local(text: str) -> Path:
    """A path of this host, of an argument."""
    if isinstance(place(text), BucketPath):
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this host")
    return Path(text)


# ------------------------------------------------------------------------------------------------------ shared options
# Each returns a parser for `add_parser(..., parents=[...])`.


def run_fields() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)
    return shared


def run_config() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("config", type=place)
    shared.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)
    return shared


def runtime() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument(
        "--allow-cpu", action="store_true", help="run on the CPU although the machine has an accelerator"
    )
    shared.add_argument("--no-compilation-cache", action="store_true")
    return shared


def backbone() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("--backbone", default="smollm2-135m", help="a folder, a hub id, a .gguf file, or smollm2-135m")
    return shared


def precision() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("--dtype", choices=("float32", "bfloat16"))
    shared.add_argument("--quantize", choices=("int8",))
    shared.add_argument("--attention", choices=ATTENTION, help="the kernel for whole sequences; default: auto")
    return shared


def sampling() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("--max-new-tokens", type=int, default=64)
    shared.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    shared.add_argument("--top-k", type=int, default=0)
    shared.add_argument("--top-p", type=float, default=1.0)
    shared.add_argument(
        "--seed",
        type=int,
        default=0,
        help="prompt i is drawn with SEED + i; a line of --input without a seed gets one that is derived from SEED and "
        "the line's number",
    )
    shared.add_argument(
        "--stop", action="append", default=[], help="a text that ends an answer; may be given several times"
    )
    return shared


# ---------------------------------------------------------------------------------------------- what the options mean


def start_devices(options) -> None:
    """Starts JAX as the options of `runtime` say."""
    from .. import devices
    from ..config import RuntimeSection

    devices.start(RuntimeSection(compilation_cache=not options.no_compilation_cache, allow_cpu=options.allow_cpu))


def model_options(options) -> dict:
    attention = options.attention or "auto"
    return {"dtype": options.dtype, "quantize": options.quantize, "attention": attention}
