"""`para-jax inspect`: an adapter folder, a run folder, or a config's data."""

from __future__ import annotations

from ..config import printable
from . import options as shared

LONGEST_LINE = 4000  # characters of a report's line


def add(commands) -> None:
    text = "show an adapter folder, a run folder, or a config's data as tokens"
    parser = commands.add_parser("inspect", help=text, description=text)
    parser.add_argument("target", type=shared.place, help="a folder, or with --data a config")
    parser.add_argument("overrides", nargs="*", default=[], help=shared.RUN_FIELDS)
    parser.add_argument(
        "--data", action="store_true", help="print three examples as tokens: prompt, loss, last prompt token"
    )
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..config import load_config
    from ..inspect import data_report, folder_report

    found = (
        data_report(load_config(options.target, options.overrides)) if options.data else folder_report(options.target)
    )
    print("\n".join(printable(line, LONGEST_LINE) for line in found.splitlines()))  # what others wrote is in it
