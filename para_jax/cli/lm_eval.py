"""`para-jax lm-eval`: lm-eval's own command line, with our model."""

from __future__ import annotations


def add(commands) -> None:
    text = "lm-eval's own command line, with the model `para` (backbone=..., adapter=...)"
    commands.add_parser("lm-eval", help=text, description=text).set_defaults(run=run)


def run(options) -> None:
    from importlib.util import find_spec

    from ..evaluation.many import INSTALL

    if find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    from ..evaluation.harness.lm import harness_command

    harness_command(options.arguments)
