"""The command line of a measurement: its options are the parameters of its function. Example:

python scripts/experiments/bench_http.py --requests 48 --rounds 2 --output results/bench_http.json
"""

import argparse
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from para_jax.bench.record import report
from para_jax.config import RuntimeSection
from para_jax.io.record_file import check_record_file
from para_jax.reports.inspect import new_record
from para_jax.runtime import devices


def main(measure: Callable[..., dict]) -> None:
    """Measures, prints the record as a table, and writes it to --output."""
    parser = options(measure.__doc__)
    for name, parameter in list(inspect.signature(measure).parameters.items())[1:]:
        default = parameter.default
        if default is parameter.empty:
            parser.add_argument(f"--{name}", required=True)
        else:
            kind = numbers if isinstance(default, tuple) else type(default)
            parser.add_argument(f"--{name}", type=kind, default=default)
    given = vars(parser.parse_args())
    backbone, output = given.pop("backbone"), given.pop("output")
    if output:
        check_record_file("--output", output)
    devices.start(RuntimeSection(compilation_cache=False, allow_cpu=True))
    report(new_record(shlex.join(["python", *sys.argv]), measure(backbone, **given)), output)


def options(description: str | None, output: str | None = None) -> argparse.ArgumentParser:
    """The options that all measurements have.

    Args:
        output: the file to write if no other is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m", help="such as smollm2-135m, or a .gguf file")
    parser.add_argument("--output", type=Path, default=output, help="write the measurement to this JSON file")
    return parser


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
