"""The results of an evaluation as files: a JSON record per adapter in lm-eval's layout, and table.md."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..config import BASE
from ..io import atomic
from ..io.shards import SHARD_FILE
from ..io.storage.bucket import Place
from ..runtime import devices
from .answers import Answerer
from .metrics import error_of_mean
from .options import EvalOptions
from .questions import SEEDS, Answer
from .score import likelihoods_of, rows_of_ratio, score_answers, with_error
from .score_plots import Bar, Scores, scores_plot
from .tasks import EncodedTask

#: In an output folder: every answer, as it came.
ANSWERS_FILE = "answers.jsonl"
#: Of table.csv and of a DataFrame.
COLUMNS: tuple[str, ...] = ("adapter", "task", "metric", "value", "stderr", "examples")


class Results(NamedTuple):
    """What `evaluate` gives back. Printed, it is the table."""

    records: dict[str, dict]
    """by adapter, in lm-eval's layout: records["mine"]["results"]["test"]["accuracy,none"]. The base model is `base`"""
    markdown: str
    samples: dict[str, dict[str, list[dict]]]
    """with `log_samples` and no output, by adapter and task: what was answered to each example"""

    def __repr__(self) -> str:
        return self.markdown

    def table(self) -> str:
        """The scores as a Markdown table, and what a reader needs to know about them."""
        return self.markdown

    def rows(self) -> list[dict[str, Any]]:
        """A row for each score: adapter, task, metric, value, stderr, examples."""
        return score_rows(self.records)

    def to_dataframe(self):
        """The rows as a pandas DataFrame. Raises ImportError if pandas is not installed."""
        try:
            from pandas import DataFrame
        except ImportError:
            raise ImportError("to_dataframe: pandas is not installed: pip install pandas; rows() needs none") from None
        return DataFrame(self.rows(), columns=list(COLUMNS))

    def plot(self):
        """A matplotlib Figure: a panel for each task, with its first metric and a bar for each adapter."""
        panels: dict[str, Scores] = {}
        metrics: dict[str, str] = {}
        for row in self.rows():
            metric = metrics.setdefault(row["task"], row["metric"])
            if row["metric"] == metric and isinstance(row["value"], (int, float)):
                panel = panels.setdefault(row["task"], Scores(metric, {}))
                bar = Bar(row["value"], row["stderr"], row["examples"])
                panels[row["task"]] = panel._replace(bars={**panel.bars, row["adapter"]: bar})
        for task, panel in panels.items():
            if BASE in panel.bars and len(panel.bars) > 1:
                others = {name: bar for name, bar in panel.bars.items() if name != BASE}
                panels[task] = panel._replace(bars=others, base=panel.bars[BASE])  # a line across the others
        return scores_plot(panels)


# ------------------------------------------------------------------------------------------------------------- records


def task_record(encoded: EncodedTask, original: int, answers: Sequence[Answer]) -> dict:
    """One of our own tasks in lm-eval's layout.

    Args:
        original: how many examples the file has.
        answers: to the task's `questions`, in their order.
    """
    task, values = encoded.task, metric_values(encoded, answers)
    found: dict = {"alias": task.name, "sample_len": len(task.records)}
    for metric, (value, error) in values.items():
        found |= {f"{metric},none": value, f"{metric}_stderr,none": "N/A" if error is None else error}
    return {
        "results": {task.name: found},
        "group_subtasks": {task.name: []},
        "configs": {task.name: {"task": task.name, "metric": task.metric, "choices": list(task.choices)}},
        "versions": {task.name: None},
        "n-shot": {task.name: 0},
        "higher_is_better": {task.name: {metric: metric != "loss" for metric in values}},
        "n-samples": {task.name: {"original": original, "effective": len(task.records)}},
    }


def metric_values(encoded: EncodedTask, answers: Sequence[Answer]) -> dict[str, tuple[float, float | None]]:
    """{metric: (value, standard error)}; the loss is in nats per completion token."""
    score = score_answers(encoded, answers)
    values = {} if score.metric == "loss" else {score.metric: (score.score, score.stderr)}
    values |= {metric: (value, error) for metric, value, error in score.also}
    nats, tokens = (values_of[: score.count] for values_of in likelihoods_of(encoded, answers))
    return values | {"loss": (score.loss, error_of_mean(rows_of_ratio(nats, tokens)))}


