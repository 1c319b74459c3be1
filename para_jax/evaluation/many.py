"""Many adapters, and the base model, on many tasks in one pass: `para-jax evaluate --backbone --adapters --tasks`.

Questions of all tasks are collected once, answered for all adapters (mixed.py), and scored task by task: our own tasks
here, lm-eval's by lm-eval. What was answered lies in the output folder's journal at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import atomic, devices
from ..adapters.bank import AdapterBank
from ..config import DataSection, ModelConfig, expanded, require
from ..data.examples import Example, encode_completion
from ..data.records import Record, encode_records, read_records
from ..data.tasks import TASKS, Task
from .answers import Pass
from .evaluate import EvalTask, error_of_ratio, rankings, score_of
from .journal import Journal
from .metrics import LABEL_METRICS, METRICS
from .questions import Answer, Asked, Generation, Likelihood, Scored, Written, backbone_content

if TYPE_CHECKING:
    from .harness.tasks import HarnessTask

BASE = "base"
#: Those of lm-eval's command line, with which its tasks draw few-shot examples.
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "fewshot_seed": 1234}
#: Labels that are ranked by their likelihoods; of more than these the answer is written, and compared.
RANKED = 20
#: In an output folder: every answer, as it came.
ANSWERS_FILE = "answers.jsonl"
#: The most bytes of a results file.
LARGEST = 1 << 26
RESULTS = "results of an evaluation. Choose another --output, or remove the file"
INSTALL = "lm-eval is not installed; its tasks need it: pip install 'para_jax[eval]'"


class Settings(NamedTuple):
    """How tasks are asked."""

    limit: int | None = None
    """the most examples of each task, from its start"""
    rows: int = 16
    """of a batch"""
    seed: int = 0
    """of sampled answers"""
    include_path: Path | None = None
    """a folder of further task files for lm-eval"""
    fewshot: int | None = None
    """examples in each context of lm-eval's tasks; default: their own number"""
    chat: bool = False
    """put lm-eval's contexts into the tokenizer's chat template"""
    split: str = "test"
    """of our own tasks: the file of a folder"""


class Own(NamedTuple):
    """One of our tasks, as questions."""

    task: EvalTask
    asked: list[Asked]
    original: int
    """examples that the file holds"""
    file: Path

    def results(self, answer: Callable[[Asked], Answer | None]) -> dict:
        """The task's part of the results, in lm-eval's layout."""
        name, values = self.task.name, self.values([answer(one) for one in self.asked])
        found: dict = {"alias": name, "sample_len": len(self.task.records)}
        for metric, (value, error) in values.items():
            found |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
        size = {"original": self.original, "effective": len(self.task.records)}
        return {
            "results": {name: found},
            "group_subtasks": {name: []},
            "configs": {name: {"task": name, "metric": self.task.metric, "choices": list(self.task.choices)}},
            "versions": {name: None},
            "n-shot": {name: 0},
            "higher_is_better": {name: {metric: metric != "loss" for metric in values}},
            "n-samples": {name: size},
        }

    def values(self, answers: Sequence[Answer | None]) -> dict[str, tuple[float, float | None]]:
        """{metric: (value, standard error)}; the loss is in nats a completion token."""
        count = len(self.task.records)
        nats = np.array([-one.logprob for one in answers if isinstance(one, Scored)])
        tokens = np.array([len(one.continuation) for one in self.asked if isinstance(one, Likelihood)])
        texts = [one.text.strip() for one in answers if isinstance(one, Written)]
        score = score_of(self.task, nats, tokens, texts)
        of_task = [] if self.task.metric == "loss" else [(score.metric, score.score, score.stderr), *score.also]
        values = {metric: (value, error) for metric, value, error in of_task}
        return values | {"loss": (score.loss, error_of_ratio(nats[:count], tokens[:count]))}


def read_tasks(tasks: Sequence[str], tokenizer, config: ModelConfig, settings: Settings) -> list[Own | Harness]:
    """The tasks' questions. Nothing of the model is read but its config, so that a wrong name costs no waiting.

    Args:
        tasks: [TASK=]FILE_OR_FOLDER[:METRIC], our own, or names of lm-eval's tasks. Several metrics of one file are
            tasks of their own, named TASK:METRIC.
    """
    own = [own_task(text, tokenizer, config, settings) for text in tasks]
    names = [text for text, found in zip(tasks, own, strict=True) if found is None]
    held: list = with_metrics_in_names([found for found in own if found is not None])
    require_distinct("--tasks", [*names, *(one.task.name for one in held)])
    if names:
        loaded = of_harness(names, tokenizer, config, settings)
        require_distinct("--tasks", [*dict.fromkeys([*names, *members(loaded)]), *(one.task.name for one in held)])
        held += loaded
    return held


