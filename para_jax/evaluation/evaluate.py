"""evaluate: what a backbone with an adapter scores on held-out examples. Loss always, and the task's own metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..config import RunConfig, require
from ..data.batches import full_batches, plan_buckets
from ..data.examples import Example, encode_completion, encode_example, stop_token_ids
from ..data.sources import Record, encode_records, load_records, task_of
from ..data.tasks import TASKS
from ..inference.generate import generate_tokens
from ..processes import gathered
from ..training.step import eval_nll
from .metrics import score


class EvalTask(NamedTuple):
    """Examples and how answers to them are scored."""

    name: str
    records: list[Record]
    metric: str = "exact_match"
    """loss | exact_match | f1 | squad (all by greedy decoding) | accuracy (the likeliest of `choices`)"""
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 32
    batch_size: int = 16
    examples: list[Example] | None = None
    """the records as token ids, where they are cut to a length; default: whole"""


class Score(NamedTuple):
    name: str
    metric: str
    score: float
    """0 to 1, higher is better; for the metric "loss", the loss negated"""
    loss: float
    """nats a completion token, its end token included"""
    count: int
    """examples"""


class Report(NamedTuple):
    scores: tuple[Score, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{s.name}: {s.metric} {s.score:.4f}, loss {s.loss:.4f} on {s.count} examples" for s in self.scores
        )


def evaluate(model, adapters, tasks: Sequence[EvalTask], *, tokenizer, limit: int | None = None) -> Report:
    """The score of each task, with one adapter for every example (or None: the backbone).

    Args:
        limit: the most examples of each task, from its start.
    """
    return Report(tuple(evaluate_task(model, adapters, task, tokenizer, limit) for task in tasks))


def task_of_run(config: RunConfig, split: str, tokenizer) -> EvalTask | None:
    """A run's validation or test data with its metric; None where the run has no such data. Examples that are too
    long are cut or left out as data.truncate says, so that every score is over the same examples."""
    records = load_records(config.data, split)
    if records is None:
        return None
    known = TASKS.get(task_of(config.data) or "")
    metric = config.eval.metric or (known.metric if known else "exact_match")
    choices = config.eval.choices or (known.choices if known else ())
    if metric == "accuracy":
        choices = choices or tuple(sorted({record.completion for record in load_records(config.data, "train") or []}))
        require(
            2 <= len(choices) <= 100,
            "eval.choices",
            len(choices),
            "2 to 100 answers to rank; else use eval.metric=exact_match",
        )
    kept = encode_records(records, tokenizer, config.data)
    answers = config.eval.max_new_tokens, config.eval.batch_size
    return EvalTask(split, kept.records, metric, choices, *answers, kept.examples)


def evaluate_task(model, adapters, task: EvalTask, tokenizer, limit: int | None = None) -> Score:
    records = task.records[:limit]
    examples = task.examples or [encode_example(tokenizer, record.prompt, record.completion) for record in records]
    examples = examples[:limit]
    prompts, count = [example.prompt_ids for example in examples], len(records)
    ranked = rankings(prompts, records, task.choices, tokenizer) if task.metric == "accuracy" else []
    nll, tokens = likelihoods(model, adapters, [*examples, *ranked], task.batch_size)
    loss = float(nll[:count].sum() / tokens[:count].sum())
    if task.metric == "loss":
        return Score(task.name, "loss", -loss, loss, count)
    if task.metric == "accuracy":
        answers = [task.choices[i] for i in nll[count:].reshape(count, -1).argmin(axis=1)]
    else:
        answers = written_answers(model, adapters, prompts, task, tokenizer)
    return Score(task.name, task.metric, score(task.metric, answers, [r.references for r in records]), loss, count)


def rankings(prompts, records: list[Record], choices: Sequence[str], tokenizer) -> list[Example]:
    """Each prompt with each choice as its whole completion, end token included; the likeliest choice is the answer."""
    return [
        Example(prompt, encode_completion(tokenizer, record.prompt, choice))
        for prompt, record in zip(prompts, records, strict=True)
        for choice in choices
    ]


def written_answers(model, adapters, prompts, task: EvalTask, tokenizer) -> list[str]:
    """What greedy decoding writes after each prompt."""
    answers = [""] * len(prompts)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    stop = stop_token_ids(tokenizer, model.config.eos_token_ids)
    for start in tqdm(range(0, len(order), task.batch_size), desc=f"{task.name}: answers", leave=False, disable=None):
        chosen = order[start : start + task.batch_size]
        filled = [prompts[i] for i in np.resize(chosen, task.batch_size)]  # one compiled shape, also for the last batch
        written = generate_tokens(model, adapters, filled, stop_ids=stop, max_new_tokens=task.max_new_tokens)
        for i, tokens in zip(chosen, written, strict=False):
            answers[i] = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return answers


def likelihoods(model, adapters, examples: list[Example], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Each example's summed negative log-likelihood (nats) of its completion, and its number of completion tokens.
    Equal examples are computed once."""
    keys = [(tuple(prompt), tuple(completion)) for prompt, completion in examples]
    unique = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    different = [Example(list(prompt), list(completion)) for prompt, completion in unique]
    nll, tokens = np.zeros(len(different)), np.zeros(len(different))
    buckets = plan_buckets(different, 3)
    batches = list(full_batches(different, rows, buckets))
    for indices, batch in tqdm(batches, desc="likelihoods", leave=False, disable=None):
        completion = next(bucket.completion for bucket in buckets if bucket.length == batch.tokens.shape[1])
        total, count = gathered(eval_nll(model, adapters, batch, completion=completion))
        nll[indices], tokens[indices] = total[: len(indices)], count[: len(indices)]
    places = [unique[key] for key in keys]
    return nll[places], tokens[places]
