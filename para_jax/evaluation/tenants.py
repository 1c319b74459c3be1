"""Many tenants' held-out examples scored together: each row with its own tenant's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..adapters.rows import Stack, pick
from ..data.batches import Bucket, full_batches, plan_buckets
from ..data.examples import Example, encode_example, stop_token_ids
from ..inference.generate import generate_tokens
from ..processes import gathered
from ..training.step import eval_nll
from .evaluate import EvalTask, Score, rankings, score_of


class Tasks:
    """The tasks of many tenants (None: it has none), in compiled shapes that do not depend on whose are scored."""

    def __init__(self, model, tokenizer, tasks: Sequence[EvalTask | None], limit: int | None = None):
        """
        Args:
            limit: the most examples of each task, from its start.
        """
        self.model, self.tokenizer = model, tokenizer
        self.encoded = {i: encode_task(task, tokenizer, limit) for i, task in enumerate(tasks) if task}
        self.buckets = shapes_of(list(self.encoded.values()))

    def scores(self, stack: Stack, slots: dict[int, int]) -> dict[int, Score]:
        """The scores of the tenants, each with the adapter in its slot of the stack (-1: the backbone); tenants without
        a task are left out."""
        asked = [tenant for tenant in slots if tenant in self.encoded]
        if not asked:
            return {}
        given = [slots[tenant] for tenant in asked], [self.encoded[tenant] for tenant in asked]
        found = evaluate_tenants(self.model, stack, *given, self.buckets, self.tokenizer)
        return dict(zip(asked, found, strict=True))


class Encoded(NamedTuple):
    """A task as token ids."""

    task: EvalTask
    examples: list[Example]
    ranked: list[Example]
    """each prompt with each choice, where choices are ranked"""


def encode_task(task: EvalTask, tokenizer, limit: int | None = None) -> Encoded:
    """The task's first `limit` examples (None: all)."""
    records = task.records[:limit]
    examples = task.examples or [encode_example(tokenizer, record.prompt, record.completion) for record in records]
    examples = examples[:limit]
    prompts = [example.prompt_ids for example in examples]
    return Encoded(task._replace(records=records), examples, rankings(prompts, records, task, tokenizer))


def shapes_of(tasks: Sequence[Encoded]) -> tuple[Bucket, ...]:
    """The compiled shapes of all tenants' examples: the same whoever is scored."""
    examples = [example for task in tasks for example in [*task.examples, *task.ranked]]
    return plan_buckets(examples, 3) if examples else ()


def evaluate_tenants(
    model, stack: Stack, slots: Sequence[int], tasks: Sequence[Encoded], buckets: Sequence[Bucket], tokenizer
) -> list[Score]:
    """The score of each task with the adapter in its slot of the stack; slot -1: the backbone.

    Args:
        slots: one a task.
        buckets: `shapes_of` the tasks that may ever be scored.
    """
    examples = [example for task in tasks for example in [*task.examples, *task.ranked]]
    owners = np.repeat(slots, [len(task.examples) + len(task.ranked) for task in tasks])
    nll, tokens = likelihoods(model, stack, owners, examples, buckets, tasks[0].task.batch_size)
    written = answers(model, stack, slots, tasks, tokenizer)
    found, start = [], 0
    for (task, own, ranked), texts in zip(tasks, written, strict=True):
        end = start + len(own) + len(ranked)
        found.append(score_of(task, task.records, nll[start:end], tokens[start:end], texts))
        start = end
    return found


def likelihoods(
    model, stack: Stack, owners: np.ndarray, examples: list[Example], buckets: Sequence[Bucket], rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each example's summed negative log-likelihood (nats) of its completion by its owner's adapter, and its number of
    completion tokens."""
    nll, tokens = np.zeros(len(examples)), np.zeros(len(examples))
    for indices, batch in full_batches(examples, rows, buckets):
        completion = next(bucket.completion for bucket in buckets if bucket.length == batch.tokens.shape[1])
        adapters = pick(stack, filled(owners[indices], rows))
        total, count = gathered(eval_nll(model, adapters, batch, completion=completion))
        nll[indices], tokens[indices] = total[: len(indices)], count[: len(indices)]
    return nll, tokens


def answers(model, stack: Stack, slots: Sequence[int], tasks: Sequence[Encoded], tokenizer) -> list[list[str]]:
    """What greedy decoding writes after each prompt of the tasks that need it; others get empty texts."""
    texts = [[""] * len(task.examples) for task in tasks]
    asked = [
        (t, i)
        for t, (task, own, ranked) in enumerate(tasks)
        if task.metric != "loss" and not ranked
        for i in range(len(own))
    ]
    asked.sort(key=lambda place: len(tasks[place[0]].examples[place[1]].prompt_ids))
    rows, stop = tasks[0].task.batch_size, stop_token_ids(tokenizer, model.config.eos_token_ids)
    for start in range(0, len(asked), rows):
        chosen = asked[start : start + rows]
        places = [chosen[k % len(chosen)] for k in range(rows)]  # one compiled shape, also for the last batch
        prompts = [tasks[t].examples[i].prompt_ids for t, i in places]
        adapters = pick(stack, np.array([slots[t] for t, _ in places]))
        longest = max(tasks[t].task.max_new_tokens for t, _ in chosen)
        written = generate_tokens(model, adapters, prompts, stop_ids=stop, max_new_tokens=longest)
        for (t, i), ids in zip(chosen, written, strict=False):
            texts[t][i] = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return texts


def filled(slots: np.ndarray, rows: int) -> np.ndarray:
    """The slots of a batch's rows; those that only fill it up have no adapter."""
    return np.concatenate([slots, np.full(rows - len(slots), -1)]).astype(np.int32)