def evaluate_many(
    model,
    bank: AdapterBank | None,
    tokenizer,
    tasks: Sequence[Own | Harness],
    output: Path,
    settings: Settings,
    sources: dict[str, str],
    about: dict,
) -> str:
    """Evaluates every tenant of the bank, and the base model, on tasks; the Markdown table.

    The folder `output` gets answers.jsonl as they come, and at the end a JSON file a tenant, in lm-eval's layout, and
    table.md. The same call on the same folder goes on where one was killed.

    Args:
        tasks: as read_tasks gives them, with the same settings.
        sources, about: for the records: where each tenant comes from, and what was asked for.
    """
    tenants = [None, *(bank.names if bank is not None else ())]
    require(BASE not in tenants, "tenant", BASE, "another name, for this is the base model")
    content, files = backbone_content(model), file_names([tenant or BASE for tenant in tenants])
    check_results(output, list(files.values()), content)
    asking = Pass(model, bank, tokenizer, content, Journal(output / ANSWERS_FILE))
    questions = [(tenant, asked) for one in tasks for asked in one.asked for tenant in tenants]
    begun = time.time()
    answers = dict(zip(questions, asking.answer(questions, rows=settings.rows), strict=True))
    by_tenant: dict[str, dict] = {}
    for tenant in tenants:
        made: dict = {}
        for one in tasks:
            for part, values in one.results(lambda asked, tenant=tenant: answers.get((tenant, asked))).items():
                made.setdefault(part, {}).update(values)
        made |= records(asking, tenant, settings, about | {"adapter": sources.get(tenant or BASE)}, begun)
        by_tenant[tenant or BASE] = made
    for name, made in by_tenant.items():
        atomic.write_text(output / files[name], json.dumps(made, indent=2, default=str) + "\n")
    others = sorted({path.name for path in output.glob("*.json")} - set(files.values()))
    if others:
        devices.say(f"{output} also holds what earlier calls wrote, and table.md does not: {', '.join(others)}")
    text = table(by_tenant, asking, settings)
    atomic.write_text(output / "table.md", text + "\n")
    return text


def own_task(text: str, tokenizer, config: ModelConfig, settings: Settings) -> Own | None:
    """The task that [TASK=]FILE_OR_FOLDER[:METRIC] names; None where no such file or folder is there.

    TASK is a name of data/tasks.py, whose columns, metric and choices then count. Without it and METRIC, rows that all
    have a label are scored by accuracy over the labels' completions, where there are at most RANKED, others by exact
    match.
    """
    name, path, metric = parsed(text)
    if path is None:
        if re.search(r"[/\\~]|\.jsonl", text):
            raise ValueError(f"--tasks {text!r}: no such file or folder")
        return None
    require(name is None or name in TASKS, "--tasks", text, "a task of " + ", ".join(TASKS) + " before the =")
    file = path / f"{settings.split}.jsonl" if path.is_dir() else path
    require(file.is_file(), "--tasks", text, f"a .jsonl file, or a folder with {settings.split}.jsonl")
    records, known = read_records(file, task=name), TASKS[name] if name else None
    metric = metric or (known.metric if known else None)
    choices = choices_of(file, records, known) if metric in (None, "accuracy", *LABEL_METRICS) else ()
    if metric is None:
        labelled = all(record.label is not None for record in records)
        metric = "accuracy" if labelled and 2 <= len(choices) <= RANKED else "exact_match"
    expected = ["loss", *METRICS, *LABEL_METRICS]
    require(metric in expected, "--tasks: metric", metric, "one of " + ", ".join(expected))
    ranked = metric == "accuracy" or (metric in LABEL_METRICS and len(choices) <= RANKED)
    fits = 2 <= len(choices) <= 100
    require(fits or metric != "accuracy", "--tasks: answers", len(choices), "2 to 100 to rank, or another metric")
    task = EvalTask(
        name or (path.stem if path.is_file() else path.resolve().name),
        records[: settings.limit],
        metric,
        choices if ranked else (),
        max_new_tokens=known.max_new_tokens if known else 32,
        also=known.also if known and metric == known.metric else (),
    )
    longest = config.max_positions - answer_room(task, tokenizer)
    kept = encode_records(task.records, tokenizer, DataSection(max_seq_length=longest, truncate="left"))
    if kept.cut:
        devices.say(f"--tasks {text}: {kept.cut} of {len(kept.records)} prompts lost their start, to {longest} tokens")
    return Own(task, questions_of(task, kept.examples, tokenizer), len(records), file.resolve())


