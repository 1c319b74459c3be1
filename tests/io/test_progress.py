"""Long work shows a bar where someone watches, and a line every 15 seconds elsewhere; short work shows nothing."""

import fcntl
import io
import os
import struct
import sys
import termios
import types

import jax
import pytest

from para_jax.io import progress
from para_jax.io.progress import Progress, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Timer:
    """A threading.Timer that a test lets end by hand."""

    def __init__(self, seconds, call):
        self.seconds, self.end, self.cancelled = seconds, call, False
        Timer.last = self

    def start(self):
        pass

    def cancel(self):
        self.cancelled = True


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress.threading, "Timer", Timer)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    """Makes stderr a terminal; to call in the test, since pytest sets stderr after the fixtures."""

    def made():
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return made


def steps(clock, count, seconds, **how):
    with Progress("training", count, unit="step", clock=clock, **how) as bar:
        for i in range(count):
            clock.sleep(seconds)
            bar.advance(loss=f"{1 - i / 100:.2f}")


def test_a_log_has_a_line_every_15_seconds_with_the_time_left(clock, capsys):
    steps(clock, 60, 4.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: step 1 of 60, loss 1.00"  # no rate is known yet
    assert lines[1] == "training: step 5 of 60, loss 0.96, 4.4 s per step, 4 min left"
    assert lines[2] == "training: step 9 of 60, loss 0.92, 4.4 s per step, 4 min left"
    assert len(lines) == 1 + 14 + 1 and lines[-1] == "training took 4 min"


def test_compiling_before_the_first_unit_does_not_count_as_its_time(clock, capsys):
    with Progress("scoring", 100, unit="answer", clock=clock) as bar:
        clock.sleep(60)
        for _ in range(40):
            bar.advance(**{"tokens/s": 350})
            clock.sleep(0.5)
    assert "scoring: 31 of 100 answers, 350 tokens/s, 34 s left" in capsys.readouterr().err.splitlines()


def test_the_time_of_an_answer_is_written_with_an(clock, capsys):
    with Progress("scoring", 96, unit="answer", clock=clock) as bar:
        for _ in range(5):
            clock.sleep(16)
            bar.advance()
    assert "scoring: 2 of 96 answers, 16.0 s per answer, 25 min left" in capsys.readouterr().err.splitlines()


def test_compiling_later_does_not_count_either(clock, capsys):
    with Progress("training", 9, unit="step", clock=clock) as bar:
        for i in range(9):
            with bar.away():
                clock.sleep(50 * (i == 2))
            clock.sleep(4)
            bar.advance()
    assert "training: step 3 of 9, 4.0 s per step, 24 s left" in capsys.readouterr().err.splitlines()


def test_a_unit_done_while_compiling_does_not_count_as_a_quick_one(clock, capsys):
    with Progress("training", 9, unit="step", clock=clock) as bar:
        for i in range(5):
            with bar.away(int(i in (0, 1))):  # two shapes, each compiled with its first step
                clock.sleep(50 * (i in (0, 1)))
            clock.sleep(8 * (i not in (0, 1)))
            bar.advance()
    assert capsys.readouterr().err.splitlines()[:4] == [
        "training: step 1 of 9",
        "training: step 2 of 9",
        "training: step 4 of 9, 8.0 s per step, 40 s left",
        "training took 2 min",
    ]


def test_work_of_less_than_two_seconds_shows_nothing(clock, capsys):
    steps(clock, 19, 0.1)
    assert capsys.readouterr() == ("", "") and Timer.last.cancelled


def test_work_that_nothing_advances_is_named_after_two_seconds(clock, capsys):
    with Progress("saving the checkpoint", clock=clock):
        assert Timer.last.seconds == 2.0
        clock.sleep(2)
        Timer.last.end()
        assert capsys.readouterr().err == "saving the checkpoint ...\n"
        clock.sleep(20)
    assert capsys.readouterr().err == "saving the checkpoint took 22 s\n"


def test_a_real_timer_does_so_and_ends_with_the_work(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.01)
    with Progress("loading", 3, unit="tensor") as bar:
        bar._timer.join(5)
        assert capsys.readouterr().err == "loading: 0 of 3 tensors\n"
    assert not bar._timer.is_alive()


def test_an_unknown_total_is_a_count(clock, capsys):
    with Progress("tokenising", unit="example", clock=clock) as bar:
        for _ in range(2):
            clock.sleep(16)
            bar.advance(1000)
    assert capsys.readouterr().err.splitlines()[:2] == ["tokenising: 1000 examples", "tokenising: 2000 examples"]


def test_nothing_is_written_after_an_exception(clock, capsys):
    with pytest.raises(KeyError), Progress("training", 9, unit="step", clock=clock) as bar:
        clock.sleep(3)
        bar.advance()
        capsys.readouterr()
        raise KeyError
    Timer.last.end()
    bar.advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_and_no_lines(clock, terminal):
    terminal = terminal()
    steps(clock, 10, 3, keep=True)
    shown = terminal.getvalue()
    assert "training:  10%" in shown and "| 10/10 [" in shown and "loss 0.91" in shown
    assert shown.endswith("\n") and shown.count("\n") == 1


def test_a_bar_disappears_after_work_that_does_not_keep_it_and_after_an_exception(clock, terminal):
    terminal = terminal()
    steps(clock, 3, 3)
    assert "\n" not in terminal.getvalue() and terminal.getvalue().endswith("\r")
    with pytest.raises(KeyError), Progress("training", 3, keep=True, clock=clock) as bar:
        clock.sleep(3)
        bar.advance()
        raise KeyError
    assert "\n" not in terminal.getvalue() and terminal.getvalue().endswith("\r")


def test_a_resumed_run_goes_on_from_its_step(clock, terminal):
    terminal = terminal()
    with Progress("training", 60, unit="step", done=30, clock=clock) as bar:
        for _ in range(2):
            clock.sleep(4)
            bar.advance()
    assert "31/60" in terminal.getvalue()


def test_tqdm_disable_gives_lines_instead_of_bars(clock, terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    steps(clock, 2, 3)
    assert terminal.getvalue() == "training: step 1 of 2, loss 1.00\ntraining took 6 s\n"


def test_a_notebook_has_a_bar_although_it_is_no_terminal(clock, monkeypatch, capsys):
    drawn = []
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    real = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **how: drawn.append(how["desc"]) or real(**how))
    steps(clock, 3, 3)
    assert drawn == ["training"] and "step 1 of 3" not in capsys.readouterr().err


def test_only_the_first_process_shows_anything(clock, terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    steps(clock, 10, 3)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    steps(clock, 10, 3)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (7800, "2 h 10 min")]
)
def test_a_time_is_said_in_the_unit_that_people_use(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("has", [(), ("isatty",)])
def test_an_object_in_place_of_stderr_may_only_write(has, monkeypatch):
    """As programs have it that copy what is shown into a file."""
    copy = types.SimpleNamespace(write=len, flush=bool, **{name: lambda: True for name in has})
    monkeypatch.setattr(sys, "stderr", copy)
    assert progress.shows_bars() == bool(has)


@pytest.mark.parametrize(("columns", "bars"), [(80, True), (0, False)])
def test_a_terminal_without_a_width_gets_lines(columns, bars, monkeypatch, clock):
    """tqdm draws nothing there."""
    ours, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30 if columns else 0, columns, 0, 0))
    with os.fdopen(other, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert progress.shows_bars() == bars
    os.close(ours)
