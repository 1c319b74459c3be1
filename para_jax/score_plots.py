"""Pictures of scores: bars of methods, adapters or tenants, with the base model's score. Needs the extra [plot].

`read_scores` finds the scores in folders: of runs, of runs of many tenants, and of `para-jax evaluate`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .config import BASE, expanded
from .evaluation.results import error_of, file_names, metrics_of
from .figures import drawable, escaped, explain, new_figure, run_names
from .messages import warn
from .training.metrics_file import is_log, is_number
from .training.scores_file import Records, logged_records
from .training.scores_file import read_scores as read_records
from .training.tenants_file import COMPARISON_FILE, read_entries
from .training.tenants_file import FILE as TENANTS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More bars than this are not drawn: the middle of the order by score is left out.
MAX_BARS = 40
#: Panels of a picture, at most.
MAX_PANELS = 12


class Bar(NamedTuple):
    """One score."""

    score: float
    """of the metric "loss": the loss itself, never negated"""
    stderr: float | None = None
    count: int | None = None
    """examples"""


class Scores(NamedTuple):
    """Scores of one metric on one set of examples, or of tenants each on their own."""

    metric: str
    bars: Mapping[str, Bar]
    """by name, in the order to draw them from the top"""
    base: Bar | Mapping[str, Bar] | None = None
    """the base model's score: one for all bars, or one for each name that has one"""


# ------------------------------------------------------------------------------------------------------------- picture


def scores_plot(panels: Mapping[str, Scores], title: str = "") -> Figure:
    """Scores as horizontal bars with their standard errors, one panel per set of scores.

        scores_plot({"my data, test": Scores("accuracy", {"PARA": Bar(0.92, 0.03, 60), "LoRA": Bar(0.88, 0.04, 60)},
                                             base=Bar(0.27, 0.06, 60))})

    A base model's score that belongs to all bars is a dashed line; one for each bar is a diamond on it. A sentence
    under the picture says how to read it.

    Args:
        panels: by the panel's title.
    """
    if not panels or not all(scores.bars for scores in panels.values()):
        raise ValueError("no scores to draw; give a panel with at least one bar")
    drawn = {name: scores._replace(bars=legible(scores)) for name, scores in panels.items()}
    heights = [0.9 + 0.32 * len(scores.bars) for scores in drawn.values()]
    figure = new_figure(7, sum(heights) + 0.7)
    grid = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, scores) in zip(grid, drawn.items(), strict=True):
        draw_panel(axes, name, scores)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    left_out = any(len(scores.bars) < len(panels[name].bars) for name, scores in drawn.items())
    explain(figure, sentence(list(drawn.values()), left_out))
    return figure