def with_metrics_in_names(held: list[Own]) -> list[Own]:
    """The tasks; those that score one file by several metrics are named TASK:METRIC."""
    metrics: dict[tuple, set[str]] = {}
    for one in held:
        metrics.setdefault((one.task.name, one.file), set()).add(one.task.metric)
    return [
        one._replace(task=one.task._replace(name=f"{one.task.name}:{one.task.metric}"))
        if len(metrics[one.task.name, one.file]) > 1
        else one
        for one in held
    ]


def answer_room(task: EvalTask, tokenizer) -> int:
    """Tokens that are left free behind a prompt beside its own completion: for what is written or is ranked."""
    if task.metric == "loss":
        return 0
    ends = (encode_completion(tokenizer, task.records[0].prompt, choice) for choice in task.choices)
    return max(map(len, ends)) if task.ranks else task.max_new_tokens


def choices_of(file: Path, records: list[Record], known: Task | None) -> tuple[str, ...]:
    """The answers that may be ranked: the task's, where the data has no other; else the different completions of the
    train.jsonl beside the file, or of the file itself."""
    if known and known.choices and {record.completion for record in records} <= set(known.choices):
        return known.choices
    beside = file.with_name("train.jsonl")
    held = read_records(beside, task=known.name if known else None) if beside.is_file() else records
    return tuple(sorted({record.completion for record in held}))


def parsed(text: str) -> tuple[str | None, Path | None, str | None]:
    """TASK, path and METRIC of [TASK=]PATH[:METRIC]; the path is None where nothing is there."""
    for name, rest in ((None, text), text.split("=", 1) if "=" in text else (None, text)):
        for path, metric in ((rest, None), rest.rsplit(":", 1) if ":" in rest else (rest, None)):
            if expanded(path).exists():
                return name, expanded(path), metric
    return None, None, None


def questions_of(task: EvalTask, examples: list[Example], tokenizer) -> list[Asked]:
    """Each record's completion, then each of its choices, or what is written after its prompt."""
    ranked = rankings([example.prompt_ids for example in examples], task.records, task, tokenizer)
    asked: list[Asked] = [Likelihood(tuple(prompt), tuple(end)) for prompt, end in [*examples, *ranked]]
    if task.writes:
        asked += [
            Generation(tuple(prompt), task.max_new_tokens, stop_ids=(end[-1],))  # the end of a turn, where it is a chat
            for prompt, end in examples
        ]
    return asked


class Harness(NamedTuple):
    """A task of lm-eval, as questions."""

    task: HarnessTask
    asked: list[Asked]
    results: Callable[[Callable[[Asked], Answer | None]], dict]


def of_harness(names: list[str], tokenizer, config: ModelConfig, settings: Settings) -> list[Harness]:
    if find_spec("lm_eval") is None:
        raise ValueError(f"task {names[0]}: neither a file or folder, nor can it be looked up: {INSTALL}")
    from .harness.tasks import load_tasks, record, replay

    options = tokenizer, config.max_positions
    made = []
    for task in load_tasks(
        names, settings.include_path, limit=settings.limit, fewshot=settings.fewshot, chat=settings.chat
    ):
        asked = record(task, *options, sampling_seed=settings.seed)
        results = lambda answer, task=task: replay(task, *options, answer, sampling_seed=settings.seed)  # noqa: E731
        made.append(Harness(task, asked, results))
    return made


def members(held: list[Harness]) -> list[str]:
    """The names under which lm-eval gives results: those of tasks, and of groups."""
    return [name for one in held for part in ("tasks", "groups") for name in one.task.loaded.get(part, ())]


# ------------------------------------------------------------------------------------------------------------- records