def run_record(answerer: Answerer, tenant: str | None, about: Mapping, options: EvalOptions, begun: float) -> dict:
    """The rest of lm-eval's layout: the run, and the adapter that answered.

    Args:
        about: what was asked for, as the model's arguments.
    """
    entry = answerer.entries.get(tenant)
    model = {"model": "para_jax", "model_args": dict(about), "model_dtype": str(answerer.model.dtype)}
    content = {"adapter_content": entry.content if entry else None, "backbone_content": answerer.backbone}
    asked = {"limit": options.limit, "batch_size": options.rows}
    return {
        "config": model | content | asked | SEEDS | {"sampling_seed": options.seed},
        "date": begun,
        "versions_of": versions(),
        "device": devices.describe_devices(answerer.model),
    } | work_of(answerer)


def versions() -> dict[str, str]:
    return devices.library_versions() | {name: version(name) for name in ("para_jax", "lm_eval") if find_spec(name)}


def work_of(answerer: Answerer) -> dict:
    return {"tokens": answerer.tokens, "tokens_per_second": answerer.tokens / max(answerer.seconds, 1e-9)}


# --------------------------------------------------------------------------------------------------------------- table


def markdown_table(
    by_tenant: Mapping[str, dict],
    computed: str,
    libraries: Mapping[str, str],
    options: Mapping[str, Any],
    own: Mapping[str, str],
) -> str:
    """The Markdown table, adapters by tasks, and what a reader needs to know about it.

    Args:
        computed: how much was computed, in what time and where (`described_work`).
        libraries: their versions.
        options: the fields of EvalOptions.
        own: each tenant's task, if every tenant has one of its own; the table then has a row per tenant.
    """
    table = own_rows(by_tenant, own) if own else rows_by_adapter(by_tenant)
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    lines.insert(1, "|" + "---|" * len(table[0]))
    seeds = f"few-shot {SEEDS['fewshot_seed']}, sampling {options['seed']}"
    limit = options["limit"]
    named = ", ".join(f"{name} {number}" for name, number in libraries.items())
    which = f"the first {limit} examples of each task" if limit else "all examples"
    which += ", each with the factors of another example's prompt" if options["shuffle_prompts"] else ""
    which += "" if own else counts(by_tenant)
    return "\n".join([
        *lines,
        "",
        f"± is the standard error over the examples; {which}. Seeds: {seeds}.",
        f"{computed}; {named}.",
    ])  # fmt: skip


def described_work(tokens: int, seconds: float, rows: int, device: str) -> str:
    """How much was computed, in what time and where, for a sentence."""
    speed = f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s"
    speed = f"{speed} (without what was answered earlier)" if tokens else "everything was answered earlier"
    return f"{speed}, {rows} rows; {device}"


def rows_by_adapter(by_tenant: Mapping[str, dict]) -> list[list[str]]:
    """The head, and a row for each adapter with all its scores."""
    columns = dict.fromkeys((task, metric) for _, task, metric in scores_of(by_tenant))
    table = [["adapter", *(cell(f"{task} {metric.removesuffix(',none')}") for task, metric in columns)]]
    for name, made in by_tenant.items():
        cells = [value_cell(made["results"].get(task, {}), metric) for task, metric in columns]
        table.append([cell(name), *cells])
    return table


def own_rows(by_tenant: Mapping[str, dict], own: Mapping[str, str]) -> list[list[str]]:
    """The head, and a row for each metric of each tenant's own task: the base model's score, and the own adapter's."""
    who = [name for name in by_tenant if name not in own]
    table = [["tenant", "metric", *who, "own adapter", "examples"]]
    for tenant, task in own.items():
        made = by_tenant[tenant]
        for metric in metrics_of(made["results"][task]):
            values = [by_tenant[name]["results"][task] for name in (*who, tenant)]
            cells = [value_cell(found, metric) for found in values]
            table.append([cell(tenant), metric.removesuffix(",none"), *cells, str(examples(made, task))])
    return table


