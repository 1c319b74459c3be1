"""Likelihoods of continuations, for many adapters in one pass: each (adapter, context) pair is prefilled once, from the
context's tokens alone, and every continuation of it is scored from what prefill left.

In `likelihoods` lengths are padded to sizes that depend on nothing but the length itself, and batches always have the
same number of rows: a question's answer has the same bits whatever stands beside it and whoever else is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .. import devices
from ..adapters.bank import AdapterBank, Entry
from ..backbone.transformer import Transformer
from ..model import continue_rows, prefill
from ..processes import gathered
from ..training.loss import of_logits, token_scores
from .questions import Likelihood, Scored
from .shapes import padded_to

Question = tuple[Entry | None, Likelihood]
#: A row of a batch of contexts, and the tokens of one of its continuations.
Continuation = tuple[int, tuple[int, ...]]


def likelihoods(
    model: Transformer, bank: AdapterBank | None, questions: Sequence[Question], rows: int, compiled: set[str]
) -> Iterator[tuple[int, Scored]]:
    """(A question's index, its answer), in the order in which batches end; shortest contexts first.

    Args:
        questions: each for an adapter of the bank, or None: the base model.
        rows: contexts of a batch.
        compiled: what has been compiled, which is added to.
    """
    contexts: dict[tuple, list[int]] = {}
    for i, (entry, asked) in enumerate(questions):
        contexts.setdefault((padded_length(len(asked.context), model), asked.context, version(entry)), []).append(i)
    of_length: dict[int, list[list[int]]] = {}
    for (length, *_), members in sorted(contexts.items(), key=lambda item: (len(item[0][1]), item[0])):
        of_length.setdefault(length, []).append(members)
    for length, groups in of_length.items():
        for start in range(0, len(groups), rows):
            batch = groups[start : start + rows]
            firsts = [questions[members[0]] for members in batch]
            entries = [entry for entry, _ in firsts] + [None] * (rows - len(firsts))
            adapters = None if bank is None else bank.rows_of(entries)
            asked = [(row, i) for row, members in enumerate(batch) for i in members]
            continuations = [(row, questions[i][1].continuation) for row, i in asked]
            prompts = [context.context for _, context in firsts]
            sizes = length, rows, padded_cache(length, model), None
            for j, scored in of_contexts(model, adapters, prompts, continuations, *sizes, compiled):
                yield asked[j][1], scored


def of_contexts(
    model: Transformer,
    adapters,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
    length: int,
    rows: int,
    cache: int,
    sizes: Sequence[int] | None = None,
    compiled: set[str] | None = None,
) -> Iterator[tuple[int, Scored]]:
    """(A continuation's index, its answer) for one batch of contexts, which are prefilled once.

    Args:
        adapters: as prefill takes them, for `rows` rows.
        contexts: at most `rows`, of at most `length` tokens.
        cache: tokens a row that the cache holds; contexts of several lengths that share it share the continuations'
            programs.
        sizes: padded tokens of the continuations, in order; default: powers of two.
        compiled: what has been compiled, which is added to; None: nothing is said of compiling.
    """
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for i, context in enumerate(contexts):
        tokens[i, : len(context)], lengths[i] = context, len(context)
    leaves, treedef = jax.tree.flatten(model)
    with shown_once(f"{rows} contexts of {length} tokens", compiled):
        logits, state = prefill(model, adapters, tokens, lengths, max_length=cache)
    for size, chunk in continuation_batches(continuations, rows, sizes):
        row, tokens, lengths = collated([continuations[i] for i in chunk], size, rows)
        with shown_once(f"{len(row)} continuations of {size} tokens after {cache}", compiled):
            found = continuation_scores(treedef, leaves, logits, state, row, tokens, lengths)
        nats, greedy = gathered(found)
        for i, total, likeliest in zip(chunk, nats, greedy, strict=False):
            yield i, Scored(float(total), bool(likeliest))


def shown_once(what: str, compiled: set[str] | None) -> AbstractContextManager[None]:
    """devices.compiling at a shape's first call, which stands still for that long; later nothing."""
    if compiled is None or what in compiled:
        return nullcontext()
    compiled.add(what)
    return devices.compiling(what)


def continuation_batches(
    continuations: Sequence[Continuation], rows: int, sizes: Sequence[int] | None
) -> Iterator[tuple[int, list[int]]]:
    """(Padded tokens, indices) of batches of continuations."""
    of_size: dict[int, list[int]] = {}
    for i, (_, ids) in enumerate(continuations):
        size = padded_to(len(ids), sizes) if sizes else padded_continuation(len(ids))
        of_size.setdefault(size, []).append(i)
    for size, members in sorted(of_size.items()):
        count = together(size, rows)
        for start in range(0, len(members), count):
            yield size, members[start : start + count]


def collated(continuations: Sequence[Continuation], size: int, rows: int):
    """row int32 [n], tokens int32 [n, size] and lengths int32 [n], filled up to the batch's n."""
    count = together(size, rows)
    row, tokens, lengths = np.zeros(count, np.int32), np.zeros((count, size), np.int32), np.ones(count, np.int32)
    for i, (of_row, ids) in enumerate(continuations):
        row[i], lengths[i], tokens[i, : len(ids)] = of_row, len(ids), ids
    return row, tokens, lengths


@partial(jax.jit, static_argnums=0)
def continuation_scores(treedef, leaves, logits, state, row, tokens, length):
    """Each continuation's summed log-probability, float32 [n], and whether every token is the likeliest, bool [n].

    Args:
        logits, state: of the contexts' prefill, [rows, vocab] and a DecodeState.
        row, tokens, length: as `collated` gives them. The state is not donated.
    """
    model = jax.tree.unflatten(treedef, leaves)
    nats, likeliest = token_scores(logits[row], tokens[:, 0])
    if tokens.shape[1] == 1:
        return -nats, likeliest
    hidden = continue_rows(model, state, row, tokens[:, :-1])

    positions = tokens.shape[1] - 1
    later, also = of_logits(token_scores, model, hidden, tokens[:, 1:])
    real = 1 + jnp.arange(positions) < length[:, None]
    return -(nats + jnp.where(real, later, 0).sum(axis=1)), likeliest & (also | ~real).all(axis=1)


# --------------------------------------------------------------------------------------------------------------- sizes


def padded_length(length: int, model: Transformer) -> int:
    """16, 24, 32, 48, 64, 96, 128, 192, ... tokens, at most the model's positions: few sizes, little padding."""
    size = max(16, 1 << (length - 1).bit_length())
    size = size * 3 // 4 if length <= size * 3 // 4 and size > 16 else size
    return min(size, model.config.max_positions)


def padded_cache(length: int, model: Transformer) -> int:
    """64, 128, 256, ... tokens, at most the model's positions: few programs for continuations."""
    return min(max(64, 1 << (length - 1).bit_length()), model.config.max_positions)


def padded_continuation(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


def together(size: int, rows: int) -> int:
    """Continuations of a batch: of short ones, more than there are rows, as each row may have several."""
    return rows * max(1, 4 // size)


def version(entry: Entry | None) -> int:
    return 0 if entry is None else entry.version
