"""Log-likelihoods of continuations, for many adapters in one pass.

Each pair of adapter and context is prefilled once, from the context's tokens alone, and all its continuations are
scored from that state. Where the shapes hold prompts together with their completions, a question is instead one
teacher-forced pass over both. Adapters of scope `response` share their contexts (shared_prompts.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..backbone.transformer import Transformer
from ..data.batches import assign_buckets, collate, example_lengths, right_padded
from ..data.examples import Example
from ..model.adapted import continue_rows, prefill, prefill_after
from ..model.tail import PromptStates
from ..runtime.processes import full_arrays
from ..training.loss import of_logits, token_scores
from ..training.step import eval_nll
from .batch_adapters import Bank, adapters_of, version
from .questions import Likelihood, Scored
from .shapes import PlannedShapes, Shapes
from .shared_prompts import own_batches, repeated, shared_batches, shares_prompts

#: A row of a batch of contexts, and the tokens of one of its continuations.
Continuation = tuple[int, tuple[int, ...]]


def likelihoods(
    model: Transformer,
    bank: Bank | None,
    asked: Sequence[tuple[Any, Likelihood]],
    rows: int,
    shapes: Shapes,
) -> Iterator[tuple[int, Scored]]:
    """(A question's index, its answer), in the order in which batches end, shortest contexts first.

    Args:
        asked: questions, each with an entry of the bank; None is the base model.
        rows: contexts per batch.
    """
    planned = isinstance(shapes, PlannedShapes)
    # with open shapes always: an answer's bits must not depend on who else is asked
    sharing = not planned or repeated(asked)
    alike: dict[tuple[bool, bool], list[int]] = {}
    for i, (entry, question) in enumerate(asked):
        # the factors of a batch all come from the contexts, or all from other tokens
        other = question.reads is not None
        alike.setdefault((other, sharing and not other and shares_prompts(entry)), []).append(i)
    for (_, shared), chosen in sorted(alike.items()):
        members = [asked[i] for i in chosen]
        if planned and not shapes.of_prompts:
            found = in_whole_rows(model, bank, members, rows, shapes, shared)
        else:
            found = after_contexts(model, bank, members, rows, shapes, shared)
        for i, scored in found:
            yield chosen[i], scored


def in_whole_rows(
    model: Transformer,
    bank: Bank | None,
    asked: Sequence[tuple[Any, Likelihood]],
    rows: int,
    shapes: PlannedShapes,
    shared: bool,
) -> Iterator[tuple[int, Scored]]:
    """As `likelihoods`: a row of a batch is a context with its continuation.

    Args:
        shared: whether all the adapters share their contexts.
    """
    examples = [Example(list(question.context), list(question.continuation)) for _, question in asked]
    lengths = example_lengths(examples)
    of_bucket = assign_buckets(lengths, shapes.buckets)
    order = [one.prompt_ids for one in examples] if shared else lengths
    for index, bucket in enumerate(shapes.buckets):
        members = sorted(np.flatnonzero(of_bucket == index).tolist(), key=order.__getitem__)
        contexts = [asked[i][1].context for i in members]
        given = model, contexts, rows, lambda _, bucket=bucket: bucket.prompt or bucket.length
        for places, states in (shared_batches if shared else own_batches)(*given):
            chosen = [members[i] for i in places]
            adapters = adapters_of(model, bank, [asked[i] for i in np.resize(chosen, rows)], shapes)
            batch = collate([examples[i] for i in chosen], bucket, rows)
            found = eval_nll(model, adapters, batch, states, completion=bucket.completion, prompt=bucket.prompt)
            nats, _, greedy = full_arrays(found)
            for i, total, likeliest in zip(chosen, nats, greedy, strict=False):
                yield i, Scored(-float(total), bool(likeliest))


def after_contexts(
    model: Transformer,
    bank: Bank | None,
    asked: Sequence[tuple[Any, Likelihood]],
    rows: int,
    shapes: Shapes,
    shared: bool,
) -> Iterator[tuple[int, Scored]]:
    """As `likelihoods`: a row of a batch is a context with all its continuations.

    Args:
        shared: whether all the adapters share their contexts.
    """
    contexts: dict[tuple, list[int]] = {}
    for i, (entry, question) in enumerate(asked):
        length = shapes.context(len(question.context))
        contexts.setdefault((length, question.context, question.reads or (), version(entry)), []).append(i)
    of_length: dict[int, list[list[int]]] = {}
    for (length, *_), members in sorted(contexts.items(), key=lambda item: (len(item[0][1]), item[0])):
        of_length.setdefault(length, []).append(members)
    for length, groups in of_length.items():
        read = [asked[members[0]][1].context for members in groups]
        for chosen, states in (shared_batches if shared else own_batches)(model, read, rows, shapes.context):
            batch = [groups[i] for i in chosen]
            firsts = [asked[members[0]] for members in batch]
            adapters = adapters_of(model, bank, [firsts[i % len(firsts)] for i in range(rows)], shapes)
            order = [i for members in batch for i in members]
            continuations = [(row, asked[i][1].continuation) for row, members in enumerate(batch) for i in members]
            prompts = [question.context for _, question in firsts]
            given = prompts, continuations, length, rows, shapes, states
            for j, scored in of_contexts(model, adapters, *given):
                yield order[j], scored


def of_contexts(
    model: Transformer,
    adapters,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
    length: int,
    rows: int,
    shapes: Shapes,
    states: PromptStates | None,
) -> Iterator[tuple[int, Scored]]:
    """(A continuation's index, its answer) for one batch of contexts.

    Args:
        adapters: as prefill takes them, for `rows` rows.
        contexts: at most `rows`, of at most `length` tokens.
        states: of the contexts, for adapters that share them.
    """
    begin = prefill if states is None else partial(prefill_after, states=states)
    tokens, lengths = right_padded(contexts, rows, length)
    leaves, treedef = jax.tree.flatten(model)
    logits, state = begin(model, adapters, tokens, lengths, max_length=shapes.context_cache(length))
    for size, chunk in continuation_batches(continuations, rows, shapes):
        row, tokens, lengths = collated([continuations[i] for i in chunk], size, rows)
        found = continuation_scores(treedef, leaves, logits, state, row, tokens, lengths)
        nats, greedy = full_arrays(found)
        for i, total, likeliest in zip(chunk, nats, greedy, strict=False):
            yield i, Scored(float(total), bool(likeliest))


def continuation_batches(
    continuations: Sequence[Continuation], rows: int, shapes: Shapes
) -> Iterator[tuple[int, list[int]]]:
    """(Padded tokens, indices) of batches of continuations."""
    of_size: dict[int, list[int]] = {}
    for i, (_, ids) in enumerate(continuations):
        of_size.setdefault(shapes.continuation(len(ids)), []).append(i)
    for size, members in sorted(of_size.items()):
        count = together(size, rows)
        for start in range(0, len(members), count):
            yield size, members[start : start + count]


def together(size: int, rows: int) -> int:
    """Continuations per batch: more than the rows if they are short, as each row may have several."""
    return rows * max(1, 4 // size)


def collated(continuations: Sequence[Continuation], size: int, rows: int):
    """row int32 [n], tokens int32 [n, size] and lengths int32 [n], padded to the batch's n."""
    row = np.zeros(together(size, rows), np.int32)
    row[: len(continuations)] = [of_row for of_row, _ in continuations]
    return row, *right_padded([ids for _, ids in continuations], len(row), size)


@partial(jax.jit, static_argnums=0)
def continuation_scores(treedef, leaves, logits, state, row, tokens, length):
    """Each continuation's summed log-probability, float32 [n], and whether every token is the likeliest, bool [n].

    Args:
        logits, state: of the contexts' prefill, [rows, vocab] and a DecodeState, which is not donated.
        row, tokens, length: as `collated` gives them.
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