def draw_panel(axes, name: str, scores: Scores) -> None:
    """A panel with one set of scores: the bars, the base model's scores, and all of them as numbers."""
    counts = {bar.count for bar in scores.bars.values()}
    draw_bars(axes, scores.bars)
    draw_base(axes, scores)
    name_bars(axes, scores.bars, with_counts=len(counts) > 1)
    set_range(axes, scores)
    write_numbers(axes, scores)
    count = next(iter(counts))
    of_all = f", {count} examples" if len(counts) == 1 and count else ""
    of_base = f", base model {number(scores.base.score)}" if isinstance(scores.base, Bar) else ""
    axes.set_title(escaped(name) + of_all + of_base, fontsize=9)
    is_loss = scores.metric == "loss"
    says = "loss (nats per token), lower is better" if is_loss else f"{escaped(scores.metric)}, higher is better"
    axes.set_xlabel(says, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def draw_bars(axes, bars: Mapping[str, Bar]) -> None:
    places, shown = range(len(bars)), [drawable(bar.score) for bar in bars.values()]
    errors = list(map(drawable_error, bars.values()))
    axes.barh(places, shown, height=0.62, color="C0", alpha=0.75)
    if not all(map(math.isnan, errors)):
        axes.errorbar(shown, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)


def draw_base(axes, scores: Scores) -> None:
    """A dashed line for the score that belongs to all bars, or a diamond on each bar that has one of its own."""
    if isinstance(scores.base, Bar):
        axes.axvline(drawable(scores.base.score), color="black", linestyle="--", linewidth=1)
        if scores.base.stderr:
            score, error = drawable(scores.base.score), scores.base.stderr
            axes.axvspan(score - error, score + error, color="black", alpha=0.08, linewidth=0)
    elif scores.base:
        held = [(scores.base[key], place) for place, key in enumerate(scores.bars) if key in scores.base]
        axes.errorbar(
            [drawable(bar.score) for bar, _ in held], [place for _, place in held],
            xerr=[drawable_error(bar) for bar, _ in held],
            fmt="D", clip_on=False, markersize=5, color="white", markeredgecolor="black", ecolor="black",
            elinewidth=1, capsize=2.5,
        )  # fmt: skip


def name_bars(axes, bars: Mapping[str, Bar], *, with_counts: bool) -> None:
    """The names at the left, perhaps with the number of examples, and the first bar at the top."""
    counts = [f" ({bar.count})" if bar.count and with_counts else "" for bar in bars.values()]
    labels = [escaped(shorten_name(key)) + count for key, count in zip(bars, counts, strict=True)]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)


def set_range(axes, scores: Scores) -> None:
    """The range of the scores and their errors, with zero and room for the numbers."""
    drawn = [*scores.bars.values(), *bases(scores)]
    ends = [round(end, 9) for end in [0.0, *(end for bar in drawn for end in reach(bar))]]  # 0.2 - 0.2 may be below 0
    low, high = min(ends), max(ends)
    space = (high - low) or 1.0
    room = space * (0.45 if isinstance(scores.base, Mapping) else 0.3)
    axes.set_xlim(low - (0.05 * space if low < 0 else 0), high + room)
    axes.xaxis.set_major_formatter("{x:g}")
    if high <= 1 and low >= 0 and scores.metric != "loss":
        axes.set_xticks([tick / 5 for tick in range(6) if tick / 5 <= high + room])


def write_numbers(axes, scores: Scores) -> None:
    """Each bar's score and error at its end, and the base model's where each bar has its own."""
    for place, (key, bar) in enumerate(scores.bars.items()):
        base = scores.base.get(key) if isinstance(scores.base, Mapping) else None
        right = max([0.0, *reach(bar), *(reach(base) if base else [])])
        text = number(bar.score) + (f" ± {number(bar.stderr)}" if bar.stderr else "")
        text += f" (base {number(base.score)})" if base else ""
        axes.annotate(text, (right, place), (5, 0), textcoords="offset points", va="center", fontsize=8)


def drawable_error(bar: Bar) -> float:
    """The standard error, or NaN (no whisker) if there is none or it can't be drawn."""
    return drawable(bar.stderr) if bar.stderr else math.nan


