"""tenants.json: the tenants of a run that have ended, by name, with their scores (runs.train.TenantsResult)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..io import atomic

FILE = "tenants.json"
#: The file that only a comparison of methods has. Its folder holds a run folder for each method (runs/compare.py).
COMPARISON_FILE = "comparison.json"


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The tenants of a run that have ended; none if the file does not exist yet."""
    file = folder / FILE
    advice = "Restore it from a copy, or train again into another output_dir"
    return atomic.read_json(file, advice) if file.exists() else {}


def write_entries(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Replaces the file, a line for each tenant."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    atomic.write_text(folder / FILE, f"{{\n{lines}\n}}\n")


def warning_lines(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each tenant that something went wrong with: "warning: acme: loss rose from 6.1 to 7.4; ...\"."""
    return [f"warning: {name}: {entry['warning']}" for name, entry in entries.items() if entry.get("warning")]
