"""What a run shows at its end, and `para-jax inspect` later: base model and adapter side by side, and some answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from string import ascii_letters, digits
from typing import Any

from ..evaluation.score import Score, with_error
from ..io.checks import printable
from ..io.table import table
from ..training.scores_file import Records

#: The data that a run's answers are shown of: the first of these that has them.
SHOWN = ("test", "validation")
#: Prompts of more characters are cut to what differs, and any text to this many.
SHORT, WIDTH = 60, 160
LETTERS = ascii_letters + digits


def record_of(score: Score, *, samples: bool, rows: bool = False) -> dict[str, Any]:
    """A score as scores.json and checkpoints hold it.

    Args:
        samples: with some of its answers.
        rows: with what each example contributes, so that methods and combinations can be compared on the same examples.
    """
    held = [list(sample) for sample in score.samples] if samples else []
    record = {"metric": score.metric, "count": score.count, "values": score.values(), "samples": held}
    return record | ({"rows": [round(value, 6) for value in score.rows]} if rows else {})


def choice_lines(best: str, same: Sequence[str], near: Sequence[str], count: int) -> list[str]:
    """What to say about the best of several scores on the same `count` examples.

    Args:
        same: the names of all that have the best score.
        near: the names of those that are not told apart from it (evaluation/paired.py).
    """
    lines = [f"{', '.join(same)} have the same score; {best} has the lowest loss"] if len(same) > 1 else []
    noise = f"are not told apart (differences within noise, {count} examples)"
    return lines + ([f"{', '.join([best, *near])} {noise}"] if near else [])


def score_table(records: Records) -> str:
    """A line for each metric of the validation and the test data: base model, adapter, number of examples. Empty if
    nothing was scored."""
    rows = [["", "", "base", "adapter", "examples"]]
    for split in SHOWN[::-1]:
        base, adapter = records.get(f"{split}_base"), records.get(split)
        held = adapter or base
        if held is None:
            continue
        for metric in metrics_of(held):
            rows.append([split, metric, number(base, metric), number(adapter, metric), str(held["count"])])
    if len(rows) == 1:
        return ""
    notes = ["± is one standard error over the draw of the examples"]
    if any(row[1] == "accuracy" for row in rows):
        notes.append("accuracy takes the likeliest of the choices; what the model writes may differ")
    return "\n".join([table(rows, left=(0, 1)), *notes])


def sample_lines(records: Records) -> str:
    """Some examples with the expected answer and those that base model and adapter gave; empty if there are none."""
    split = next((name for name in SHOWN if records.get(name, {}).get("samples")), None)
    if split is None:
        return ""
    after, before = records[split], records.get(f"{split}_base")
    held = [given for _, _, given in before["samples"]] if before and before["count"] == after["count"] else []
    lines = [f"{len(after['samples'])} of the {after['count']} {split} examples:"]
    prompts = where_they_differ([prompt for prompt, _, _ in after["samples"]])
    for i, (_, expected, given) in enumerate(after["samples"]):
        lines += [f"  {prompts[i]}", f"    expected  {one_line(expected)}"]
        lines += [f"    base      {one_line(held[i])}"] if i < len(held) else []
        lines += [f"    adapter   {one_line(given)}"]
    return "\n".join(lines)


def where_they_differ(texts: Sequence[str]) -> list[str]:
    """Texts on a line each. Long ones are cut where all begin or end with the same words."""
    lines = [printable(" ".join(text.split()), sys.maxsize) for text in texts]
    if len(set(lines)) == 1 or max(map(len, lines)) <= SHORT:
        return [one_line(line) for line in lines]
    begin = len(commonprefix(lines).rstrip(LETTERS))
    end = len(commonprefix([line[begin:][::-1] for line in lines]).rstrip(LETTERS))
    before, after = ("..." * (length > 3) for length in (begin, end))
    begin, end = begin * bool(before), end * bool(after)
    return [one_line(before + line[begin : len(line) - end].strip() + after) for line in lines]


def one_line(text: str, width: int = WIDTH) -> str:
    """A text with its white space as single spaces, without characters that a terminal would obey, cut to `width`."""
    return printable(" ".join(text.split()), width)


def tenants_table(entries: Mapping[str, dict[str, Any]]) -> str:
    """A line for each tenant of a run that has ended, by name; see runs.train.TenantsResult. The scores are of its test
    data, or of its validation data where it has no test data. f1 has columns if it is reported next to a metric."""
    also = [entry["scores"].values() for entry in entries.values() if entry["metric"] != "f1"]
    f1 = any("f1" in record["values"] for records in also for record in records)
    head = ["tenant", "metric", "base", "adapter", *["base f1", "f1"] * f1, "n", "loss", "steps", "best step", "data"]
    rows = [[*head, "note"]]
    for name, entry in sorted(entries.items()):
        why = "" if entry["ended"] == "done" else entry["ended"]
        cells = tenant_cells(entry, f1=f1)
        rows.append([name, *cells, str(entry["steps"]), str(entry["best_step"]), data_of(entry), why])
    rows = [row[:-1] for row in rows] if not any(row[-1] for row in rows[1:]) else rows
    return table(rows, left=(0, 1, len(head) - 1, len(head)))


def data_of(entry: dict[str, Any]) -> str:
    """Which data a tenant's cells are of."""
    return next((split for split in SHOWN if split in entry["scores"]), "-")


def tenant_cells(entry: dict[str, Any], *, f1: bool) -> list[str]:
    """metric, base, adapter, f1 of both if asked, n and loss."""
    split, records = data_of(entry), entry["scores"]
    base, adapter = records.get(f"{split}_base"), records.get(split)
    held, metric = adapter or {}, entry["metric"]
    also = [number(record, "f1") for record in (base, adapter)] * f1
    n, loss = str(held.get("count", "-")), number(adapter, "loss", error=False)
    return [metric or "-", number(base, metric), number(adapter, metric), *also, n, loss]


def metrics_of(record: dict[str, Any]) -> list[str]:
    """The metrics of a record, its own first and the loss last."""
    names = [name for name in record["values"] if not name.endswith("_stderr")]
    return sorted(names, key=lambda name: (name != record["metric"], name == "loss"))


def number(record: dict[str, Any] | None, metric: str | None, *, error: bool = True) -> str:
    """ "0.8833 ± 0.0402"; "-" if it was not measured."""
    values = record["values"] if record else {}
    return with_error(values.get(metric), values.get(f"{metric}_stderr") if error else None)
