"""`para-jax bench`: measurements on this machine."""

from __future__ import annotations

from ..config.bounds import PositiveInt
from ..io.checks import one_of, shorten
from . import options as shared

#: The benchmarks; bench.BENCHMARKS holds their functions.
NAMES = ("decode", "serve", "train")
NUMBERS = ("context", "rounds", "packed", "requests")


def add(commands) -> None:
    text = "measure on this machine: decode, serve or train"
    parser = shared.add_command(
        commands, "bench", text, "decode --rows 1,8,32 --output results/decode.json", [shared.backbone("smollm2-135m")]
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    text = "write the measurement to this JSON file (default: none)"
    shared.option(parser, "--output", text, shared.path_on_this_host, metavar="FILE")
    group = parser.add_argument_group("what is measured", "Each benchmark has its own defaults.")
    group.add_argument("--rows", help="rows of a batch; decode: sizes such as 1,8,32")
    shared.option(group, "--rounds", "how often each side is measured", PositiveInt)
    shared.option(group, "--context", "decode: tokens that each row holds", PositiveInt)
    group.add_argument("--random", action="store_true", help="decode, train: random weights of the backbone's shape")
    shared.option(group, "--packed", "train: examples per row, of 64 tokens each", PositiveInt)
    group.add_argument("--remat", help="train: the choices to compare, such as none,dots,block")
    shared.option(group, "--requests", "serve: requests of each side in a round", PositiveInt)
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..io.record_file import check_record_file
    from .checks import check_backbone

    if options.name not in NAMES:
        raise ValueError(f"bench: {shorten(options.name)} is no benchmark; choose {one_of(NAMES)}")
    given = {name: value for name in NUMBERS if (value := getattr(options, name)) is not None}
    if options.random:
        given["random"] = True
    if options.rows:
        sizes = options.rows.split(",")
        if not all(size.isdecimal() and int(size) for size in sizes):
            raise ValueError(f"--rows is {options.rows}\ngive sizes such as 1,8,32")
        given["rows"] = tuple(map(int, sizes))
    if options.remat:
        given["remat"] = tuple(options.remat.split(","))
    if options.output:
        check_record_file("--output", options.output)
    check_backbone(options.backbone)
    from .. import bench

    bench.run(options.name, options.backbone, options.output, **given)
