"""Messages go through Python's logging: silent in a library, shown by the command line and on request."""

import subprocess
import sys

import jax
import pytest
from tqdm import tqdm

from para_jax.io.messages import LOGGER, StderrHandler, log_to_stderr, say, warn


def test_only_the_first_process_speaks(capsys, monkeypatch):
    say("one")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    say("two")
    warn("three")
    assert capsys.readouterr() == ("", "one\n")


def test_a_message_takes_no_device(capsys, monkeypatch):
    def taken():
        raise AssertionError("asked for the devices")

    monkeypatch.setattr(jax, "process_index", taken)
    say("one")
    assert capsys.readouterr() == ("", "one\n")


def test_warnings_are_marked(capsys):
    warn("no room")
    assert capsys.readouterr().err == "warning: no room\n"


def test_a_message_with_percent_signs_is_literal(capsys):
    say("100% of %s")
    assert capsys.readouterr().err == "100% of %s\n"


def test_a_message_does_not_break_a_progress_bar(capsys):
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        say("half")
    assert "\rhalf\n" in capsys.readouterr().err.replace(" ", "")


def test_without_stderr_no_message_goes_to_stdout(capsys, monkeypatch):
    """As in `para-jax generate ... 2>&- > answers.txt`."""
    monkeypatch.setattr(sys, "stderr", None)
    say("one")
    assert capsys.readouterr().out == ""


def test_showing_messages_twice_adds_one_handler():
    log_to_stderr()
    log_to_stderr()
    assert sum(isinstance(handler, StderrHandler) for handler in LOGGER.handlers) == 1


@pytest.mark.parametrize(("before", "expected"), [
    ("", "act\n"),
    ("para_jax.log_to_stderr()", "note\nwarning: act\n"),
    ("para_jax.log_to_stderr(logging.WARNING)", "warning: act\n"),
    ("logging.getLogger('para_jax').setLevel(logging.ERROR)", ""),
    ("logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')", "para_jax note\npara_jax act\n"),
])  # fmt: skip
def test_a_program_sees_warnings_and_on_request_all_messages(before, expected):
    code = f"import logging, para_jax; {before}\nfrom para_jax.io.messages import say, warn; say('note'); warn('act')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == expected
