"""A device without room is an error of two lines, and any other failure of a program keeps its traceback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.cli import main, parser, subparsers
from para_jax.cli.out_of_memory import ADVICE, out_of_memory

TPU = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space {space}. \
Used 21.95G of 15.48G {space}. Exceeded {space} capacity by 6.47G.

Total {space} usage >= 22.47G:
    reserved        530.00M"""


def fail_with(monkeypatch, of):
    monkeypatch.setattr("para_jax.cli.train.load_config", lambda *_: of())
    return main(["train", "run.yaml"])


@pytest.mark.parametrize("of", [lambda: jnp.zeros(2**46), lambda: np.zeros(2**55)], ids=["device", "host"])
def test_no_room_is_two_lines_with_the_size_and_what_to_do(of, monkeypatch, capsys):
    assert fail_with(monkeypatch, of) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "out of memory" in first and ("281474976710656" in first or "PiB" in first)
    assert "train.per_device_batch_size" in second


def test_the_compilers_first_line_is_shown_and_not_its_table():
    said = out_of_memory(jax.errors.JaxRuntimeError(TPU.format(space="hbm")), "serve")
    assert said.count("\n") == 1 and "Used 21.95G of 15.48G hbm" in said and "--slots" in said


@pytest.mark.parametrize("said", ["INTERNAL: RET_CHECK failure", TPU.format(space="vmem"), "no status"])
def test_another_failure_is_raised(said, monkeypatch):
    def broken():
        raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(jax.errors.JaxRuntimeError, match=said[:20]):
        fail_with(monkeypatch, broken)


def test_every_option_that_is_named_exists():
    for command, advice in ADVICE.items():
        options = {name for action in subparsers(parser())[command]._actions for name in action.option_strings}
        assert {word.strip(",;") for word in advice.split() if word.startswith("--")} <= options, command
