"""`para-jax quickstart`."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "train adapters for three small tenants and answer one mixed batch (downloads 98 MB)"
    parser = shared.add_command(commands, "quickstart", text, "train.max_steps=50")
    shared.add_overrides(parser)
    parser.set_defaults(run=run)


def run(options) -> int:
    from ..quickstart import quickstart

    return 0 if quickstart(options.overrides) else 1
