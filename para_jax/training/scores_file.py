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

FILE = "scores.json"
#: One record by name.
Records = dict[str, dict[str, Any]]


def read_scores(folder: Place) -> Records:
    """The records of a run folder; none if the file does not exist."""
    file = folder / FILE
    return atomic.read_json(file, "Delete it, and the same command writes it again") if file.exists() else {}


def write_scores(folder: Place, records: Records) -> None:
    atomic.write_text(folder / FILE, json.dumps(records, indent=1) + "\n")
