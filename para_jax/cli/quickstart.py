"""`para-jax quickstart`."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "train three small tenants on the built-in backbone, and serve them"
    parser = commands.add_parser("quickstart", help=text, description=text, parents=[shared.run_fields()])
    parser.set_defaults(run=run)


def run(options) -> int:
    from ..quickstart import quickstart

    return 0 if quickstart(options.overrides) else 1
