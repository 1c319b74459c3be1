"""The JSON file of --results."""

from __future__ import annotations

from ..io.messages import say


def write_results(options, config, scores: dict, seconds: float) -> None:
    """Writes the file. Call it before the command prints anything, so that a closed output or a full disk can't lose
    the scores."""
    from ..io.record_file import write_record
    from ..reports.inspect import results

    write_record(options.results, results(options.command_line, config, scores, seconds))
    say(f"wrote {options.results}")
