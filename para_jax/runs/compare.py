"""compare_methods: one run for each method of sweep.method, on the same data and backbone, and one table of them all.

output_dir/{config.yaml, comparison.json, comparison.md}, and a run folder for each method: output_dir/para/, ... The
same command resumes: it continues with the first method that has not finished.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from ..adapters.adapter import count_parameters
from ..config import ADAPTER_CONFIGS, BASE, RunConfig, adapter_method, load_config, with_scope_of
from ..data.given import with_data
from ..evaluation.paired import within_noise
from ..evaluation.score import with_error
from ..io import atomic
from ..io.checks import expanded
from ..io.error_frames import errors_forget
from ..io.messages import say, warn
from ..io.storage.bucket import Place
from ..io.table import table
from ..model.adapted import init_adapter
from ..runtime.processes import on_first_process
from ..training.scores_file import Records
from .folder import claim_folder, locked_folder
from .plan import SharedResources
from .report import choice_lines
from .scoring import NotFinite
from .standing import Standing
from .train import require_function, start, trained

#: The table of a comparison, in its output_dir, and the same as JSON.
TABLE, COMPARISON_FILE = "comparison.md", "comparison.json"


class MethodScore(NamedTuple):
    """What one method, or one combination of its sweep, reached."""

    method: str
    name: str
    """of the combination; empty where a method has one run"""
    folder: str
    parameters: int
    learning_rate: float | None
    ended: str
    """ "done", "patience" or "not finite\""""
    metric: str | None
    """of the validation data, or of the test data if that is all there is; None: there is neither"""
    score: float | None
    """the best one; of "loss" the loss itself, where lower is better"""
    stderr: float | None
    count: int
    """validation examples"""
    loss: float | None
    step: int
    """of the best score"""
    test: float | None
    """of the same metric, where eval.test is set"""
    test_stderr: float | None
    warning: str | None
    f1: float | None = None
    """of the validation data, where it is reported next to the metric"""
    rows: Sequence[float] = ()
    """what each validation example contributes to the score"""
    within_noise: bool = False
    """whether the score is not told apart from the best one"""

    @property
    def title(self) -> str:
        return "the base model" if self.method == BASE else " ".join(filter(None, (self.method, self.name)))

    @property
    def order(self) -> tuple:
        """Sorts the best first, of equal scores the one with the lowest loss, and those without a score last. The order
        in which the methods were listed never counts."""
        score = (self.score or 0.0) * (1 if self.metric == "loss" else -1)
        return self.score is None, score, math.inf if self.loss is None else self.loss, self.title


class MethodsResult(NamedTuple):
    """What `compare_methods` gives back. Each method's run is in output_dir/METHOD."""

    methods: list[MethodScore]
    """the best first"""
    output_dir: Place
    base: MethodScore | None = None
    """the base model's; None: it was not scored (eval.base)"""

    def __repr__(self) -> str:
        return f"{self.output_dir}\n{self.report()}"

    def report(self) -> str:
        """The table, and which score is the best and which others are not told apart from it."""
        return "\n\n".join(filter(None, [comparison_table(self.all), "\n".join(self.choice_lines())]))

    @property
    def all(self) -> list[MethodScore]:
        return [*self.methods, *filter(None, [self.base])]

    def choice_lines(self) -> list[str]:
        best = self.methods[0]
        if best.score is None:
            return []
        same = [row.title for row in self.methods if row.score == best.score]
        near = [row.title for row in self.all if row.within_noise]
        lines = [f"best score: {best.title}, in {best.folder}/adapter"]
        if self.base and self.base.order < best.order:
            lines.append("the base model's score is no worse than that")
        return lines + choice_lines(best.title, same, near, best.count)


@errors_forget()
def compare_methods(config: RunConfig, data: Any = None) -> MethodsResult:
    """Trains each method of sweep.method, or resumes where it stopped. A method whose loss is not finite stops, and the
    others continue. SIGTERM and Ctrl-C save, and ValueErrors are raised, as in `train`.

    Args:
        data: the rows, instead of data.train, as `train` takes them.

    >>> config = load_config("own-data", ["sweep.method=[para, ia3]", "train.max_steps=2", "output_dir=runs/methods"])
    >>> sorted(score.method for score in compare_methods(config).methods)
    ['ia3', 'para']
    """
    require_function(config, "compare_methods")
    if data is not None:
        config = replace(config, data=with_data(config.data, data))
    start(config)
    folder = expanded(config.output_dir)

    def claim() -> None:
        with locked_folder(config):  # the methods' runs lock it again
            claim_folder(config)

    on_first_process(claim)
    result = MethodsResult([], folder)
    shared = SharedResources()
    for number, (method, own) in enumerate(method_configs(config).items(), 1):
        say(f"{method}: method {number} of {len(config.sweep.method)}, in {own.output_dir}")
        standing = train_method(own, shared)
        (model,) = shared.backbones.values()  # the methods share one
        size = count_parameters(jax.eval_shape(partial(init_adapter, own.adapter, model.config)))
        rows = on_first_process(partial(method_scores, own, size, standing))
        result = compared([*result.all, *(MethodScore(*row) for row in rows)], folder)
        on_first_process(partial(write_comparison, result))  # after each method, for those who look meanwhile
    return result


