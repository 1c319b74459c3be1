"""`para-jax bench`: measurements on this machine."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "measure on this machine: load, decode, serve, evaluate, train, packing or tenants"
    parser = commands.add_parser("bench", help=text, description=text)
    parser.add_argument("name")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--output", type=shared.local, help="write the measurement to this JSON file")
    parser.add_argument("--rows", help="rows of a batch; decode: sizes such as 1,8,32; tenants: of each tenant")
    parser.add_argument("--context", type=int, help="decode: tokens that each row holds")
    parser.add_argument("--rounds", type=int, help="how often each side is measured")
    parser.add_argument("--random", action="store_true", help="decode, train: random weights of the backbone's shape")
    parser.add_argument("--packed", type=int, help="train: examples a row, of 64 tokens each")
    parser.add_argument("--remat", help="train: what is compared, such as none,dots,block; packing: one of them")
    parser.add_argument("--data", help="packing (which needs it): a .jsonl file or a folder with train.jsonl")
    parser.add_argument("--length", type=int, help="packing: tokens of a packed row")
    parser.set_defaults(run=run)


def run(options) -> None:
    from .. import bench
    from ..config import require

    numbers = ("context", "rounds", "packed", "length")
    given = {name: getattr(options, name) for name in (*numbers, "data") if getattr(options, name) is not None}
    given |= {"random": True} if options.random else {}
    if options.rows:
        sizes = options.rows.split(",")
        require(all(size.isdecimal() and int(size) for size in sizes), "--rows", options.rows, "sizes such as 1,8,32")
        given["rows"] = tuple(map(int, sizes))
    require(all(given.get(name, 1) >= 1 for name in numbers), "bench", given, "numbers of at least 1")
    if options.remat:
        given["remat"] = tuple(options.remat.split(",")) if options.name == "train" else options.remat
    bench.run(options.name, options.backbone, options.output, **given)