def records(asking: Pass, tenant: str | None, settings: Settings, about: dict, begun: float) -> dict:
    """What lm-eval's layout says of a run beside its results, and which adapter answered."""
    entry = asking.entries.get(tenant)
    seeds = SEEDS | {"sampling_seed": settings.seed}
    model = {"model": "para_jax", "model_args": about, "model_dtype": str(asking.model.dtype)}
    content = {"adapter_content": entry.content if entry else None, "backbone_content": asking.backbone}
    limits = {"limit": settings.limit, "batch_size": settings.rows}
    return {
        "config": model | content | limits | seeds,
        "date": begun,
        "versions_of": versions(),
        "device": devices.describe_devices(),
        "tokens": asking.tokens,
        "tokens_per_second": asking.tokens / max(asking.seconds, 1e-9),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return devices.versions() | {name: version(name) for name in ("para_jax", "lm_eval") if find_spec(name)}


def table(by_tenant: dict[str, dict], asking: Pass, settings: Settings) -> str:
    """The Markdown table, adapters by tasks, and what is needed to read it."""
    columns: dict[tuple[str, str], None] = {}
    for made in by_tenant.values():
        for task, values in made["results"].items():
            for metric in values:
                if "," in metric and "_stderr," not in metric:
                    columns[task, metric] = None
    head = ["adapter", *(cell(f"{task} {metric.removesuffix(',none')}") for task, metric in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, made in by_tenant.items():
        cells = [shown(made["results"].get(task, {}), metric) for task, metric in columns]
        lines.append("| " + " | ".join([cell(name), *cells]) + " |")
    seeds = f"few-shot {SEEDS['fewshot_seed']}, sampling {settings.seed}"
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    limit = f"the first {settings.limit} examples of each task" if settings.limit else "all examples"
    speed = (
        f"{asking.tokens} tokens in {asking.seconds:.1f} s, {asking.tokens / max(asking.seconds, 1e-9):.0f} tokens/s"
    )
    return "\n".join([
        *lines,
        "",
        f"± is the standard error over the examples; {limit}. Seeds: {seeds}.",
        f"{speed} (without what was answered earlier), {settings.rows} rows; {devices.describe_devices()}; {named}.",
    ])  # fmt: skip


def shown(values: dict, metric: str) -> str:
    name, _, kept = metric.partition(",")
    value, error = values.get(metric), values.get(f"{name}_stderr,{kept}")
    if not isinstance(value, (int, float)):
        return cell(str(value if value is not None else ""))
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")


def cell(text: str) -> str:
    """A text in a table: what is not printable, such as a line's end or half a character, is written out."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain.replace("|", "\\|")


def file_names(names: Sequence[str]) -> dict[str, str]:
    """Each tenant's file: its name with what file systems mind replaced, and a hash of the name where two would be the
    same or it is too long."""
    plain = {name: re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_" for name in names}
    times = Counter(text.lower() for text in plain.values())

    def file_name(name: str, text: str) -> str:
        long = len(text.encode()) > 200  # of the 255 that file systems allow
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
        return (text[:50] if long else text) + (f"-{digest}" if long or times[text.lower()] > 1 else "") + ".json"

    return {name: file_name(name, text) for name, text in plain.items()}


def check_results(folder: Path, files: Sequence[str], content: str) -> None:
    """Raises ValueError where one of these files holds another backbone's results, or something else. A file that is
    damaged is named and may be written anew, for all answers are in the journal."""
    for name in files:
        file = folder / name
        if not file.exists():
            continue
        require(file.is_file() and file.stat().st_size <= LARGEST, f"--output: {file}", "", RESULTS)
        data = file.read_bytes()
        try:
            found = json.loads(data)
        except RecursionError:
            found = None
        except ValueError:
            require(not data or (folder / ANSWERS_FILE).exists(), f"--output: {file}", data[:40], RESULTS)
            devices.say(f"{file} is damaged, and is written anew")
            continue
        config = found.get("config") if isinstance(found, dict) else None
        backbone = config.get("backbone_content") if isinstance(config, dict) else None
        require(isinstance(backbone, str), f"--output: {file}", data[:40], RESULTS)
        if backbone != content:
            raise ValueError(f"--output {folder}: {name} holds results of another backbone; choose another --output")


def require_distinct(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    require(not twice, what, twice, "each name once")
