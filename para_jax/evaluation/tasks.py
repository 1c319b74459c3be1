"""EvalTask: held-out records with the metric that scores them. Tasks come from a run's config, a file or a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..backbone.load import load_model_config
from ..config import DataSection, ModelConfig, RunConfig
from ..data.examples import Example, answer_opening, encode_completion, encode_example
from ..data.given import rows_split
from ..data.records import Form, Record, load_records, read_records, records_of, split_records
from ..data.rows import split_file
from ..data.sources import task_of
from ..data.tasks import TASKS, Task
from ..data.training_data import encode_records, report
from ..io.messages import say, warn
from .accepted_answers import with_learnt_forms
from .defaults import (
    RANKED,
    ScoringRule,
    answer_length,
    completions_in,
    different_answers,
    is_there,
    longest_completion,
    scoring_rule,
    without_answer,
)
from .metrics import LABEL_METRICS, METRICS, single_spaced
from .questions import Generation, Likelihood, Question
from .task_file import named_file


class EvalTask(NamedTuple):
    """Examples, and how answers to them are scored."""

    name: str
    records: list[Record]
    metric: str = "exact_match"
    """loss, or a name of metrics.py. accuracy takes the likeliest of `choices` as the answer, and so do macro_f1 and
    matthews if there are choices. All other metrics score what greedy decoding writes."""
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 32
    examples: list[Example] | None = None
    """the records as token ids, if they are cut to a length; default: whole"""
    also: tuple[str, ...] = ()
    """more metrics of the same answers"""
    cut: int = 0
    """how many of the examples were too long and lost the start of their prompts"""
    skipped: int = 0
    """how many more examples the data has, which are too long or beyond a limit"""

    @property
    def ranks(self) -> bool:
        """Whether the answers are the likeliest of the choices, and not written."""
        return self.metric == "accuracy" or (self.metric in LABEL_METRICS and bool(self.choices))

    @property
    def writes(self) -> bool:
        """Whether the answers are what greedy decoding writes."""
        return not self.ranks and (self.metric != "loss" or bool(self.also))


class EncodedTask(NamedTuple):
    """A task as token ids."""

    task: EvalTask
    examples: list[Example]
    ranked: list[Example]
    """each prompt with each choice as its whole completion, end token included, if choices are ranked"""
    openings: Sequence[str] = ()
    """what is written before the answer to each example, if answers are written"""

    def questions(self, reads: Sequence[Sequence[int]] | None = None) -> list[Question]:
        """The likelihood of each record's completion; then of each of its choices, or the text after its prompt.

        Args:
            reads: for each example, the tokens that an adapter makes its factors from; None: its own prompt.
        """
        own = [None] * len(self.examples) if reads is None else [tuple(ids) for ids in reads]
        choices = len(self.ranked) // max(len(self.examples), 1)
        read = [*own, *(ids for ids in own for _ in range(choices))]
        asked: list[Question] = [
            Likelihood(tuple(prompt), tuple(end), ids)
            for (prompt, end), ids in zip([*self.examples, *self.ranked], read, strict=True)
        ]
        if self.task.writes:
            new = self.task.max_new_tokens
            asked += [
                Generation(tuple(prompt), new, stop_ids=(end[-1],), reads=ids)  # in a chat the end of a turn
                for (prompt, end), ids in zip(self.examples, own, strict=True)
            ]
        return asked


def encode_task(task: EvalTask, tokenizer, limit: int | None = None) -> EncodedTask:
    """The task's first `limit` examples (None: all)."""
    records = task.records[:limit]
    examples = task.examples or [encode_example(tokenizer, record.prompt, record.completion) for record in records]
    examples = examples[:limit]
    ranked = [
        Example(example.prompt_ids, encode_completion(tokenizer, record.prompt, choice))
        for example, record in zip(examples, records, strict=True)
        for choice in (task.choices if task.ranks else ())
    ]
    openings = [answer_opening(tokenizer, record.prompt) for record in records] if task.writes else []
    if task.writes:
        records = with_learnt_forms(tokenizer, records, examples, openings)
    return EncodedTask(task._replace(records=records), examples, ranked, openings)


