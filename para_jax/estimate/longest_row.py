"""A run's longest rows, from its config alone: how many tokens of them are prompts and completions, and which of their
parts have a backward pass."""

from __future__ import annotations

from typing import NamedTuple

from ..adapters.scope import scope_of
from ..backbone.kernel_choice import AttentionChoice, attention_kernel
from ..config import ModelConfig, RunConfig
from ..model.tail import by_splash

#: Tokens of an example in a packed row, where the data isn't read.
TOKENS_AN_EXAMPLE = 64


class RowPart(NamedTuple):
    """A part of a row that passes through the layers at once."""

    tokens: int
    context: int
    """how many keys attention compares with each token, masked or not"""
    kernel: str

    @property
    def scores(self) -> int:
        """Scores of each head that attention stores."""
        return self.tokens * self.context * (self.kernel == "plain")


def parts_of_row(config: RunConfig, model: ModelConfig) -> tuple[RowPart | None, RowPart]:
    """The part of the longest rows that has no backward pass, and the part that has one. Only with scope response is
    there a first one: the prompts. `auto` is taken for the kernel of a TPU, and a named kernel for itself."""
    length, kernel = config.data.assumed_length, config.backbone.attention
    if kernel == "auto":
        kernel, _ = kernel_of_run(config, model)
    scope, window = scope_of(config.adapter)
    if scope != "response":
        return None, RowPart(length, length, kernel)
    prompt, completion = longest_split(config)
    tail = completion + examples_in_row(config) * (min(window, prompt) - 1)
    splash = all(by_splash(kernel, tail, kind.window) for kind in model.kinds)
    return RowPart(prompt, prompt, kernel), RowPart(tail, prompt + tail, "splash" if splash else "plain")


def longest_split(config: RunConfig) -> tuple[int, int]:
    """The maximum number of prompt tokens, and of completion tokens, in a row: any number of both. With scope response,
    where much depends on it, a completion has at most eval.max_new_tokens tokens if that is given."""
    length = config.data.assumed_length
    if scope_of(config.adapter)[0] != "response" or config.eval.max_new_tokens is None:
        return length, length
    return length, min(length, examples_in_row(config) * config.eval.max_new_tokens)


def examples_in_row(config: RunConfig) -> int:
    """1, or the examples in a packed row."""
    return max(1, config.data.assumed_length // TOKENS_AN_EXAMPLE) if config.data.packing else 1


def kernel_of_run(config: RunConfig, model: ModelConfig, platform: str = "tpu") -> tuple[str, str]:
    """The attention kernel of the rows on a TPU, or on another device of this machine, and the reason for it."""
    dtype, choice = config.backbone.dtype or "bfloat16", AttentionChoice(config.backbone.attention)
    return attention_kernel(model, config.data.assumed_length, dtype, platform, choice, packed=config.data.packing)