def compared(rows: Sequence[MethodScore], folder: Place) -> MethodsResult:
    """The methods in their order, next to the base model. Every method scored it; the first of its rows counts."""
    base = next((row for row in rows if row.method == BASE), None)
    found = [*sorted((row for row in rows if row.method != BASE), key=lambda row: row.order), *filter(None, [base])]
    best = found[0]
    # A paired test needs the same examples. A tenant's rows are missing where its loss was not finite.
    alike = {row.title: row.rows for row in found if row.rows and len(row.rows) == len(best.rows)}
    near = within_noise(alike, best.title) if alike else []
    found = [row._replace(within_noise=row.title in near) for row in found]
    return MethodsResult(found[:-1] if base else found, folder, found[-1] if base else None)


def train_method(config: RunConfig, shared: SharedResources) -> Standing | None:
    """Trains one method to the end of its run. None: its loss was not finite."""
    try:
        return trained(config, shared).standing
    except NotFinite as error:
        warn(f"{adapter_method(config.adapter)}: {error}")
        return None


def method_configs(config: RunConfig) -> dict[str, RunConfig]:
    """The config of each method's run. The scope is for all methods, and so is `auto`. The adapter's other fields and
    train.learning_rate are those of adapter.method; the other methods have their own defaults."""
    own, rate = adapter_method(config.adapter), config.train.learning_rate
    return {
        method: replace(
            config,
            adapter=config.adapter if method == own else with_scope_of(config.adapter, ADAPTER_CONFIGS[method]),
            train=replace(config.train, learning_rate=rate if method == own or rate == "auto" else None),
            sweep=replace(config.sweep, method=()),
            output_dir=str(expanded(config.output_dir) / method),
        )
        for method in config.sweep.method
    }


def method_scores(config: RunConfig, parameters: int, standing: Standing | None) -> list[MethodScore]:
    """What a method's run left in its folder, and what the base model scored there.

    Args:
        standing: at the end of the run; None: its loss was not finite.
    """
    folder, method = expanded(config.output_dir), adapter_method(config.adapter)
    entries = {one.name: one.entry() for one in standing.tenants} if standing else {"": {}}
    rows = []
    for name, entry in entries.items():
        # a sweep has a folder for each of its combinations
        place = folder / name if name else folder
        rate = load_config(place / "config.yaml").train.learning_rate  # the one that `auto` chose
        records, ended = entry.get("scores", {}), entry.get("ended", "not finite")
        about = method, name, str(place), parameters, rate if isinstance(rate, float) else None, ended
        rows.append(score_of(about, records, "", entry.get("best_step", 0), entry.get("warning")))
    based = [entry["scores"] for entry in entries.values() if "validation_base" in entry.get("scores", {})]
    return rows + [score_of((BASE, "", "", 0, None, "done"), records, "_base") for records in based[:1]]


def score_of(about: tuple, records: Records, suffix: str, step: int = 0, warning: str | None = None) -> MethodScore:
    """What the records say of the adapter (suffix "") or the base model ("_base"), after the fields `about` it."""
    held, test = (records.get(f"{split}{suffix}", {}) for split in ("validation", "test"))
    metric, values, tested = (held or test).get("metric"), held.get("values", {}), test.get("values", {})
    scores: tuple[Any, ...] = (
        metric, values.get(metric), values.get(f"{metric}_stderr"), held.get("count") or 0, values.get("loss"), step,
        tested.get(metric), tested.get(f"{metric}_stderr"), warning, values.get("f1"), held.get("rows", ()),
    )  # fmt: skip
    return MethodScore(*about, *scores)


def comparison_table(found: Sequence[MethodScore]) -> str:
    """A line for each method, or for each combination of each method, and for the base model."""
    return table(cells(found), left=(0, 1) if any(row.name for row in found) else (0,))


def cells(found: Sequence[MethodScore]) -> list[list[str]]:
    metrics = {row.metric for row in found if row.metric}
    metric = metrics.pop() if len(metrics) == 1 else "score"
    names, tests = any(row.name for row in found), any(row.test is not None for row in found)
    also_f1 = metric != "f1" and any(row.f1 is not None for row in found)
    head = ["method", *["run"] * names, "parameters", "rate", f"validation {metric}", "examples"]
    rows = [[*head, *["f1"] * also_f1, *["loss"] * (metric != "loss"), *[f"test {metric}"] * tests, ""]]
    for row in found:
        rate = "-" if row.learning_rate is None else f"{row.learning_rate:g}"
        notes = [row.ended] * (row.ended != "done") + ["within noise of the best"] * row.within_noise
        rows.append(
            [
                row.method, *[row.name] * names, f"{row.parameters:,}", rate, with_error(row.score, row.stderr),
                str(row.count), *[with_error(row.f1)] * also_f1, *[with_error(row.loss)] * (metric != "loss"),
                *[with_error(row.test, row.test_stderr)] * tests, ", ".join(notes),
            ]
        )  # fmt: skip
    return rows


def write_comparison(result: MethodsResult) -> None:
    """comparison.json and comparison.md, after each method."""
    rows = json.dumps([row._asdict() for row in result.all], indent=1)
    atomic.write_text(result.output_dir / COMPARISON_FILE, rows + "\n")
    head, *rows = cells(result.all)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", *(f"- {line}" for line in result.choice_lines())]
    atomic.write_text(result.output_dir / TABLE, "\n".join(lines) + "\n")
