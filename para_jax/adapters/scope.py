"""Scope: the positions of a row where its adapter acts. Every form but `all` is our choice, or another paper's.

With p prompt tokens and a window of w, an adapter acts at position t where

    all        always                as the methods' papers have it
    response   t >= p - w            activated LoRA (arXiv:2504.12397) has it for LoRA
    prompt     t < p                 PreFT (arXiv:2605.14217) has it for LoRA

With `response`, the tokens before the window are the plain backbone's, and the window's are ordinary steps after them.
PARA has w = 1: the prompt's last token passes through the layers once. In each layer it makes the factors, from the
stream that enters the layer in this same pass, and is the first token that they act on.

Activated LoRA in Hugging Face PEFT (read in version 0.21.2, tuners/lora/variants.py) looks for the last occurrence of
`alora_invocation_tokens` in the tokens it is given, and acts from the first of them on. `generate` looks in the prompt
alone. Without an occurrence, PEFT silently runs the plain base model.

So where a prompt ends with its w invocation tokens, PEFT computes what a LoRA adapter of scope `response` with a window
of w computes. Elsewhere the two differ, and the prompt is refused. One difference is left: PEFT's training and
teacher-forced passes look in prompt and completion together, and start later if a completion has the tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..io.checks import shorten
from .segments import Segments

#: More tokens than any row has.
ENDLESS = 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reach:
    """Where the adapters of a batch act, counted from the end of each row's prompt."""

    before: Any
    """int32 [rows]: they act from prompt_length - before on"""
    after: Any
    """int32 [rows]: they act before prompt_length + after"""
    scopes: tuple[tuple[str, int], ...] = field(metadata={"static": True})
    """the distinct (scope, window) of the adapters that the rows may have"""

    @property
    def everywhere(self) -> bool:
        """Whether every row's scope is `all`."""
        return all(scope == "all" for scope, _ in self.scopes)

    @property
    def window(self) -> int:
        """The largest window of a scope `response`; 0 where no row can have it."""
        return max((window for scope, window in self.scopes if scope == "response"), default=0)

    @property
    def only_window(self) -> int | None:
        """The window, if every row's scope is `response` with the same one."""
        same = len(self.scopes) == 1 and self.scopes[0][0] == "response"
        return self.scopes[0][1] if same else None

    @property
    def decodes(self) -> bool:
        """Whether decoding needs any row's adjustment."""
        return any(scope != "prompt" for scope, _ in self.scopes)

    def acts(
        self, prompt_length: Int[Array, "*axes"], position: Int[Array, "*lead T"], segments: Segments | None
    ) -> Bool[Array, "rows T"]:
        """Whether a row's adapter acts at a token.

        Args:
            position: of each token in its row, or within its segment.
        """
        if segments is None:
            prompt = prompt_length[:, None]
        else:
            prompt = jnp.take_along_axis(prompt_length, jnp.maximum(segments.segment, 0), axis=1)
        after_prompt = position - prompt
        return (after_prompt >= -self.before[:, None]) & (after_prompt < self.after[:, None])


def scope_of(config: Any) -> tuple[str, int]:
    """The scope and the window of an adapter's config. A config without them acts everywhere."""
    return getattr(config, "scope", "all"), getattr(config, "scope_window", 1)


def reach_of_scope(scope: str, window: int) -> tuple[int, int]:
    """`before` and `after` of Reach."""
    return {"all": (ENDLESS, ENDLESS), "response": (window, ENDLESS), "prompt": (ENDLESS, 0)}[scope]


def reach_of_config(config: Any, rows: int) -> Reach:
    """The reach of rows with adapters of one config."""
    scope = scope_of(config)
    before, after = (jnp.full(rows, count, jnp.int32) for count in reach_of_scope(*scope))
    return Reach(before, after, (scope,))


def reach_of_configs(configs: list[Any], index: Int[Array, "configs rows"]) -> Reach:
    """The reach of rows with at most one adapter each: that of config i where index[i] is not negative. It is nowhere
    for a row without an adapter."""
    scopes = [scope_of(config) for config in configs]
    counts = jnp.array([reach_of_scope(*scope) for scope in scopes], jnp.int32)  # [configs, 2]
    before, after = jnp.sum(jnp.where((index >= 0)[..., None], counts[:, None], 0), axis=0).T
    return Reach(before, after, tuple(sorted(set(scopes))))


def require_invocation(config: Any, prompt: Sequence[int], what: str) -> None:
    """Raises ValueError where the adapter of this config has invocation tokens, and a prompt does not end with them.

    Args:
        what: the prompt's name in the error.
    """
    tokens = invocation_tokens(config)
    end = tuple(int(token) for token in prompt[-len(tokens) :]) if tokens else ()
    if end != tokens:
        raise ValueError(
            f"{what} must end with the adapter's alora_invocation_tokens, {shorten(list(tokens))}; it ends with "
            f"{shorten(list(end))}"
        )


def invocation_tokens(config: Any) -> tuple[int, ...]:
    """The tokens that every prompt of this adapter ends with; none for most adapters."""
    return getattr(config, "alora_invocation_tokens", None) or ()
