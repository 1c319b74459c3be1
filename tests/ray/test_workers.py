"""A worker loads once and answers shards, reports what a user can correct, and ends for anything else."""

import json
import os

import pytest
from tiny_run import strong_adapters, words, write_rows

from para_jax.ray.claim import claim_output
from para_jax.ray.command import arguments
from para_jax.ray.workers import MOST_DEATHS, GenerationWorker, ShardWorker
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
    line = arguments("generate", [], [], given | {"max_length": 32, "allow_cpu": True})
    worker, outputs = GenerationWorker(line, str(folder), 2), [tmp_path / "0", tmp_path / "1"]
    assert answer(worker, 1, outputs[1]) == {"index": [1], "error": [""]}
    loaded = worker.loaded
    assert answer(worker, 0, outputs[0]) == {"index": [0], "error": [""]}
    assert worker.loaded is loaded
    assert merge_jobs(outputs, tmp_path / "merged") == (4, 0)
    assert "2/2" in answer(worker, 2, outputs[0])["error"][0]
    assert "is the output of shard 1/2" in answer(worker, 0, outputs[1])["error"][0]
    assert not list(tmp_path.glob("*.deaths"))


class Ended(BaseException):
    pass


class Failing(ShardWorker):
    error: BaseException = RuntimeError("the device\nfailed")

    def load(self, options):
        return options

    def answer(self, options):
        raise self.error


def test_a_worker_ends_for_an_error_that_no_user_made_and_says_so_when_too_many_have(tmp_path, monkeypatch, capsys):
    def end(code):
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    line = arguments("generate", [], [], {})
    for death in range(1, MOST_DEATHS + 1):
        with pytest.raises(Ended):
            answer(Failing(line, "nowhere", 2), 0, tmp_path / "0")
        assert len(json.loads((tmp_path / "0.deaths").read_text())) == death
    assert "the device" in capsys.readouterr().err
    said = answer(Failing(line, "nowhere", 2), 0, tmp_path / "0")["error"][0]
    assert said == "4 workers ended at it; the last one: RuntimeError: the device\\nfailed"


def test_a_kill_counts_and_a_users_mistake_does_not(tmp_path, monkeypatch):
    worker = Failing(arguments("generate", [], [], {}), "nowhere", 2)
    for error in (ValueError("wrong file"), OSError("disk full")):
        monkeypatch.setattr(Failing, "error", error)
        assert answer(worker, 0, tmp_path / "0")["error"] == [str(error)]
        assert not (tmp_path / "0.deaths").exists()
    monkeypatch.setattr(Failing, "error", Ended())
    with pytest.raises(Ended):  # as a kill, it leaves the file as it is
        answer(worker, 0, tmp_path / "0")
    assert json.loads((tmp_path / "0.deaths").read_text()) == ["it was killed, or its host was lost"]
    for text in ("", "3", "[" * 100_000):  # damaged: counted from the start
        (tmp_path / "0.deaths").write_text(text)
        monkeypatch.setattr(Failing, "error", ValueError("wrong file"))
        assert answer(worker, 0, tmp_path / "0")["error"] == ["wrong file"]


@pytest.mark.parametrize("error", [None, ValueError("another process writes it")])
def test_the_same_call_made_twice_fails_no_shard_of_the_other(tmp_path, monkeypatch, error):
    """A call begins by removing the files of deaths, also those of shards that are being answered."""

    def answer_meanwhile(self, options):
        claim_output(tmp_path / "out", tmp_path, [], 2)
        if error is not None:
            raise error

    claim_output(tmp_path / "out", tmp_path, [], 2)
    monkeypatch.setattr(Failing, "answer", answer_meanwhile)
    worker = Failing(arguments("generate", [], [], {}), "nowhere", 2)
    assert answer(worker, 0, tmp_path / "0")["error"] == [str(error or "")]