def scores_of(by_tenant: Mapping[str, dict]) -> Iterator[tuple[str, str, str]]:
    """(adapter, task, metric) of each score."""
    for name, made in by_tenant.items():
        for task, values in made["results"].items():
            yield from ((name, task, metric) for metric in metrics_of(values))


def metrics_of(values: Mapping) -> list[str]:
    """The keys of a task's results that are metrics, such as "accuracy,none"."""
    return [key for key in values if "," in key and "_stderr," not in key]


def examples(made: Mapping, task: str) -> int | None:
    """How many examples of a task were asked; None for a group of tasks."""
    return made.get("n-samples", {}).get(task, {}).get("effective")


def counts(by_tenant: Mapping[str, dict]) -> str:
    """The number of examples of each task, for a sentence; of the first 20 tasks if there are more."""
    found = {task: examples(made, task) for made in by_tenant.values() for task in made["results"]}
    known = [f"{cell(task)} {count}" for task, count in found.items() if count is not None]
    return f" ({', '.join(known[:20])}{' ...' if len(known) > 20 else ''})" if known else ""


def csv_table(by_tenant: Mapping[str, dict]) -> str:
    """All scores as CSV, a row for each adapter, task and metric."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(score_rows(by_tenant))
    return text.getvalue()


def score_rows(by_tenant: Mapping[str, dict]) -> list[dict[str, Any]]:
    """A row for each adapter, task and metric."""
    rows = []
    for name, task, metric in scores_of(by_tenant):
        values = by_tenant[name]["results"][task]
        score = values[metric], error_of(values, metric), examples(by_tenant[name], task)
        rows.append(dict(zip(COLUMNS, (name, task, metric.removesuffix(",none"), *score), strict=True)))
    return rows


def value_cell(values: dict, metric: str) -> str:
    value = values.get(metric)
    if not isinstance(value, (int, float)):
        return cell(str(value if value is not None else ""))
    return with_error(value, error_of(values, metric))


def error_of(values: Mapping, metric: str) -> float | None:
    """The standard error of a metric such as "accuracy,none"; None if it has none."""
    name, _, kept = metric.partition(",")
    error = values.get(f"{name}_stderr,{kept}")
    return error if isinstance(error, (int, float)) else None


def cell(text: str) -> str:
    """A text for a Markdown table: what is not printable is escaped, such as the end of a line or half a character."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text.replace("|", "\\|")


# --------------------------------------------------------------------------------------------------------------- files


def file_names(names: Sequence[str]) -> dict[str, str]:
    """Each tenant's file: its name without characters that file systems reject. A hash of the name is added if two
    files would have the same name, or the name is too long or that of a shard's own file."""
    plain = {name: re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_" for name in names}
    times = Counter([SHARD_FILE.removesuffix(".json"), *(text.lower() for text in plain.values())])

    def file_name(name: str, text: str) -> str:
        long = len(text.encode()) > 200  # of the 255 that file systems allow
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
        return (text[:50] if long else text) + (f"-{digest}" if long or times[text.lower()] > 1 else "") + ".json"

    return {name: file_name(name, text) for name, text in plain.items()}


def names_of_samples(parts: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The file of samples for each (adapter, task): samples_ADAPTER_TASK.jsonl, distinct as in `file_names`."""
    texts = {part: "\0".join(("samples", *part)) for part in parts}  # no name holds this character
    files = file_names(list(texts.values()))
    return {part: files[text] + "l" for part, text in texts.items()}


def check_results(folder: Place, files: Iterable[str], content: str) -> None:
    """Raises ValueError if one of these files is there and does not hold results of this backbone."""
    for file in (folder / name for name in files):
        with suppress(ValueError, KeyError, TypeError):  # another program's file
            if not file.exists() or json.loads(file.read_bytes())["config"]["backbone_content"] == content:
                continue
        raise ValueError(f"--output: {file} holds no results of this backbone; choose another --output")


def write_results(folder: Place, records: Mapping[str, dict], files: Mapping[str, str], text: str) -> None:
    """Writes each adapter's record to its file, and the tables: table.md comes last, so with it the folder is
    complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, record in records.items():
        atomic.write_text(folder / files[name], json.dumps(record, indent=2, default=str) + "\n")
    atomic.write_text(folder / "table.csv", csv_table(records))
    atomic.write_text(folder / "table.md", text + "\n")
