"""Answers that are written: greedily in padded batches, or by an Engine."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..backbone.transformer import Transformer
from ..inference.answer_text import text_of
from ..inference.draw import NO_TOKEN, NO_TOKEN_MESSAGE
from ..inference.generate import before_stop, generate_tokens
from ..inference.sampling import Sampling
from ..io.checks import shorten
from ..model.adapted import prefill_after
from ..serving.engine import Engine
from ..serving.request import Request
from .batch_adapters import Bank, adapters_of
from .questions import Generation, Pending, Written
from .shapes import PlannedShapes, Shapes
from .shared_prompts import own_batches, repeated, shared_batches, shares_prompts


def write_in_batches(
    model: Transformer,
    bank: Bank | None,
    tokenizer,
    asked: Sequence[tuple[Any, Generation]],
    rows: int,
    shapes: Shapes,
    stop_ids: Sequence[int],
) -> Iterator[tuple[int, Written]]:
    """(A question's index, its answer) by greedy decoding, shortest contexts first. This works in both layouts and on
    several hosts, and takes questions that name the tokens to read. It does not sample, and knows no stop texts.

    Args:
        rows: of a batch; the last batch is padded with repeated questions.
        stop_ids: tokens that end every answer, in addition to its own.
    """
    planned = isinstance(shapes, PlannedShapes)
    # with open shapes always: an answer's bits must not depend on who else is asked
    sharing = not planned or repeated(asked)
    alike: dict[tuple, list[int]] = {}
    for i, (entry, question) in enumerate(asked):
        other = question.reads is not None
        length = shapes.prompt(len(question.context)) if planned else 0  # of few: no row is padded as its batch is
        key = other, sharing and not other and shares_prompts(entry), length, question.stop_ids
        alike.setdefault(key, []).append(i)
    for (_, shared, _, own), members in alike.items():
        members.sort(key=lambda i: (len(asked[i][1].context), asked[i][1].context))
        contexts = [asked[i][1].context for i in members]
        for places, states in (shared_batches if shared else own_batches)(model, contexts, rows, shapes.prompt):
            chosen = [members[i] for i in places]
            batch = [asked[i] for i in np.resize(chosen, rows)]  # one compiled shape, also at the end
            prompts = [list(question.context) for _, question in batch]
            most = [question.max_new_tokens for _, question in batch]
            new, longest = max(most), max(map(len, prompts))
            written = generate_tokens(
                model,
                adapters_of(model, bank, batch, shapes),
                prompts,
                Sampling(new),
                stop_ids=(*stop_ids, *own),
                length=shapes.prompt(longest) if states is None else states.keys.shape[3],
                max_length=shapes.writing_cache(longest + new),
                begin=None if states is None else partial(prefill_after, states=states),
                most=most,
            )
            for i, tokens in zip(chosen, written, strict=False):
                kept = tokens[: asked[i][1].max_new_tokens]
                # What precedes logits that are not finite might be right by chance.
                finite = NO_TOKEN not in kept
                yield i, Written(text_of(tokenizer, kept) if finite else "", len(kept), finite)


def known_answer(tokenizer, question: Generation, greedy: Sequence[int], stop_ids: Sequence[int]) -> Written | None:
    """The answer of greedy decoding if its first tokens are known to be `greedy`; None if it may go on after them."""
    if question.temperature > 0 or question.stop:
        return None
    made = list(greedy[: question.max_new_tokens])
    kept = before_stop(made, (*stop_ids, *question.stop_ids))
    if len(kept) == len(made) < question.max_new_tokens:
        return None
    return Written(text_of(tokenizer, kept), len(kept))


def write_by_engine(engine: Engine, pending: Sequence[Pending]) -> Generator[tuple[Pending, Written]]:
    """The questions with their answers. The engine must have no other requests, neither now nor meanwhile. Whatever
    ends this, even Ctrl-C, the engine then holds none of ours."""
    if engine.open:
        raise ValueError(f"engine: it has {engine.open} open requests; take their answers first with run()")
    ordered = sorted(pending, key=lambda one: (len(one.question.context), one.question.context))
    limits = [one for one in (engine.queue_limit, engine.queue_limit_per_tenant) if one is not None]
    at_once = min(limits, default=len(ordered))
    waiting: dict[Hashable, Pending] = {}
    try:
        for start in range(0, len(ordered), at_once):
            for one in ordered[start : start + at_once]:
                waiting[one.key] = one
                engine.submit(as_request(one.key, one.tenant, one.question), entry=one.entry)
            for completion in engine.run():
                one = waiting.pop(completion.id)
                overflows = completion.error == NO_TOKEN_MESSAGE  # this tenant's answer is wrong, and the others' stay
                if completion.error is not None and not overflows:
                    raise ValueError(f"a question to {describe_tenant(one.tenant)}: {completion.error}")
                yield one, Written("" if overflows else completion.text, len(completion.tokens), not overflows)
    finally:
        for key in waiting:
            engine.cancel(key)
        if waiting:
            list(engine.run())


def describe_tenant(tenant: Any) -> str:
    """A tenant in a message. A StackBank's are numbers, which say nothing to a user."""
    if tenant is None:
        return "the base model"
    return f"tenant {shorten(tenant)}" if isinstance(tenant, str) else "an adapter"


def as_request(id: Hashable, tenant: str | None, question: Generation) -> Request:
    """The question as a request to an Engine."""
    return Request(
        question.context,
        tenant,
        max_new_tokens=question.max_new_tokens,
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        seed=question.seed,
        stop=question.stop,
        id=id,
        stop_token_ids=question.stop_ids,
        strip=False,  # lm-eval compares the text with its white space; our own metrics strip
        alone=True,  # as batches do
    )
