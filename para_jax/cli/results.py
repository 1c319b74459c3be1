"""The JSON file of --results."""

from __future__ import annotations


def write_results(options, config, scores: dict, seconds: float) -> None:
    """Writes the file. It comes before everything that a command prints: a reader that has closed the output, or a full
    disk, must not cost the scores."""
    from ..inspect import results
    from ..messages import say
    from ..record_file import write_record

    write_record(options.results, results(options.command_line, config, scores, seconds))
    say(f"wrote {options.results}")
