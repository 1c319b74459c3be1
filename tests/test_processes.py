"""Two processes of four devices, joined over loopback, are one run: its numbers are those of one process of eight
devices, and the first process alone logs, reads and writes the run's folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import run_config, run_folder
from two_processes import run_two

from para_jax import load_adapter, load_model_config, processes, train
from para_jax.config import save_config

OVERRIDES = (
    "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.per_device_batch_size=2", "train.schedule=constant",
    "train.warmup_ratio=0", "eval.metric=exact_match", "eval.test=true", "train.max_steps=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("processes"))


def train_two(folder, *overrides):
    """`para-jax train` on two hosts without a common disk: each has an output_dir of its own."""
    save_config(run_config(folder, *OVERRIDES), folder / "run.yaml")
    among = ("runtime.coordinator={address}", "runtime.num_processes=2", "runtime.process_id={process}")
    own = (f"output_dir={folder / 'first'}", f"output_dir={folder / 'second'}")
    return run_two("-m", "para_jax.cli", "train", str(folder / "run.yaml"), own, *among, *overrides)


@pytest.fixture(scope="module")
def pair(folder):
    """What the two processes said in a run of three steps, and when it went on to the sixth."""
    return [train_two(folder, "train.max_steps=3"), train_two(folder)]


@pytest.fixture(scope="module")
def alone(folder):
    """The same run by this process's eight devices, never stopped."""
    config = run_config(folder, *OVERRIDES, f"output_dir={folder / 'alone'}")
    return train(config)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows if "test_after_loss" not in row]


def test_two_processes_that_stop_and_resume_have_the_numbers_of_one(pair, alone, folder):
    assert [[ended.code for ended in both] for both in pair] == [[0, 0], [0, 0]], pair[-1][0].err
    ours, theirs = metrics(folder / "first"), metrics(folder / "alone")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        np.testing.assert_allclose(list(mine.values()), list(other.values()), atol=1e-5)
    model = load_model_config(folder / "backbone")
    mine, other = (load_adapter(folder / name / "adapter", model) for name in ("first", "alone"))
    np.testing.assert_allclose(mine.down[...], other.down[...], atol=1e-5)
    for site, up in mine.up.items():
        assert abs(up[...]).max() > 1e-2
        np.testing.assert_allclose(up[...], other.up[site][...], atol=1e-5)


def test_the_first_process_alone_speaks_and_has_a_folder(pair, folder):
    for first, second in pair:
        assert "devices: 8 x cpu" in first.err and "steps" in first.out
        assert second.out == "" and "step" not in second.err and "devices" not in second.err
    assert {path.name for path in (folder / "first").iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints"}
    assert not (folder / "second").exists()
