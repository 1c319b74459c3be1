"""`para-jax inspect`: an adapter folder, a run folder, or a config's data."""

from __future__ import annotations

from ..config import load_config
from ..io.checks import printable
from . import options as shared

LONGEST_LINE = 4000  # characters of a report's line


def add(commands) -> None:
    text = "show an adapter folder, a run folder, or a config's data as tokens"
    example = "runs/mine\n  para-jax inspect own-data --data data.train=data/mine"
    parser = shared.add_command(commands, "inspect", text, example)
    parser.add_argument("target", type=shared.place, metavar="TARGET", help="a folder, or with --data a config")
    shared.add_overrides(parser)
    text = "show a config's data: three examples as tokens, and the lengths; of many tenants also a table"
    parser.add_argument("--data", action="store_true", help=text)
    parser.set_defaults(run=run)


def run(options) -> None:
    config = load_config(options.target, options.overrides) if options.data else None
    from ..reports.inspect import data_report, folder_report

    report = data_report(config) if config else folder_report(options.target)
    for line in report.splitlines():
        print(printable(line, LONGEST_LINE))  # it holds text that others wrote
