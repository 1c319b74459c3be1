"""Fails a test session that skips a test without a listed reason, so that no test goes quiet unseen."""

from pathlib import Path

import pytest


def fail_unlisted(session: pytest.Session, listed: Path) -> None:
    """For conftest's pytest_sessionfinish. `listed` has a line for each test that may be skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])] if reporter else []
    unexpected = unexpected_skips(skipped, listed.read_text())
    if unexpected:
        reporter.write_line(f"\nskipped, but not in tests/{listed.name}: {', '.join(unexpected)}", red=True)
        session.exitstatus = 1


def unexpected_skips(skipped: list[str], allowed: str) -> list[str]:
    """The node ids that no line of the list begins. A line without a reason allows nothing."""
    lines = [line.partition(" # ") for line in allowed.splitlines() if not line.startswith("#")]
    starts = tuple(start.strip() for start, _, reason in lines if start.strip() and reason.strip())
    return [node for node in skipped if not node.startswith(starts)]
