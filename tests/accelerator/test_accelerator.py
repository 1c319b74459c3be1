"""`pytest -m accelerator` checks on the machine's TPU or GPU what the other tests check on CPUs. See checks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accelerator.checks import CHECKS

TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(map(str, (TESTS, TESTS / "helpers", TESTS.parent)))


def run(*names, **variables):
    """The checks in a process that has its own choice of devices."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"PYTHONPATH": PYTHONPATH, "PARA_JAX_TEST_DEVICES": "own"}
    command = [sys.executable, "-m", "accelerator.checks", *names]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.accelerator
@pytest.mark.parametrize("name", CHECKS)
def test_on_an_accelerator(name):
    assert f"{name}: holds" in run(name)


@pytest.mark.slow
def test_the_checks_themselves_run(tmp_path):
    """On a CPU, so that no check fails on its first day for a reason of its own."""
    said = run(PARA_JAX_CHECKS_ON_CPU="1", JAX_PLATFORMS="cpu")
    assert all(f"{name}: holds" in said for name in CHECKS)


def test_without_an_accelerator_the_checks_say_so():
    done = subprocess.run(
        [sys.executable, "-m", "accelerator.checks"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "PARA_JAX_CHECKS_ON_CPU" in done.stderr
