"""The harness itself: what each outcome is, and that a case is made of its number alone."""

import random

import pytest

from .cases import Trial, Wrong, judge
from .runner import table
from .targets import TARGETS


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (raising(ValueError("run.yaml: seed: -1")), "clean"),
        (raising(OSError("run.yaml: no room")), "clean"),
        (lambda: 1, "accepted"),
        (raising(ValueError("no")), "weak"),
        (raising(ValueError("run.yaml: \x1b[31m")), "weak"),
        (raising(ValueError("run.yaml: \ud83d")), "weak"),
        (raising(ValueError("run.yaml" + "\n" * 40)), "weak"),
        (raising(ValueError("run.yaml" + "a" * 4000)), "weak"),
        (raising(TypeError("run.yaml")), "traceback"),
        (raising(BaseException("a panic in Rust")), "traceback"),
        (raising(MemoryError()), "memory"),
        (raising(Wrong("b")), "wrong"),
        (lambda: 2, "wrong"),
        (lambda: None, "traceback"),
    ],
)
def test_each_outcome_is_told_from_the_others(run, kind):
    def check(result):
        if result + 1 != 2:
            raise Wrong("not 1")

    assert judge(Trial(run, ("run.yaml",), check)).kind == kind


@pytest.mark.parametrize("target", ["adapter-lora", "backbone-weights", "config", "rows", "gguf"])
def test_a_case_is_made_of_its_number_alone(target, tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        TARGETS[target].make(random.Random(f"{target} 7"), tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        made.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert made[0] == made[1] and made[0]


def test_the_table_adds_up():
    row = {"clean": 3, "accepted": 2, "weak": 0, "traceback": 0, "hang": 0, "memory": 0, "wrong": 1}
    assert "| all | 12 | 6 | 4 | 0 | 0 | 0 | 0 | 2 |" in table({"a": row, "b": row})
