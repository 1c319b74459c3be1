"""The invocation of activated LoRA (arXiv:2504.12397), as Hugging Face PEFT has it.

PEFT (read in version 0.21.2, tuners/lora/variants.py) looks for the last occurrence of `alora_invocation_tokens` in the
tokens it is given. Its adapter acts from the first of them on, that token included. `generate` looks in the prompt
alone. Without an occurrence, PEFT silently runs the plain base model.

So where a prompt ends with its w invocation tokens, PEFT computes what a LoRA adapter of scope `response` with a window
of w computes. Elsewhere the two differ, and the prompt is refused. One difference is left: PEFT's training and
teacher-forced passes look in prompt and completion together, and start later if a completion has the tokens again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..config import shorten
from .adapter import Adapter
from .rows import Rows


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


def row_configs(adapters: Any, rows: int) -> Iterable[Any]:
    """The config of each row's adapter, where any of them has invocation tokens. A bank's Rows have none: they hold
    adapters in a form that several tenants share."""
    if isinstance(adapters, Adapter):
        return [adapters.config] * rows
    configs = [stack.adapters.config for stack in adapters.stacks] if isinstance(adapters, Rows) else []
    if not any(map(invocation_tokens, configs)):
        return [None] * rows
    used = np.asarray(adapters.by_row().index) >= 0
    return [next((configs[i] for i in np.flatnonzero(row)), None) for row in used.T]
