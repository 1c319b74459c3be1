"""A trace contains the requested steps, also if the run ends or resumes within them."""

import jax
import jax.numpy as jnp
import pytest

from para_jax.config import ProfilerSection
from para_jax.training.profiler import Profiler


@pytest.fixture
def calls(monkeypatch):
    """The calls of jax.profiler, which does nothing here."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(section, folder, calls, steps):
    profiler = Profiler(section, folder)
    for step in steps:
        profiler.before(step)
        calls.append(step)
        profiler.after(step, jnp.zeros(()))
    profiler.close()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 7), [1, 2, "start profile", 3, 4, "stop", 5, 6]),
        (range(1, 4), [1, 2, "start profile", 3, "stop"]),  # the run ends among them
        (range(4, 7), ["start profile", 4, "stop", 5, 6]),  # it resumes among them
        (range(5, 7), [5, 6]),  # or behind them
    ],
)
def test_the_requested_steps_are_traced(steps, expected, tmp_path, calls):
    run(ProfilerSection(start_step=3, steps=2), tmp_path, calls, steps)
    assert calls == expected


def test_nothing_is_traced_by_default(tmp_path, calls):
    run(ProfilerSection(), tmp_path, calls, range(1, 4))
    assert calls == [1, 2, 3]
