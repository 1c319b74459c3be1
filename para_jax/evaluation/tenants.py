"""Many tenants' held-out examples scored together: each row with its own tenant's adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..adapters.rows import Stack, pick
from .evaluate import Encoded, EvalTask, Score, encode_task, likelihoods, score_of, written_answers
from .shapes import Shapes, batch_rows, plan_shapes


class Tasks:
    """The tasks of many tenants (None: it has none), in compiled shapes that do not depend on whose are scored."""

    def __init__(self, model, tokenizer, tasks: Sequence[EvalTask | None], limit: int | None = None):
        """
        Args:
            limit: the most examples of each task, from its start.
        """
        self.model, self.tokenizer = model, tokenizer
        self.encoded = {i: encode_task(task, tokenizer, limit) for i, task in enumerate(tasks) if task}
        self.shapes = plan_shapes(list(self.encoded.values())) if self.encoded else None

    def scores(self, stack: Stack, slots: dict[int, int]) -> dict[int, Score]:
        """The scores of the tenants, each with the adapter in its slot of the stack (-1: the backbone); tenants without
        a task are left out."""
        asked = [tenant for tenant in slots if tenant in self.encoded]
        if self.shapes is None or not asked:
            return {}
        given = [slots[tenant] for tenant in asked], [self.encoded[tenant] for tenant in asked]
        found = evaluate_tenants(self.model, stack, *given, self.shapes, self.tokenizer)
        return dict(zip(asked, found, strict=True))


def share_shapes(*parts: Tasks) -> None:
    """Plans one set of shapes for several Tasks, such as a run's validation and test, which then share programs."""
    encoded = [one for part in parts for one in part.encoded.values()]
    shapes = plan_shapes(encoded) if encoded else None
    for part in parts:
        part.shapes = shapes


def evaluate_tenants(
    model, stack: Stack, slots: Sequence[int], tasks: Sequence[Encoded], shapes: Shapes, tokenizer
) -> list[Score]:
    """The score of each task with the adapter in its slot of the stack; slot -1: the backbone.

    Args:
        slots: one a task; tasks of one run, which share batch size and most new tokens.
        shapes: planned over all the tasks that may ever be scored.
    """
    examples = [example for task in tasks for example in [*task.examples, *task.ranked]]
    owners = np.repeat(slots, [len(task.examples) + len(task.ranked) for task in tasks])
    of_batch, first = adapters_of(stack, owners), tasks[0].task
    found = likelihoods(model, of_batch, examples, batch_rows(first.batch_size), shapes, owners.tolist())
    starts = np.cumsum([0, *(len(task.examples) + len(task.ranked) for task in tasks)]).tolist()
    own = [range(start, start + len(task.examples)) for start, task in zip(starts, tasks, strict=False)]
    asked = [(slot, tuple(prompt)) for slot, (prompt, _) in zip(owners.tolist(), examples, strict=True)]
    written = [i for task, of_task in zip(tasks, own, strict=True) if task.task.writes for i in of_task]
    once = {asked[i]: i for i in written}  # a sweep asks the backbone the same for each of its combinations
    asked_once = list(once.values())
    texts = written_answers(model, of_batch, examples, asked_once, found.greedy, first, tokenizer, shapes)
    scores = []
    for task, of_task, start, end in zip(tasks, own, starts, starts[1:], strict=False):
        answers = [texts[once[asked[i]]] for i in of_task] if task.task.writes else []
        scores.append(score_of(task.task, found.nll[start:end], found.tokens[start:end], answers))
    return scores


def adapters_of(stack: Stack, owners: np.ndarray) -> Callable:
    """From a batch's rows, indices into `owners`, to their adapters."""
    return lambda rows: pick(stack, owners[rows])
