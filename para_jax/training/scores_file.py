"""scores.json: the last scores of a run of one adapter, for `para-jax inspect`. A run of many has the same records in
tenants.json.

A record says what was scored under its name ("validation_base", "validation", "test_base", "test"; base is the base
model): {"metric": ..., "count": examples, "values": {"loss": ..., NAME: ..., NAME_stderr: ...}, "samples": [[prompt,
expected answer, given answer], ...]}. Where methods or combinations may be compared, those of the validation data have
"rows": what each example contributes to the metric.
"""

from __future__ import annotations

import json
from typing import Any

from ..io import atomic
from ..io.storage.bucket import Place
from .metrics_file import is_log, read_metrics

FILE = "scores.json"
NAMES = ("validation_base", "validation", "test_base", "test")
#: One record by name.
Records = dict[str, dict[str, Any]]


def read_scores(folder: Place) -> Records:
    """The records of a run folder; none if the file does not exist."""
    file = folder / FILE
    return atomic.read_json(file, "Delete it, and the same command writes it again") if file.exists() else {}


def logged_records(log: Place, count: int | None = None) -> Records:
    """The records of a run that left only its log: its best validation score so far, with the step, its last test score
    and the base model's.

    Args:
        count: of the examples.
    """
    rows, found = list(read_metrics(log)) if is_log(log) else [], {}
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


def write_scores(folder: Place, records: Records) -> None:
    atomic.write_text(folder / FILE, json.dumps(records, indent=1) + "\n")
