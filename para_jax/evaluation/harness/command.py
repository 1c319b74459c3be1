"""lm-eval's own command line, with the model `para` as its default. This module needs lm-eval."""

from __future__ import annotations

import sys

from . import completions as completions  # registers the model `para-completions`
from . import lm as lm  # registers the model `para`

#: Commands and options with which the model stays what they say.
THEIRS = {"ls", "validate", "-h", "--help", "--model", "-M", "--config", "-C"}


def harness_command(arguments: list[str]) -> None:
    """Runs lm-eval's own command line, with the model `para` as the default."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *with_para(arguments)]
    cli_evaluate()


def with_para(arguments: list[str]) -> list[str]:
    """The arguments of `lm-eval run` with the model `para`, unless they or a config file name a model."""
    given = {text.partition("=")[0] for text in arguments}
    if not arguments or given & THEIRS:
        return arguments
    return [*arguments, "--model", "para", *([] if given & {"--batch_size", "-b"} else ["--batch_size", "8"])]