def legible(scores: Scores) -> Mapping[str, Bar]:
    """The bars, without those in the middle of the order by score if there are too many."""
    if len(scores.bars) <= MAX_BARS:
        return scores.bars
    ordered = sorted(scores.bars, key=lambda key: scores.bars[key].score, reverse=scores.metric != "loss")
    kept = ordered[: MAX_BARS // 2] + ordered[-MAX_BARS // 2 :]
    return {key: scores.bars[key] for key in kept}


def bases(scores: Scores) -> list[Bar]:
    """The base model's scores that are drawn."""
    if isinstance(scores.base, Mapping):
        return [bar for key, bar in scores.base.items() if key in scores.bars]
    return [scores.base] if scores.base else []


def reach(bar: Bar) -> list[float]:
    """How far a score and its error reach, to both sides; nothing for a score that is not drawn."""
    ends = [bar.score - (bar.stderr or 0.0), bar.score + (bar.stderr or 0.0)]
    return [end for end in ends if math.isfinite(drawable(end))]


def sentence(drawn: Sequence[Scores], left_out: bool) -> str:
    """The sentence that says how to read this picture."""
    said = []
    if any(bar.stderr for scores in drawn for bar in scores.bars.values()):
        said.append("Whiskers are one standard error over the examples: bars that differ by less may differ by chance.")
    if any(isinstance(scores.base, Bar) for scores in drawn):
        said.append("The dashed line is the base model.")
    if any(scores.base and not isinstance(scores.base, Bar) for scores in drawn):
        said.append("The diamond is the base model on the same examples.")
    if any(len({bar.count for bar in scores.bars.values()}) > 1 for scores in drawn):
        said.append("The number of examples is in brackets.")
    if left_out:
        said.append(f"Only the best and the worst {MAX_BARS // 2} are drawn.")
    return " ".join(said) or "Each bar is a score."


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"


def shorten_name(name: str, longest: int = 40) -> str:
    """The start and the end of a long name."""
    part = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:part]}...{name[-part:]}"


# -------------------------------------------------------------------------------------------------------------- folders


def read_scores(folders: Sequence[str | Path]) -> dict[str, Scores]:
    """The scores in folders: run folders of one adapter (a bar each), of many tenants (a bar each), of a comparison of
    methods (those of each method's run), and folders of `para-jax evaluate` (a bar for each adapter, a panel for each
    task).

    A run gives its test scores, or its best validation scores if it has no test data. Raises ValueError,
    naming the folder, for a folder without scores.
    """
    panels: dict[str, Scores] = {}
    runs = [run for folder in folders for run in compared_runs(expanded(folder))]
    several = len(runs) > 1
    for name, folder in zip(run_names(runs), runs, strict=True):
        if (folder / TENANTS_FILE).exists():
            parts = []
            for key, entry in read_entries(folder).items():
                shown = f"{name}: {key}" if several else key
                parts.append(of_records(shown, entry.get("scores", {})) or of_log(shown, folder / key))
            found = merged([part for part in parts if part])
            prefix = "" if several else f"{name}: "
            panels = merged_panels(panels, {f"{prefix}{key}": value for key, value in found.items()})
        elif is_log(folder / "metrics.jsonl"):
            panels = merged_panels(panels, of_records(name, read_records(folder)) or of_log(name, folder))
        else:
            of_folder = of_evaluation(Path(folder))
            prefix = f"{name}: " if several else ""
            panels |= {f"{prefix}{task}": scores for task, scores in of_folder.items()}
    if not panels:
        raise ValueError(f"{', '.join(map(str, folders))}: no score is there yet; wait for the first evaluation")
    if len(panels) > MAX_PANELS:
        left_out = ", ".join(list(panels)[MAX_PANELS:][:5]) + " ..." * (len(panels) > MAX_PANELS + 5)
        warn(f"of {len(panels)} sets of scores the first {MAX_PANELS} are drawn; without {left_out}")
    return dict(list(panels.items())[:MAX_PANELS])


def compared_runs(folder: Path) -> list[Path]:
    """The runs of a comparison of methods that have begun, or the folder itself."""
    if not (folder / COMPARISON_FILE).is_file():
        return [folder]
    return sorted({log.parent for name in ("metrics.jsonl", TENANTS_FILE) for log in folder.glob(f"*/{name}")})


def of_records(name: str, records: Records) -> dict[str, Scores]:
    """The score that a run recorded at its end, by panel: on its test data, or else its best validation score."""
    split = next((split for split in ("test", "validation") if split in records), None)
    if split is None:
        return {}
    metric = records[split]["metric"]
    bar, base = (bar_of_record(records.get(part), metric) for part in (split, f"{split}_base"))
    title = "test" if split == "test" else "best validation"
    return {f"{title} {metric}": Scores(metric, {name: bar}, {name: base} if base else None)} if bar else {}


