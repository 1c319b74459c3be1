"""The record of a measurement: what was run, where, and what was measured; as a JSON file and as a printed table."""

from __future__ import annotations

from pathlib import Path

from ..io.record_file import write_record
from ..io.table import table


def report(record: dict, file: Path | None) -> None:
    """Writes a record to a JSON file, if one is given, and prints it as a table."""
    if file is not None:
        write_record(file, record)
    print(table(table_rows(record), left=(0, 1)))
    if file is not None:
        print(f"wrote {file}")


def table_rows(measured: dict) -> list[tuple[str, str]]:
    """A record as the rows of a table."""
    rows = []
    for name, value in measured["medians"].items():
        rows.append((name, f"{value:.1f} {measured['unit']}" if value >= 10 else f"{value:.3f} {measured['unit']}"))
    byte_ratios = measured.get("byte_ratios", {})
    for name, value in measured.get("ratios", {}).items():
        rows.append((name, f"{value:.3f}" + (f"   bytes {byte_ratios[name]:.3f}" if byte_ratios else "")))
    for method, values in measured.get("latencies_ms", {}).items():
        rows += [(f"{method}: {name}", f"{value:.0f} ms") for name, value in values.items()]
    for method, share in measured.get("live_slots", {}).items():
        rows.append((f"{method}: live slots while requests wait", f"{share:.2f} of all"))
    for name, part in measured.get("parts", {}).items():
        rows += [(f"{name}: {of_part}", value) for of_part, value in table_rows(part)]
    return rows
