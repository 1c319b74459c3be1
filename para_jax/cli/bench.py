"""`para-jax bench`: measurements on this machine."""

from __future__ import annotations

from ..config.bounds import PositiveInt
from ..io.checks import expanded
from . import options as shared

#: The benchmarks; bench.BENCHMARKS holds their functions.
NAMES = ("decode", "serve", "train")
#: The options of a benchmark. Those that are not given have the benchmark's own defaults.
OPTIONS = ("rows", "rounds", "context", "random", "packed", "remat", "requests")


def add(commands) -> None:
    text = "measure on this machine: decode, serve or train"
    parser = shared.add_command(
        commands, "bench", text, "decode --rows 1,8,32 --output results/decode.json", [shared.backbone("smollm2-135m")]
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    text = "write the measurement to this JSON file (default: none)"
    shared.option(parser, "--output", text, expanded, metavar="FILE")
    group = parser.add_argument_group("what is measured", "Each benchmark has its own defaults.")
    shared.option(group, "--rows", "rows of a batch; decode: sizes such as 1,8,32", whole_numbers)
    shared.option(group, "--rounds", "how often each side is measured", PositiveInt)
    shared.option(group, "--context", "decode: tokens that each row holds", PositiveInt)
    text = "decode, train: random weights of the backbone's shape"
    group.add_argument("--random", action="store_const", const=True, help=text)
    shared.option(group, "--packed", "train: examples per row, of 64 tokens each", PositiveInt)
    shared.option(group, "--remat", "train: the choices to compare, such as none,dots,block", texts, metavar="R,R")
    shared.option(group, "--requests", "serve: requests of each side in a round", PositiveInt)
    parser.set_defaults(run=run)


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run(options) -> None:
    from .. import bench

    chosen = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    bench.run(options.name, options.backbone, options.output, **chosen)
