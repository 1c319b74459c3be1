"""A run that was killed in any phase, as often as may be, and given the same command again, ends with the bits and the
log of one that was never stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import quick_compiler
from long_cases import slow
from tiny_run import rows_of_text, run_config, run_folder, write_rows

from para_jax.config import save_config
from para_jax.training.log import TIMES

CHILD = Path(__file__).parents[1] / "helpers" / "killed_run.py"
PHASES = ("before the first save", "save", "evaluation", "step")
LIMIT = 400  # seconds, for a child that hangs
LINGER = "0.04"  # seconds before and after the work of a phase, in a child that is to be killed


@pytest.fixture(scope="module", params=[slow("one adapter"), "three tenants"])
def folder(tmp_path_factory, request):
    """A run of 24 steps that saves every second one and evaluates every fourth; or of three tenants with places for
    two, of whom the first ends in the middle."""
    folder = run_folder(tmp_path_factory.mktemp("kills"))
    shared = ("eval.every=4", "checkpoint.every=2")
    if request.param == "one adapter":
        config = run_config(folder, "train.max_steps=24", *shared)
    else:
        for seed, (name, size) in enumerate({"acme": 8, "globex": 24, "initech": 12}.items()):
            write_rows(folder / "tenants" / name / "train.jsonl", rows_of_text(size, seed=seed))
            write_rows(folder / "tenants" / name / "validation.jsonl", rows_of_text(8, seed=seed + 10))
        own = ("train.rows_per_tenant=4", "train.num_epochs=3", "train.max_steps=null", "train.tenants_at_once=2")
        config = run_config(folder, f"data.tenants={folder / 'tenants'}", *own, *shared)
    save_config(config, folder / "run.yaml")
    return folder


@pytest.fixture(scope="module")
def unkilled(folder):
    child = start(folder, "unkilled")
    _, errors = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, errors
    found = result(folder / "unkilled")
    steps = [row["step"] for row in found.logs["."] if "loss" in row]
    assert steps == list(range(1, 25 if len(found.adapters) == 1 else 19))
    return found


class Result(NamedTuple):
    """What a run leaves that does not depend on the time it took, by folder: of a run of tenants each has its own."""

    adapters: dict[str, str]
    logs: dict[str, list[dict]]
    entries: str
    """of the tenants that have ended"""


def result(output: Path) -> Result:
    adapters = {
        str(file.parent.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in output.rglob("adapter_model.safetensors")
    }
    logs = {}
    for file in output.rglob("metrics.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        logs[str(file.parent.relative_to(output))] = kept
    entries = output / "tenants.json"
    return Result(adapters, logs, entries.read_text() if entries.exists() else "")


def start(folder: Path, output: str, linger: str = "0") -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": quick_compiler.FLAGS + quick_compiler.OLD_EMITTERS,
        "PYTHONUNBUFFERED": "1",
        "LINGER": linger,
    }
    command = [sys.executable, str(CHILD), "train", str(folder / "run.yaml"), f"output_dir={folder / output}"]
    child = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    timer = threading.Timer(LIMIT, child.kill)  # so that no read of its lines waits for ever
    timer.daemon = True
    timer.start()
    return child


def saved(output: Path) -> bool:
    return any(path.name.isdecimal() for path in output.glob("checkpoints/*"))


def phase(said: list[str], saved_before: bool) -> str:
    """The phase that a child was in when it said no more."""
    if said.count("save") > said.count("written"):
        return "save"
    doing = next((line for line in reversed(said) if line != "written"), "")
    if doing == "evaluation":
        return doing
    return "step" if saved_before or "written" in said else PHASES[0]


def kill_in(wanted: str, folder: Path, output: str, draw: np.random.Generator) -> str:
    """Starts the run, kills it a moment after a phase began, and gives back the phase that it was killed in."""
    saved_before, said = saved(folder / output), []
    child = start(folder, output, LINGER)
    try:
        passes = int(draw.integers(1, 3)) if wanted in ("step", "save") else 1
        assert child.stdout
        while passes:
            line = child.stdout.readline().strip()
            assert line, child.stderr and child.stderr.read()
            said.append(line)
            begins = line == ("step" if wanted == PHASES[0] else wanted)
            passes -= begins and phase(said, saved_before) == wanted
        time.sleep(draw.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate(timeout=LIMIT)
    finally:
        child.kill()
    assert child.returncode == -signal.SIGKILL
    return phase(said + rest.splitlines(), saved_before)


def killed_run(folder: Path, output: str, kills: int, seed: int) -> list[str]:
    """The phases of so many kills, each of which occurred. The first save is yet to come for the first kill only."""
    draw, found = np.random.default_rng(seed), []
    while len(found) < kills or set(found) != set(PHASES):
        assert len(found) < kills + 4, found
        missing = [name for name in PHASES if name not in found]
        wanted = missing[0] if missing else str(draw.choice(PHASES[1:]))
        found.append(kill_in(wanted, folder, output, draw))
        print(f"kill {len(found)}: meant for {wanted}, fell in {found[-1]}")
    return found


@pytest.mark.long
def test_a_run_killed_in_every_phase_and_then_stopped_ends_as_an_undisturbed_one(folder, unkilled):
    """SIGTERM exits with 0 and one line that says how to resume."""
    killed_run(folder, "killed", kills=4, seed=0)
    child = start(folder, "killed", LINGER)
    assert child.stdout
    assert any(line.strip() == "written" for line in child.stdout)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, errors
    assert "and saved; the same command resumes" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    child = start(folder, "killed")
    _, errors = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, errors
    assert result(folder / "killed") == unkilled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_twenty_kills_at_other_moments_change_nothing(seed, folder, unkilled):
    output = f"killed-{seed}"
    found = killed_run(folder, output, kills=5, seed=seed)
    assert len(found) >= 5
    child = start(folder, output)
    _, errors = child.communicate(timeout=LIMIT)
    assert child.returncode == 0, errors
    assert result(folder / output) == unkilled
