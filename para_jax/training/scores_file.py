"""scores.json: the last scores of a run of one adapter, which `inspect` shows. tenants.json: those of a run of many, by
tenant, once a tenant has ended (runs.train.TenantsResult).

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

SCORES, TENANTS = "scores.json", "tenants.json"
#: One record by name.
Records = dict[str, dict[str, Any]]


def read_scores(folder: Place) -> Records:
    """The records of a run folder; none if the file does not exist."""
    file = folder / SCORES
    return atomic.read_json(file, "Delete it, and the same command writes it again") if file.exists() else {}


def write_scores(folder: Place, records: Records) -> None:
    atomic.write_text(folder / SCORES, json.dumps(records, indent=1) + "\n")


def read_entries(folder: Place) -> dict[str, dict[str, Any]]:
    """The tenants of a run that have ended; none if the file does not exist yet."""
    file = folder / TENANTS
    return atomic.read_json(file, "Delete it, and the same command writes it again") if file.exists() else {}


def write_entries(folder: Place, entries: dict[str, dict[str, Any]]) -> None:
    """Replaces the file, a line for each tenant."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    atomic.write_text(folder / TENANTS, f"{{\n{lines}\n}}\n")


def warning_lines(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each tenant that something went wrong with: "warning: acme: loss rose from 6.1 to 7.4; ...\"."""
    return [f"warning: {name}: {entry['warning']}" for name, entry in entries.items() if entry.get("warning")]
