"""Prompts that run through the plain backbone (scope `response`), computed once for all the tenants asked about them.

Such a prompt leaves the same keys and values, whoever answers. So a batch of distinct prompts is computed first, and
then the tails of all the questions about them. With OpenShapes an answer has the same bits, however many tenants are
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..adapters.methods import has_plain_prompts
from ..data.batches import right_padded
from ..model.tail import PromptStates, prompt_states
from .batch_adapters import version


def shares_prompts(entry: Any) -> bool:
    """Whether an entry of a bank (None: the base model) is asked about prompts as the backbone computes them."""
    return entry is not None and has_plain_prompts(entry.config)


def repeated(asked: Sequence[tuple[Any, Any]]) -> bool:
    """Whether several of the entries that share prompts are asked about the same one. If none is, sharing would save
    nothing and take memory for the prompts' states."""
    of_prompt = {(one.context, version(entry)) for entry, one in asked if shares_prompts(entry)}
    return len(of_prompt) > len({context for context, _ in of_prompt})


def shared_batches(
    model, contexts: Sequence[tuple[int, ...]], rows: int, pad: Callable[[int], int]
) -> Iterator[tuple[list[int], PromptStates]]:
    """Batches of at most `rows` questions, and the states of their prompts, with a `row` for each of the batch.

    Args:
        contexts: of each question. Equal ones are next to each other.
        pad: gives the padded tokens for a number of them.
    """
    firsts = [i for i, one in enumerate(contexts) if not i or one != contexts[i - 1]]
    for start in range(0, len(firsts), rows):
        distinct = firsts[start : start + rows]
        stop = firsts[start + rows] if start + rows < len(firsts) else len(contexts)
        held = [contexts[i] for i in distinct]
        states = prompt_states(model, right_padded(held, rows, pad(max(map(len, held))))[0])
        for begin in range(distinct[0], stop, rows):
            batch = list(range(begin, min(begin + rows, stop)))
            places = np.searchsorted(distinct, batch, side="right") - 1  # of their prompts
            yield batch, states._replace(row=np.resize(places, rows).astype(np.int32))


def own_batches(model, contexts: Sequence, rows: int, pad: Callable[[int], int]) -> Iterator[tuple[list[int], None]]:
    """As shared_batches, for rows that compute their prompts themselves."""
    for start in range(0, len(contexts), rows):
        yield list(range(start, min(start + rows, len(contexts)))), None
