"""A worker loads once and answers shards."""

from pathlib import Path

import pytest
from tiny_run import strong_adapters, words, write_rows

from para_jax.cli import generate
from para_jax.ray.jobs import command_options
from para_jax.ray.workers import GenerationWorker
from para_jax.serving.job_merge import merge_jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    strong_adapters(folder, [f"tenants/t{i}" for i in range(4)])
    write_rows(folder / "in.jsonl", [{"prompt": words(range(20, 24 + i)), "tenant": f"t{i}"} for i in range(4)])
    return folder


def answer(worker, index, output):
    return worker({"index": [index], "output": [str(output)]})


@pytest.mark.long
def test_a_worker_loads_once_and_its_shards_can_be_merged(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"backbone": "backbone", "adapters": ["tenants/*"], "input": Path("in.jsonl"), "max_new_tokens": 3}
    call = command_options("generate", given | {"output": tmp_path, "max_length": 32, "allow_cpu": True})
    monkeypatch.chdir(folder)
    call.sources, call.tenants = generate.checked(call)
    monkeypatch.chdir(tmp_path)
    worker, outputs = GenerationWorker(call, str(folder), 2), [tmp_path / "0", tmp_path / "1"]
    assert answer(worker, 1, outputs[1]) == {"index": [1]}
    loaded = worker.loaded
    assert answer(worker, 0, outputs[0]) == {"index": [0]}
    assert worker.loaded is loaded
    assert merge_jobs(outputs, tmp_path / "merged") == (4, 0)
    with pytest.raises(ValueError, match="is the output of shard 1/2"):
        answer(worker, 0, outputs[1])
