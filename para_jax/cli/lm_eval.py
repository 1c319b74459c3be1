"""`para-jax lm-eval`: lm-eval's own command line, with our model."""

from __future__ import annotations

from . import options as shared

OWN_HELP = """\
para-jax lm-eval is lm-eval's command line; its own help is below. The default of --model is `para`:
  para-jax lm-eval --tasks hellaswag --model_args backbone=smollm2-135m,adapter=runs/mine/adapter
backbone= is a folder, a hub id, a .gguf file or smollm2-135m; adapter= is an adapter's folder or hub id (none: the base
model). --model para-completions asks a server (docs/lm_eval.md).
"""


def add(commands) -> None:
    text = "lm-eval's own command line, with the model `para` (backbone=..., adapter=...)"
    example = "--tasks hellaswag --model_args backbone=smollm2-135m,adapter=runs/mine/adapter"
    shared.add_command(commands, "lm-eval", text, example).set_defaults(run=run)


def run(options) -> None:
    from importlib.util import find_spec

    from ..evaluation.task_file import INSTALL

    if find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    if {"-h", "--help"} & set(options.arguments):
        print(OWN_HELP)
    from ..evaluation.harness.command import harness_command

    harness_command(options.arguments)
