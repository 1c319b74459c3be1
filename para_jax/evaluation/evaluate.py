"""evaluate: what a backbone with an adapter scores on held-out examples. Loss always, and the task's own metrics.

The factors are made of an example's prompt and never see an answer that is ranked. With shuffled prompts they are made
of another example's prompt: what the score loses then is what it owes to reading its own prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..config import ModelConfig, RunConfig, require
from ..data.batches import (
    assign_buckets,
    collate,
    cut_by_bucket,
    epoch_bits,
    example_lengths,
    full_batches,
    permutation,
    plan_buckets,
)
from ..data.examples import Example, encode_completion, encode_example, stop_token_ids
from ..data.records import Record, encode_records, load_records, split_records, task_of
from ..data.tasks import TASKS
from ..devices import say
from ..inference.generate import before_stop, generate_tokens
from ..inference.sampling import Sampling
from ..model import adjustments_for
from ..processes import gathered
from ..training.step import eval_nll
from .likelihood import of_contexts
from .metrics import LABEL_METRICS, measure
from .shapes import Shapes, batch_rows, padded_to, plan_shapes


class EvalTask(NamedTuple):
    """Examples and how answers to them are scored."""

    name: str
    records: list[Record]
    metric: str = "exact_match"
    """loss, or a name of metrics.py: accuracy is that of the likeliest of `choices`, and so are macro_f1 and matthews
    where there are choices; all others are of what greedy decoding writes"""
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 32
    batch_size: int = 16
    """rows of a batch, over all devices; rounded up to what the mesh divides"""
    examples: list[Example] | None = None
    """the records as token ids, where they are cut to a length; default: whole"""
    also: tuple[str, ...] = ()
    """more metrics of the same answers"""

    @property
    def ranks(self) -> bool:
        """Whether the answers are the likeliest of the choices, and not written."""
        return self.metric == "accuracy" or (self.metric in LABEL_METRICS and bool(self.choices))

    @property
    def writes(self) -> bool:
        """Whether the answers are what greedy decoding writes."""
        return self.metric != "loss" and not self.ranks


class Measured(NamedTuple):
    """One metric more of a task's answers; the fields are those of Score."""

    metric: str
    score: float
    stderr: float | None


class Five(NamedTuple):
    """A Score as a tuple."""

    name: str
    metric: str
    score: float
    """0 to 1 (matthews: -1 to 1), higher is better; for the metric "loss", the loss negated"""
    loss: float
    """nats a completion token, its end token included"""
    count: int
    """examples"""


class Score(Five):
    """A task's score: five values, by which scores are compared, and beside them what else is known of the answers."""

    stderr: float | None = None
    """the standard error of `score` over the draw of the examples; None for one example"""
    also: tuple[Measured, ...] = ()

    def __new__(cls, *values, stderr: float | None = None, also: tuple[Measured, ...] = (), **named):
        made = super().__new__(cls, *values, **named)
        made.stderr, made.also = stderr, also
        return made

    def values(self) -> dict[str, float]:
        """Every metric and its standard error by name: accuracy, accuracy_stderr; the loss without a standard error of
        its own where another metric is the score."""
        held = [] if self.metric == "loss" else [Measured(self.metric, self.score, self.stderr)]
        found = {"loss": self.loss}
        for metric, value, stderr in [*held, *self.also]:
            found |= {metric: value} | ({} if stderr is None else {f"{metric}_stderr": stderr})
        return found

    def record(self) -> dict:
        """The score for a JSON file."""
        return {
            **self._asdict(),
            "stderr": self.stderr,
            "also": {one.metric: {"score": one.score, "stderr": one.stderr} for one in self.also},
        }

    def __str__(self) -> str:
        main = Measured(self.metric, self.score, self.stderr)
        return (
            f"{self.name}: {', '.join(map(shown, [main, *self.also]))}, loss {self.loss:.4f} on {self.count} examples"
        )


def shown(one: Measured) -> str:
    return f"{one.metric} {one.score:.4f}" + ("" if one.stderr is None else f" ± {one.stderr:.4f}")


class Report(NamedTuple):
    scores: tuple[Score, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.scores))


