"""Long work shows a bar where someone watches, and a line now and then elsewhere; short work shows nothing."""

import io
import sys
import types

import jax
import pytest

from para_jax.io import progress
from para_jax.io.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Shows work at once, and lines without a pause."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 1e-9)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal; to call in the test, since pytest sets stderr after the fixtures."""

    def made():
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return made


def steps(count, **how):
    with Progress("training", count, unit="step", **how) as bar:
        bar._bar.mininterval = 0
        for i in range(count):
            bar.advance(loss=f"{1 - i / 100:.2f}", **{"tokens/s": 350})


def test_a_log_has_lines_with_the_time_left(capsys):
    steps(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"training: {i} of 3 steps" for i in (1, 2, 3)]
    assert "loss 0.99, 350 tokens/s, " in lines[1] and lines[1].endswith(" left")


def test_a_log_has_one_line_per_pause(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 15.0)
    steps(60)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_work_of_less_than_two_seconds_shows_nothing(capsys, monkeypatch, terminal):
    monkeypatch.setattr(progress, "SHOWN_AFTER", 2.0)
    steps(19)
    assert capsys.readouterr() == ("", "")
    shown = terminal()
    steps(19, keep=True)
    assert shown.getvalue() == ""


def test_an_unknown_total_is_a_count(capsys):
    with Progress("tokenising", unit="example") as bar:
        bar._bar.mininterval = 0
        bar.advance(1000)
    assert capsys.readouterr().err.startswith("tokenising: 1000 examples, ")


def test_a_terminal_has_a_bar_and_no_lines(terminal):
    shown = terminal()
    steps(10, keep=True, done=0)
    assert "training:  10%" in shown.getvalue() and "| 10/10 [" in shown.getvalue() and "loss 0.91" in shown.getvalue()
    assert shown.getvalue().endswith("\n") and shown.getvalue().count("\n") == 1


def test_a_bar_disappears_after_work_that_does_not_keep_it_and_after_an_exception(terminal):
    shown = terminal()
    steps(3)
    with pytest.raises(KeyError), Progress("training", 3, keep=True) as bar:
        bar.advance()
        raise KeyError
    assert "\n" not in shown.getvalue() and shown.getvalue().endswith("\r")


def test_a_resumed_run_goes_on_from_its_step(terminal):
    shown = terminal()
    with Progress("training", 60, unit="step", done=30) as bar:
        bar._bar.mininterval = 0
        bar.advance()
    assert "31/60" in shown.getvalue() and bar.done == 31


def test_tqdm_disable_gives_lines_instead_of_bars(terminal, monkeypatch):
    shown = terminal()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    steps(2)
    assert shown.getvalue().startswith("training: 1 of 2 steps, loss 1.00")


def test_a_notebook_has_a_bar_although_it_is_no_terminal(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.shows_bars()


def test_only_the_first_process_shows_anything(terminal, monkeypatch):
    shown = terminal()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    steps(10)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    steps(10)
    assert shown.getvalue() == ""
