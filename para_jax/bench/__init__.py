"""`para-jax bench NAME`: what decoding, serving and training cost on this machine, and the record of it.

Sides that are compared take turns, one measurement each per round, so that a change in the machine's load meets all of
them. The result is the median over the rounds.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..config import RuntimeSection
from ..io.record_file import check_record_file
from ..reports.inspect import new_record
from ..reports.plots import decode_plot
from ..runtime import devices
from .decode import bench_decode
from .record import report
from .serve import bench_serve
from .train import bench_train

#: The names of `para-jax bench`. Each function returns {"unit", "medians", "rounds", ...} for a backbone.
BENCHMARKS: dict[str, Callable[..., dict]] = {
    "decode": bench_decode,
    "serve": bench_serve,
    "train": bench_train,
}


def run(name: str, backbone: str = "smollm2-135m", output: str | Path | None = None, **options) -> dict:
    """One benchmark's record: medians, ratios, each round, command, device and versions. Prints it as a table, and
    writes it to the JSON file `output` if one is given; `decode` draws a picture next to it if matplotlib is installed.

    Args:
        options: the benchmark's own, such as rounds.
    """
    check_options(name, options)
    file = None if output is None else Path(output)
    if file is not None:
        check_record_file("--output", file)
    devices.start(RuntimeSection(compilation_cache=False, allow_cpu=True))
    record = new_record(command_line(name, backbone, options), BENCHMARKS[name](backbone, **options))
    report(record, file)
    if file is not None and "sides" in record and find_spec("matplotlib"):
        decode_plot(record, file.with_suffix(".png"))
        print(f"wrote {file.with_suffix('.png')}")
    return record


def check_options(name: str, options: dict) -> None:
    """Raises ValueError for options that a benchmark does not have."""
    _, *known = inspect.signature(BENCHMARKS[name]).parameters.values()
    names = [parameter.name for parameter in known]
    unknown = [option for option in options if option not in names]
    if unknown:
        raise ValueError(f"bench {name} has no option {', '.join(unknown)}; it has {', '.join(names)}")


def command_line(name: str, backbone: str, options: dict) -> str:
    words = [shlex.join(["para-jax", "bench", name, "--backbone", str(backbone)])]
    for option, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(f"--{option}" if value is True else f"--{option} {text}")
    return " ".join(words)