def evaluate(
    model,
    adapters,
    tasks: Sequence[EvalTask],
    *,
    tokenizer,
    limit: int | None = None,
    shuffle_prompts: bool = False,
    seed: int = 0,
) -> Report:
    """The score of each task, with one adapter for every example (or None: the backbone).

    Args:
        limit: the most examples of each task, from its start.
        shuffle_prompts: give each example the factors that the adapter makes of another example's prompt, while what
            is scored and written follows its own. Which one is drawn by `seed`; nobody keeps its own.

    Raises ValueError where prompts are to be shuffled and a task has one example.
    """
    drawn = seed if shuffle_prompts else None
    encoded = [encode_task(task, tokenizer, limit) for task in tasks]
    shapes = {
        ranks: plan_shapes([one for one in encoded if one.task.ranks == ranks])
        for ranks in {task.ranks for task in tasks}
    }
    given = model, adapters, tokenizer
    return Report(tuple(score_encoded(*given, one, shapes[one.task.ranks], shuffle=drawn) for one in encoded))


def task_of_run(config: RunConfig, split: str, tokenizer) -> EvalTask | None:
    """A run's validation or test data with its metric; None where the run has no such data. Examples that are too
    long are cut or left out as data.truncate says, so that every score is over the same examples."""
    records = load_records(config.data, split)
    if records is None:
        return None
    known = TASKS.get(task_of(config.data) or "")
    metric = config.eval.metric or (known.metric if known else "exact_match")
    also = config.eval.also or (known.also if known and metric == known.metric else ())
    choices = config.eval.choices
    if known and not choices and {record.completion for record in records} <= set(known.choices):
        choices = known.choices  # rows that have a prompt of their own may have other answers
    if metric == "accuracy":
        choices = choices or tuple(sorted({record.completion for record in split_records(config.data, "train") or []}))
        require(
            2 <= len(choices) <= 100,
            "eval.choices",
            len(choices),
            "2 to 100 answers to rank; else use eval.metric=exact_match",
        )
        warn_of_unreachable(split, records, choices)
    kept = encode_records(records, tokenizer, config.data)
    answers = config.eval.max_new_tokens or (known.max_new_tokens if known else 32), config.eval.batch_size
    return EvalTask(split, kept.records, metric, choices, *answers, kept.examples, also)


def warn_of_unreachable(split: str, records: list[Record], choices: tuple[str, ...]) -> None:
    """Says it where examples have answers that are not among the choices: they count as wrong whatever is answered."""
    missed = [record for record in records if not set(record.references) & set(choices)]
    if missed:
        count, first = f"{len(missed)} of {len(records)} answers", f"{missed[0].completion!r} ({missed[0].place})"
        say(
            f"warning: {split}: {count} are not among the choices ({', '.join(choices)}) and count as wrong, the first "
            f"is {first}; eval.choices names others, eval.metric=exact_match scores free text"
        )


def evaluate_task(
    model,
    adapters,
    task: EvalTask,
    tokenizer,
    limit: int | None = None,
    shapes: Shapes | None = None,
    *,
    shuffle: int | None = None,
) -> Score:
    """One task's score.

    Args:
        shapes: planned with this task among others, whose programs it then shares; default: planned for it alone.
        shuffle: the seed by which examples get each other's factors.

    Raises ValueError for an example that the model has no tokens or too few positions for.
    """
    encoded = encode_task(task, tokenizer, limit)
    return score_encoded(model, adapters, tokenizer, encoded, shapes or plan_shapes([encoded]), shuffle=shuffle)


def score_encoded(model, adapters, tokenizer, encoded: Encoded, shapes: Shapes, *, shuffle: int | None = None) -> Score:
    task, examples, ranked = encoded
    check_room(model.config, task, examples, ranked)
    prompts = [example.prompt_ids for example in examples]
    read = None if shuffle is None else [prompts[i] for i in derangement(task.name, len(prompts), shuffle)]
    of_ranked = read and [*read, *(prompt for prompt in read for _ in task.choices if ranked)]
    whose = of_ranked and [tuple(prompt) for prompt in of_ranked]
    of_batch = adapters_of_batches(model, adapters, of_ranked)
    asked, rows = [*examples, *ranked], batch_rows(task.batch_size)
    found = likelihoods(model, of_batch, asked, rows, shapes, whose)
    written = range(len(examples)) if task.writes else []
    answers = written_answers(model, of_batch, asked, written, found.greedy, task, tokenizer, shapes)
    return score_of(task, found.nll, found.tokens, list(answers.values()))