def bar_of_record(record: dict | None, metric: str) -> Bar | None:
    values = record["values"] if record else {}
    if record is None or metric not in values:
        return None
    return Bar(values[metric], values.get(f"{metric}_stderr"), record["count"])


def of_log(name: str, folder) -> dict[str, Scores]:
    """The same of a run that has not ended, from its metrics.jsonl. Nothing if it has no score yet."""
    return of_records(name, logged_records(folder / "metrics.jsonl"))


def merged(parts: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    return reduce(merged_panels, parts, {})


def merged_panels(panels: dict[str, Scores], more: Mapping[str, Scores]) -> dict[str, Scores]:
    """The panels, with the bars of others added to those of the same title."""
    found = dict(panels)
    for title, scores in more.items():
        if title in found:
            held: dict[str, Bar] = {}
            for base in (found[title].base, scores.base):
                held |= base if isinstance(base, Mapping) else {}
            found[title] = Scores(scores.metric, {**found[title].bars, **scores.bars}, held or None)
        else:
            found[title] = scores
    return found


def of_evaluation(folder: Path) -> dict[str, Scores]:
    """The results of `para-jax evaluate` in a folder: a panel for each task, with its first metric. Tasks that only the
    adapter of their name was asked (`--own`) share a panel, with a bar for each."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    records = {file.stem: record for file in files if (record := read_record(file))}
    if not records:
        raise ValueError(
            f"{folder}: no scores there\ngive the output_dir of `para-jax train`, or the --output folder of "
            "`para-jax evaluate`"
        )
    panels: dict[str, Scores] = {}
    shown = dict.fromkeys(key for record in records.values() for key in first_metrics(record))
    times = Counter(task for task, _ in shown)  # several metrics: results of several calls
    for task, metric in shown:
        bars = {name: bar for name, record in records.items() if (bar := result_bar(record, task, metric))}
        alike = len({bar.count for bar in bars.values()}) == 1  # else an earlier call scored other examples
        base = bars.pop(BASE, None) if len(bars) > 1 and alike else None
        kind = metric.partition(",")[0]
        panels[f"{task}, {kind}" if times[task] > 1 else task] = Scores(kind, bars, base)
    own = {task: scores for task, scores in panels.items() if list(scores.bars) == [own_file(task)]}
    if len(own) < 2:
        return panels
    others = {task: scores for task, scores in panels.items() if task not in own}
    shared = []
    for task, (metric, bars, base) in own.items():
        (bar,) = bars.values()
        held = {task: base} if isinstance(base, Bar) else None
        shared.append({f"each tenant's own task, {metric}": Scores(metric, {task: bar}, held)})
    return others | merged(shared)


def own_file(tenant: str) -> str:
    """The stem of the file of this tenant's results."""
    return file_names([tenant])[tenant].removesuffix(".json")


def read_record(file: Path) -> dict | None:
    """A results file of an evaluation; None for another file."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    held = isinstance(found, dict) and isinstance(found.get("results"), dict)
    return found if held and all(isinstance(values, dict) for values in found["results"].values()) else None


def first_metrics(record: dict) -> list[tuple[str, str]]:
    """(task, its first metric) of a record, such as ("test", "accuracy,none")."""
    found = []
    for task, values in record["results"].items():
        metrics = [key for key in metrics_of(values) if is_number(values[key])]
        if metrics and task.isprintable():
            found.append((task, metrics[0]))
    return found


def result_bar(record: dict, task: str, metric: str) -> Bar | None:
    values = record["results"].get(task, {})
    value, error = values.get(metric), error_of(values, metric)
    if not is_number(value):
        return None
    samples = record.get("n-samples")
    of_task = samples.get(task) if isinstance(samples, dict) else None
    count = of_task.get("effective") if isinstance(of_task, dict) else None
    return Bar(float(value), float(error) if is_number(error) else None, count if type(count) is int else None)  # pyright: ignore
