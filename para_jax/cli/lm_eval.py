"""`para-jax lm-eval`: lm-eval's own command line, with our model."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "lm-eval's own command line, with the model `para` (backbone=..., adapter=...)"
    example = "--tasks hellaswag --model_args backbone=smollm2-135m,adapter=runs/mine/adapter"
    shared.add_command(commands, "lm-eval", text, example).set_defaults(run=run)


def run(options) -> None:
    from importlib.util import find_spec

    from ..evaluation.task_file import INSTALL

    if find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    from ..evaluation.harness.command import harness_command

    harness_command(options.arguments)