def check_room(model: ModelConfig, task: EvalTask, examples: list[Example], ranked: list[Example]) -> None:
    """Raises ValueError where an example has a token that the model does not know, or more of them than positions."""
    known, most = model.vocab_size, model.max_positions
    new = task.max_new_tokens if task.writes else 0
    for i, (prompt, completion) in enumerate([*examples, *ranked]):
        record = task.records[i if i < len(examples) else (i - len(examples)) // len(task.choices)]
        where, largest, length = record.place or task.name, max(*prompt, *completion), len(prompt) + len(completion)
        require(largest < known, f"{where}: token id", largest, f"less than {known}, the model's tokens")
        needed = max(length, len(prompt) + new)
        require(
            needed <= most, f"{where}: tokens", needed, f"at most {most}, the model's positions; shorten the prompt"
        )


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
    ranked = rankings([example.prompt_ids for example in examples], records, task, tokenizer)
    return Encoded(task._replace(records=records), examples, ranked)


def score_of(task: EvalTask, nll: np.ndarray, tokens: np.ndarray, answers: list[str]) -> Score:
    """A task's score from the nats and the completion tokens of each record's own completion and then, where they are
    ranked, of each record's choices; else from the answers that were written."""
    count = len(task.records)
    own = nll[:count], tokens[:count]
    loss = float(own[0].sum() / own[1].sum())
    if task.metric == "loss":
        return Score(task.name, "loss", -loss, loss, count, stderr=error_of_ratio(*own))
    if task.ranks:
        nats = np.where(np.isnan(nll), np.inf, nll)[count:]  # argmin would take a NaN
        answers = [task.choices[i] for i in nats.reshape(count, -1).argmin(axis=1)]
    references = [record.references for record in task.records]
    (value, stderr), *more = [measure(metric, answers, references) for metric in (task.metric, *task.also)]
    also = tuple(Measured(name, *found) for name, found in zip(task.also, more, strict=True))
    return Score(task.name, task.metric, value, loss, count, stderr=stderr, also=also)


def rankings(prompts, records: list[Record], task: EvalTask, tokenizer) -> list[Example]:
    """Each prompt with each choice as its whole completion, end token included; the likeliest choice is the answer.
    None where the task's answers are written."""
    if not task.ranks:
        return []
    require(len(task.choices) > 1, f"{task.name}: choices", task.choices, "2 or more answers to rank")
    return [
        Example(prompt, encode_completion(tokenizer, record.prompt, choice))
        for prompt, record in zip(prompts, records, strict=True)
        for choice in task.choices
    ]


def written_answers(
    model,
    of_batch: Callable,
    examples: list[Example],
    asked: Sequence[int],
    greedy,
    task: EvalTask,
    tokenizer,
    shapes: Shapes,
) -> dict[int, str]:
    """What greedy decoding writes after the prompts of the examples that are asked for, by their indices; in batches
    and lengths as the task says.

    Args:
        of_batch: from a batch's rows, indices into `examples`, to their adapters.
        greedy: bool [examples], as in Likelihoods: there the completion is what is written, and nothing is decoded.
    """
    ends = {example.completion_ids[-1] for example in examples}  # a chat's end token of a turn
    stop = (*stop_token_ids(tokenizer, model.config.eos_token_ids), *ends)
    written = {i: before_stop(examples[i].completion_ids[: task.max_new_tokens], stop) for i in asked}
    left = sorted((i for i in asked if not greedy[i]), key=lambda i: len(examples[i].prompt_ids))
    rows, new = batch_rows(task.batch_size), task.max_new_tokens
    for start in tqdm(range(0, len(left), rows), desc=f"{task.name}: answers", leave=False, disable=None):
        members = np.resize(left[start : start + rows], rows)  # one compiled shape, also at the end
        prompts = [examples[i].prompt_ids for i in members]
        tokens = generate_tokens(
            model,
            of_batch(members),
            prompts,
            Sampling(new),
            stop_ids=stop,
            length=padded_to(max(map(len, prompts)), shapes.prompts),
            max_length=shapes.cache,
        )
        written |= dict(zip(members.tolist(), tokens, strict=True))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return {i: tokenizer.decode(ids, **options).strip() for i, ids in written.items()}


class Likelihoods(NamedTuple):
    """Of examples, one value each."""

    nll: np.ndarray
    """the summed negative log-likelihood of the completion, nats"""
    tokens: np.ndarray
    """the number of the completion's tokens"""
    greedy: np.ndarray
    """whether each token of the completion is the likeliest at its place: greedy decoding writes it"""


def likelihoods(
    model, of_batch: Callable, examples: list[Example], rows: int, shapes: Shapes, whose: Sequence | None = None
) -> Likelihoods:
    """How likely each example's completion is after its prompt.

    Args:
        of_batch: from a batch's rows, indices into `examples`, to their adapters.
        whose: what beside an example its likelihood depends on (default: nothing); equal ones are computed once.
    """
    whose = whose or [None] * len(examples)
    keys = [(tuple(prompt), tuple(ids), of) for (prompt, ids), of in zip(examples, whose, strict=True)]
    chosen = {key: i for i, key in enumerate(keys)}  # one example of each kind
    tokens = np.array([float(len(ids)) for _, ids in examples])
    found = Likelihoods(np.zeros(len(examples)), tokens, np.zeros(len(examples), bool))
    if shapes.of_prompts:
        contexts: dict[tuple, list[int]] = {}
        for (prompt, _, of), i in chosen.items():
            contexts.setdefault((prompt, of), []).append(i)
        after_prompts(found, model, of_batch, examples, list(contexts.values()), rows, shapes)
    else:
        of_rows(found, model, of_batch, examples, list(chosen.values()), rows, shapes.buckets)
    places = [chosen[key] for key in keys]
    return Likelihoods(found.nll[places], tokens, found.greedy[places])


def of_rows(found: Likelihoods, model, of_batch: Callable, examples: list[Example], chosen: list[int], rows, buckets):
    """Fills in the chosen examples, each in a row of its own."""
    batches = list(full_batches([examples[i] for i in chosen], rows, buckets))
    for members, batch in tqdm(batches, desc="likelihoods", leave=False, disable=None):
        indices = np.array(chosen)[members]
        completion = next(bucket.completion for bucket in buckets if bucket.length == batch.tokens.shape[1])
        nll, _, greedy = gathered(eval_nll(model, of_batch(np.resize(indices, rows)), batch, completion=completion))
        found.nll[indices], found.greedy[indices] = nll[: len(indices)], greedy[: len(indices)]


def after_prompts(
    found: Likelihoods,
    model,
    of_batch: Callable,
    examples: list[Example],
    contexts: list[list[int]],
    rows,
    shapes: Shapes,
):
    """Fills in the examples of each context, which share their prompt."""
    prompts = [examples[members[0]].prompt_ids for members in contexts]
    lengths = [len(prompt) for prompt in prompts]
    order = np.argsort(lengths, kind="stable")
    buckets, cache = shapes.buckets, shapes.buckets[-1].length
    batches = list(cut_by_bucket(order, assign_buckets(lengths, buckets), rows))
    for bucket, members in tqdm(batches, desc="likelihoods", leave=False, disable=None):
        adapters = of_batch(np.array([contexts[j][0] for j in np.resize(members, rows)]))
        asked = [(row, i) for row, j in enumerate(members) for i in contexts[j]]
        continuations = [(row, tuple(examples[i].completion_ids)) for row, i in asked]
        of_members = [prompts[j] for j in members]
        sizes = buckets[bucket].length, rows, cache, shapes.completions
        for k, scored in of_contexts(model, adapters, of_members, continuations, *sizes):
            found.nll[asked[k][1]], found.greedy[asked[k][1]] = -scored.logprob, scored.greedy


def error_of_ratio(nll: np.ndarray, tokens: np.ndarray) -> float | None:
    """The standard error of sum(nll) / sum(tokens), the examples being what is drawn: the deviation of what each one
    adds to the ratio (Cochran 1977, 6.3); None for one example."""
    count = len(nll)
    rest = nll - nll.sum() / tokens.sum() * tokens
    return None if count == 1 else float(math.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum())


# ----------------------------------------------------------------------------------------------------- shuffled prompts


def derangement(name: str, count: int, seed: int) -> np.ndarray:
    """Whose prompt each of `count` examples reads, int [count]: a cycle through all of them in an order drawn by the
    seed, in which none is followed by itself (Sattolo 1986)."""
    if count < 2:
        raise ValueError(f"{name}: {count} example; to shuffle prompts at least 2 are needed")
    order, followers = permutation(epoch_bits(seed), count), np.zeros(count, int)
    followers[order] = np.roll(order, -1)
    return followers


def adapters_of_batches(model, adapters, read: Sequence[list[int]] | None) -> Callable:
    """The function from a batch's rows, indices into `read`, to what stands for the adapters there: the adjustments
    made of these prompts, padded to few lengths; the adapters themselves where every row reads its own prompt."""
    if read is None:
        return lambda rows: adapters
    asked = [Example(prompt, []) for prompt in read]
    buckets = plan_buckets(asked, 3)

    def made(rows):
        chosen = [asked[i] for i in rows]
        bucket = buckets[assign_buckets(example_lengths(chosen), buckets).max()]
        batch = collate(chosen, bucket, len(chosen))
        return adjustments_for(model, adapters, batch.tokens, batch.prompt_length)

    return made
