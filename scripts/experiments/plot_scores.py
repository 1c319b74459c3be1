"""Draws the scores that folders hold: of run folders, or of the --output folder of `para-jax evaluate`.

python scripts/experiments/plot_scores.py runs/evaluation --output runs/scores.png
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

from para_jax.config import BASE
from para_jax.evaluation.results import error_of, file_names, metrics_of
from para_jax.evaluation.score_plots import Bar, Scores, scores_plot
from para_jax.io.checks import expanded
from para_jax.io.figures import run_names, save
from para_jax.io.messages import warn
from para_jax.runs.compare import COMPARISON_FILE
from para_jax.training.metrics_file import read_metrics
from para_jax.training.scores_file import TENANTS as TENANTS_FILE
from para_jax.training.scores_file import Records, read_entries
from para_jax.training.scores_file import read_scores as read_records

#: Panels of a picture, at most.
MAX_PANELS = 12


NAMES = ("validation_base", "validation", "test_base", "test")


def logged_records(log: Path, count: int | None = None) -> Records:
    """The records of a run that left only its log: its best validation score so far, with the step, its last test score
    and the base model's.

    Args:
        count: of the examples.
    """
    rows, found = list(read_metrics(log)) if log.is_file() else [], {}
    for name, prefix in zip(NAMES, ("validation_", "validation_", "test_before_", "test_after_"), strict=True):
        scored = [row for row in rows if f"{prefix}loss" in row]
        if prefix == "validation_":  # the base model's is that of step 0
            scored = [row for row in scored if (row["step"] == 0) == (name == "validation_base")]
        if not scored:
            continue
        names = [key.removeprefix(prefix) for key in scored[-1] if key.startswith(prefix)]
        own = [key for key in names if key != "loss" and not key.endswith("_stderr")]
        metric = "loss" if "loss_stderr" in names or not own else own[0]  # only a score has a standard error
        sign, best = -1 if metric == "loss" else 1, scored[-1]
        if name == "validation":  # as the run keeps it
            same = [row for row in scored if f"{prefix}{metric}" in row]
            best = max(same, key=lambda row: (sign * row[f"{prefix}{metric}"], -row[f"{prefix}loss"]))
        values = {key.removeprefix(prefix): value for key, value in best.items() if key.startswith(prefix)}
        found[name] = {"metric": metric, "count": count, "step": int(best["step"]), "values": values}
    return found


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    save(scores_plot(read_scores(options.folders)), options.output)


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
        elif (folder / "metrics.jsonl").is_file():
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
    return {f"{title} {metric}": Scores(metric, {name: bar}, base)} if bar else {}


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
    """The panels, with the bars of others added to those of the same title, and the base score that all share."""
    found = dict(panels)
    for title, scores in more.items():
        if title in found:
            base = scores.base if scores.base == found[title].base else None
            found[title] = Scores(scores.metric, {**found[title].bars, **scores.bars}, base)
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
        shared.append({f"each tenant's own task, {metric}": Scores(metric, {task: bar}, base)})
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


if __name__ == "__main__":
    main()