def check_room(model: ModelConfig, encoded: EncodedTask) -> None:
    """Raises ValueError if an example has a token that the model does not know, or more tokens than positions."""
    task, examples, ranked, _ = encoded
    known, most = model.vocab_size, model.max_positions
    new = task.max_new_tokens if task.writes else 0
    for i, (prompt, completion) in enumerate([*examples, *ranked]):
        record = task.records[i if i < len(examples) else (i - len(examples)) // len(task.choices)]
        where, largest = record.place or task.name, max(*prompt, *completion)
        if largest >= known:
            raise ValueError(f"{where}: token id {largest}: the model's tokens are 0 to {known - 1}")
        needed = max(len(prompt) + len(completion), len(prompt) + new)  # scored and written, whichever is longer
        if needed > most:
            raise ValueError(f"{where}: {needed} tokens do not fit the model's {most} positions; shorten the prompt")


# ---------------------------------------------------------------------------------------------------- of a run's config


def warn_of_replaced(source: str | None, records: list[Record]) -> None:
    """Warns if the rows of the test data are those of a data set's validation split, which the source does not name."""
    place = records[0].place.rpartition("[")[0]
    if source and "validation" not in source and place.endswith((":validation", "/validation")):
        warn(f"{source}: there is no test split with labels; the validation split is scored as the test data")


def task_of_run(
    config: RunConfig,
    split: str,
    tokenizer,
    by: ScoringRule | None = None,
    *,
    model: ModelConfig | None = None,
    rank_labels: bool = False,
) -> EvalTask | None:
    """A run's validation or test data with its metric; None if the run has no such data. Examples that are too long are
    cut or left out as data.truncate says, so that every score is over the same examples.

    Args:
        by: how it is scored; default: what `scoring_rule` finds.
        model: of the backbone; None: it is read.
        rank_labels: macro_f1 and matthews without choices rank the labels, as `file_task` does.
    """
    records = load_records(config.data, split)
    if records is None:
        return None
    if split == "test":
        warn_of_replaced(config.data.test, records)
    of_model = cache(lambda: model or load_model_config(config.backbone.source))  # many tasks don't ask for it
    section = config.data if config.data.max_seq_length else with_limit(config.data, of_model())
    known = TASKS.get(task_of(config.data) or "")
    if by is None:
        by = scoring_rule(config, tokenizer, model=model)
    metric, also, choices, new, *_ = by
    if known and not choices and has_only_choices_of(known, records):
        choices = known.choices  # rows with a prompt of their own may have other answers
    if metric == "accuracy":
        if not choices:
            choices = different_answers(record.completion for record in split_records(config.data, "train") or [])
        if not 2 <= len(choices) <= 100:
            raise ValueError(
                f"eval.choices has {len(choices)} answers; accuracy ranks 2 to 100. Use eval.metric=exact_match instead"
            )
    elif rank_labels and metric in LABEL_METRICS and not choices:
        held = split_records(config.data, "train") if is_there(config.data) else None
        found = different_answers(record.completion for record in held or records)
        choices = found if 2 <= len(found) <= RANKED else ()
    task = EvalTask(split, records, metric, choices, new, also=also)
    if task.ranks:
        warn_of_unreachable(split, records, choices)
    room = {}
    if section.truncate == "left" and (task.writes or task.ranks):  # the answer must fit too
        room = dict(answer=answer_room(task, tokenizer), positions=of_model().max_positions)
    kept = encode_records(records, tokenizer, section, **room)
    task = task._replace(records=kept.records, examples=kept.examples, cut=kept.cut, skipped=kept.skipped)
    chosen = config.eval.max_new_tokens is None and not known  # a number of the user or the task stays as it is
    return with_room(task, kept.examples, of_model().max_positions) if chosen and task.writes else task


def with_room(task: EvalTask, examples: Sequence[Example], room: int) -> EvalTask:
    """The task with answers that fit the model's positions after its longest prompt."""
    longest = max(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    fits = max(1, min(task.max_new_tokens, room - len(examples[longest].prompt_ids)))
    cut = sum(len(example.completion_ids) > fits for example in examples)
    said = f"{task.name}: at most {fits} tokens are written, and {cut} of {len(examples)} expected answers have more"
    if cut:
        where = task.records[longest].place
        warn(f"{said}; set eval.max_new_tokens, or shorten the prompt of {where} (the model has {room} positions)")
    return task._replace(max_new_tokens=fits)


def with_limit(section: DataSection, model: ModelConfig) -> DataSection:
    """The section with a number as max_seq_length: null allows as many tokens as the model has positions."""
    return section if section.max_seq_length else replace(section, max_seq_length=model.max_positions)


def say_long(split: str, tasks: Iterable[EvalTask | None]) -> None:
    """Says how many examples of a split are too long, of all these tasks together; nothing if none is."""
    found = [task for task in tasks if task is not None]
    cut, skipped = sum(task.cut for task in found), sum(task.skipped for task in found)
    if cut or skipped:
        say(f"{split} data: {report(sum(len(task.records) for task in found), cut, skipped)}")


def warn_of_unreachable(split: str, records: list[Record], choices: tuple[str, ...]) -> None:
    """Warns of examples whose answers are not among the choices: they count as wrong whatever is answered."""
    missed = without_answer(records, choices)
    if missed:
        count, first = f"{len(missed)} of {len(records)} answers", f"{missed[0].completion!r} ({missed[0].place})"
        warn(
            f"{split}: {count} are not among the choices ({', '.join(choices)}) and count as wrong, the first "
            f"is {first}; eval.choices names others, the metric exact_match scores free text"
        )


# ------------------------------------------------------------------------------------------------ of a file or a folder


def file_task(text: str, tokenizer, config: ModelConfig, *, split: str, limit: int | None) -> EvalTask | None:
    """The task that [TASK=]FILE_OR_FOLDER[:METRIC] names; None if there is no such file or folder.

    TASK is a name of data/tasks.py; its columns, metric and choices then apply. Without TASK and METRIC, rows that all
    have a label are scored by accuracy over the labels' completions if there are at most RANKED; other rows by exact
    match, or by the loss and f1 if they are free text.
    """
    named = named_file(text, split)
    if named is None:
        return None
    name, path, file, metric = named
    records, known = read_records(file, task=name), TASKS[name] if name else None
    title = name or (path.stem if path.is_file() else path.resolve().name)
    return task_of_records(f"task {text}", title, records, metric, known, file, tokenizer, config, limit)


def rows_task(name: str, rows: Any, tokenizer, config: ModelConfig, *, limit: int | None) -> EvalTask:
    """The task of rows that a program gives: a list of dicts, a DataFrame or the like. It is scored as a file of them.

    Args:
        name: of the task, as NAME or NAME:METRIC.
    """
    title, metric = name, None
    if name.rpartition(":")[2] in ("loss", *METRICS, *LABEL_METRICS):
        title, _, metric = name.rpartition(":")
    label = f"tasks[{name!r}]"
    records = list(records_of(rows_split(label, rows), Form()))
    return task_of_records(label, title, records, metric, None, None, tokenizer, config, limit)


def task_of_records(
    where: str,
    name: str,
    records: list[Record],
    metric: str | None,
    known: Task | None,
    file: Path | None,
    tokenizer,
    config: ModelConfig,
    limit: int | None,
) -> EvalTask:
    """The task of a file's or a program's records, whose metric follows from them if none is named.

    Args:
        where: names the task in what is said.
        known: a task of data/tasks.py, whose metric and choices apply.
    """
    metric = metric or (known.metric if known else None)
    also = known.also if known and metric == known.metric else ()
    choices = choices_of(file, records, known) if metric in (None, "accuracy", *LABEL_METRICS) else ()
    if metric is None:
        labelled = all(record.label is not None for record in records)  # then the completions are their texts
        metric = "accuracy" if labelled and 2 <= len(choices) <= RANKED else "exact_match"
        if metric == "exact_match" and completions_in(records).free_text:
            metric, also = "loss", ("f1",)
    if metric == "accuracy" and not 2 <= len(choices) <= 100:  # each choice is scored for each example
        raise ValueError(f"{where}: {len(choices)} answers; accuracy ranks 2 to 100. Choose another metric")
    ranked = metric == "accuracy" or (metric in LABEL_METRICS and len(choices) <= RANKED)
    if ranked:
        warn_of_unreachable(where, records[:limit], choices)
    task = EvalTask(
        name,
        records[:limit],
        metric,
        choices if ranked else (),
        max_new_tokens=known.max_new_tokens if known else 32,
        also=also,
    )
    if task.writes and not known:
        expected = longest_completion(records, tokenizer)
        task = task._replace(max_new_tokens=answer_length(expected, config))
        say(f"{where}: at most {task.max_new_tokens} tokens per answer; the longest expected one has {expected}")
    room, section = answer_room(task, tokenizer), DataSection(max_seq_length=config.max_positions, truncate="left")
    kept = encode_records(task.records, tokenizer, section, answer=room, positions=config.max_positions)
    if kept.cut:
        say(
            f"{where}: {kept.cut} of {len(kept.records)} prompts lost their start, to fit the model's "
            f"{config.max_positions} positions with their answers"
        )
    return task._replace(examples=kept.examples, skipped=len(records) - len(kept.examples))


def with_metrics_in_names(tasks: Sequence[EvalTask]) -> list[EvalTask]:
    """The tasks; those that share a name are named TASK:METRIC."""
    times = Counter(task.name for task in tasks)
    return [task._replace(name=f"{task.name}:{task.metric}") if times[task.name] > 1 else task for task in tasks]


def answer_room(task: EvalTask, tokenizer) -> int:
    """Tokens to leave free behind a prompt for the text or the longest choice, if they are more than its own
    completion's."""
    if not (task.writes or task.ranks):
        return 0
    ends = (encode_completion(tokenizer, task.records[0].prompt, choice) for choice in task.choices)
    return max(map(len, ends)) if task.ranks else task.max_new_tokens


def choices_of(file: Path | None, records: list[Record], known: Task | None) -> tuple[str, ...]:
    """The answers that may be ranked: the task's, if the data has no other; else the different completions of the
    training data next to the file (train.jsonl), or of the file itself."""
    if known and known.choices and has_only_choices_of(known, records):
        return known.choices
    train = split_file(file.parent, "train") if file else None
    held = read_records(train, task=known.name if known else None) if train else records
    return different_answers(record.completion for record in held)


def has_only_choices_of(task: Task, records: Iterable[Record]) -> bool:
    """Whether each record's completion is a choice of the task."""
    return {single_spaced(record.completion) for record in records} <= set(map(single_spaced, task.choices))
