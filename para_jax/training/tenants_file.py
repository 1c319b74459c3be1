"""tenants.json: the tenants of a run that have ended, by name, with their scores (runs.train.TenantsResult)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import atomic
from ..config import shorten
from .metrics_file import is_number, is_step
from .scores_file import is_records

FILE = "tenants.json"
#: The file that only a comparison of methods has. Its folder holds a run folder for each method (runs/compare.py).
COMPARISON_FILE = "comparison.json"
ENDINGS = ("done", "patience", "not finite")


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The tenants of a run that have ended; none if the file does not exist yet.

    Raises ValueError, naming the file and the tenant, for an entry that no run wrote.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    if not file.is_file():
        raise damaged(file, "not a file")
    try:
        entries = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"not JSON ({shorten(str(error))})") from None
    if not isinstance(entries, dict):
        raise damaged(file, f"{shorten(entries)} is not a mapping of tenants")
    for name, entry in entries.items():
        if not name.isprintable() or not isinstance(entry, dict):
            raise damaged(file, f"{shorten(name)}: {shorten(entry)} is not a tenant's entry")
        wrong = next((key for key, fits in FIELDS.items() if key not in entry or not fits(entry[key])), None)
        if wrong:
            raise damaged(file, f"{shorten(name)}: {wrong} is {shorten(entry.get(wrong))}")
    return entries


def write_entries(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Replaces the file, a line for each tenant."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    atomic.write_text(folder / FILE, f"{{\n{lines}\n}}\n")


def is_score_or_none(value: Any) -> bool:
    return value is None or is_number(value)


def is_text_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.isprintable())


FIELDS = {
    "examples": is_step,
    "steps": is_step,
    "best_step": is_step,
    "best_score": is_score_or_none,
    "metric": is_text_or_none,
    "test_before": is_score_or_none,
    "test_after": is_score_or_none,
    "ended": lambda value: value in ENDINGS,
    "warning": is_text_or_none,
    "scores": is_records,
}


def warning_lines(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each tenant that something went wrong with: "warning: acme: loss rose from 6.1 to 7.4; ...\"."""
    return [f"warning: {name}: {entry['warning']}" for name, entry in entries.items() if entry.get("warning")]


def damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file}: {what}. Restore it from a copy, or train again into another output_dir")
