"""A worker loads once and answers shards, reports what a user can correct, and ends for anything else."""

import pytest
from tiny_run import strong_adapters, words, write_rows

from para_jax.ray.command import arguments
from para_jax.ray.workers import GenerationWorker, ShardWorker
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
    given = {"backbone": "backbone", "adapters": ["tenants/*"], "input": "in.jsonl", "max_new_tokens": 3}
    line = arguments("generate", given | {"max_length": 32, "allow_cpu": True})
    worker, outputs = GenerationWorker(line, str(folder), 2), [tmp_path / "0", tmp_path / "1"]
    assert answer(worker, 1, outputs[1]) == {"index": [1], "error": [""]}
    loaded = worker.loaded
    assert answer(worker, 0, outputs[0]) == {"index": [0], "error": [""]}
    assert worker.loaded is loaded
    assert merge_jobs(outputs, tmp_path / "merged") == (4, 0)
    assert "2/2" in answer(worker, 2, outputs[0])["error"][0]
    assert "is the output of shard 1/2" in answer(worker, 0, outputs[1])["error"][0]


@pytest.mark.parametrize(("error", "ends"), [(ValueError("wrong file"), False), (RuntimeError("device failed"), True)])
def test_a_worker_reports_what_a_user_can_correct_and_ends_for_anything_else(tmp_path, monkeypatch, error, ends):
    def answer_badly(*_):
        raise error

    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(ShardWorker, "answer", answer_badly)
    worker, tries = ShardWorker([], "nowhere", 2), tmp_path / "0.tries"
    row = answer(worker, 0, tmp_path / "0")
    assert codes == [1] * ends and row["error"] == ([""] if ends else ["wrong file"])
    assert not tries.exists()
    tries.write_text("....")  # four workers have ended here
    assert answer(worker, 0, tmp_path / "0")["error"] == ["4 workers ended at it; Ray's logs say why"]
