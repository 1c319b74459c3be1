"""A cluster gives the tables and answers of one process, byte for byte, also when it loses a worker."""

import os
import re
import signal
import sys
import threading
import time
from _thread import interrupt_main
from pathlib import Path

import pytest
from guide_world import in_world, opened_world
from jax._src import xla_bridge
from local_ray import cluster, only_worker, process_that_writes
from stub_worker import StubWorker
from tiny_run import rows_of_text, strong_adapters, words, write_rows

from para_jax import EvalOptions, load_config
from para_jax.cli import main
from para_jax.ray import evaluate_on_ray, generate_on_ray
from para_jax.ray.jobs import run_shards
from para_jax.serving.job_merge import merge_jobs

SHARDS = 3
HERE = {"allow_cpu": True}
EVALUATION = HERE | {"rows": 2}  # as a command's
GENERATION = HERE | {"max_new_tokens": 12, "max_length": 32, "slots": 2, "temperature": 0.7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, five strong tenants, a task, and requests."""
    folder = tmp_path_factory.mktemp("ray")
    strong_adapters(folder, [f"tenants/t{i}" for i in range(5)])
    write_rows(folder / "free" / "test.jsonl", rows_of_text(6, 3))
    lines = [{"prompt": words(range(20 + i, 24 + i)), "tenant": f"t{i % 6}"} for i in range(24)]  # t5 is an error
    write_rows(folder / "in.jsonl", lines)
    return folder


def evaluated(folder, output, **changes):
    config = load_config(None, [f"backbone.source={folder}/backbone", "runtime.allow_cpu=true"])
    given = {"adapters": [f"{folder}/tenants/*"], "tasks": [str(folder / "free")], "options": EvalOptions(rows=2)}
    return evaluate_on_ray(config, output=output, **({"shards": SHARDS, "workers": 2} | given | changes))


def generated(folder, output, input="in.jsonl", **changes):
    options = {"backbone": folder / "backbone", "adapters": [f"{folder}/tenants/*"]}
    options |= {"shards": SHARDS, "workers": 2} | GENERATION | changes
    return generate_on_ray(str(folder / input), output=str(output), **options)


def command_line(name, folder, output, options):
    given = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)[: 2 - (value is True)]
    ]
    made = [name, "--backbone", folder / "backbone", "--adapters", f"{folder}/tenants/*", "--output", output, *given]
    return list(map(str, made))


# ---------------------------------------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": "none.jsonl"}, "none.jsonl: no such file"),
        ({"slot": 3}, "para-jax generate has no option slot;"),
        ({"tenant": ["t9"]}, "no tenant 't9'"),
    ],
)
def test_a_users_mistake_is_told_before_anything_starts(folder, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        generated(folder, tmp_path / "out.jsonl", **changes)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_error_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"ray.* is not installed: pip install 'para_jax\[ray\]'"):
        evaluated(folder, tmp_path / "out")


def in_this_process(worker, call, outputs, *_):
    """For run_shards: one worker, which answers the last shard first."""
    one = worker(call, os.getcwd(), len(outputs))
    for index, output in reversed(list(enumerate(outputs))):
        one({"index": [index], "output": [str(output)]})


@pytest.fixture
def without_a_cluster(monkeypatch):
    """The calls run their workers here. Around that, they must not ask JAX for its devices: those are the workers'."""

    def taken(*_):
        raise AssertionError("took the devices")

    def run_shards(*given):
        with monkeypatch.context() as patch:
            patch.setattr(xla_bridge, "get_backend", get_backend)
            in_this_process(*given)

    get_backend = xla_bridge.get_backend
    monkeypatch.setattr(xla_bridge, "get_backend", taken)
    monkeypatch.setattr("para_jax.ray.jobs.run_shards", run_shards)


@pytest.mark.long
def test_an_evaluation_is_merged_and_a_killed_merge_goes_on(folder, without_a_cluster, tmp_path):
    given = {"tasks": f"{folder}/free:loss", "shards": 8}  # some have no adapter
    table = evaluated(folder, tmp_path / "out", **given)
    assert all(f"| {name} |" in table for name in ("base", "t0", "t1", "t2", "t3", "t4"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "table.md").unlink()
    (tmp_path / "out" / "t1.json").write_text("")
    evaluated(folder, tmp_path / "out", **given)
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(again) == set(files) and again["t1.json"] and again["table.md"] == files["table.md"]


@pytest.mark.long
def test_a_jobs_answers_do_not_depend_on_the_shards(folder, without_a_cluster, tmp_path):
    counts = [generated(folder, tmp_path / f"{shards}.jsonl", shards=shards) for shards in (1, 25)]
    assert counts == [(24, 4), (24, 4)]  # shard 24/25 has no line
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "25.jsonl").read_bytes()


@pytest.mark.long
def test_the_code_of_the_guide_runs(request, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    code = in_world(next(re.finditer(r"^```python\n(.*?evaluate_on_ray.*?)^```", page, re.MULTILINE | re.DOTALL))[1])
    with opened_world(tmp_path):
        request.getfixturevalue("without_a_cluster")  # which takes the devices that the world needs
        exec(
            code.replace("shards=16, workers=4", "shards=2, workers=2").replace("smollm2-135m", "backbone"), names := {}
        )
        assert names["answers"] == 2 and "sst2" in names["table"]


# ------------------------------------------------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def two_workers(bucket):
    """A cluster whose workers find the emulated bucket too."""
    pytest.importorskip("ray.data")
    with cluster(2):
        yield


@pytest.mark.slow
def test_the_table_and_answers_are_those_of_one_process(folder, two_workers, tmp_path, capsys):
    table = evaluated(folder, tmp_path / "out")
    one = command_line("evaluate", folder, tmp_path / "one", EVALUATION | {"tasks": folder / "free"})
    assert main(one) == 0
    assert same_evaluation(tmp_path / "out", tmp_path / "one")
    assert table == (tmp_path / "out" / "table.md").read_text().rstrip("\n")
    assert evaluated(folder, tmp_path / "out") == table  # nothing was left to do
    capsys.readouterr()


@pytest.mark.slow
def test_the_answers_of_a_job_are_those_of_one_process(folder, two_workers, tmp_path):
    assert generated(folder, tmp_path / "out.jsonl") == (24, 4)
    one = command_line("generate", folder, tmp_path / "one.jsonl", GENERATION | {"input": folder / "in.jsonl"})
    assert main([*one, "--shard", "0/1"]) == 1
    merge_jobs([tmp_path / "one.jsonl"], tmp_path / "sorted.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "sorted.jsonl").read_bytes()


def same_evaluation(folder, one):
    """Whether the merged folder has the scores, the table and the answers of one process."""
    answers = [sorted((place / "answers.jsonl").read_bytes().splitlines()) for place in (folder, one)]
    tables = [(place / "table.md").read_text().splitlines()[:-1] for place in (folder, one)]  # the last line: how long
    scores = [(place / "table.csv").read_bytes() for place in (folder, one)]
    assert answers[0] and b"t4" in scores[0]
    return answers[0] == answers[1] and tables[0] == tables[1] and scores[0] == scores[1]


class AfterLines(threading.Thread):
    """Calls `act` once, as soon as a file has some lines and a worker writes it. `kept` is then what the file had."""

    def __init__(self, file, lines, act):
        super().__init__(daemon=True)
        self.file, self.lines, self.act, self.kept = file, lines, act, b""
        self.start()

    def run(self):
        while not self.kept:
            time.sleep(0.002)
            if self.file.exists() and self.file.read_bytes().count(b"\n") >= self.lines:
                worker = process_that_writes(self.file)
                if worker is not None:
                    self.act(worker)
                    self.kept = self.file.read_bytes()

    def went_on(self):
        """Whether the file still has the complete lines that it had."""
        self.join(timeout=1)
        complete = self.kept[: self.kept.rfind(b"\n") + 1].splitlines()
        return len(complete) >= self.lines and set(complete) <= set(self.file.read_bytes().splitlines())


def kill(worker):
    os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_shard_goes_on(folder, two_workers, tmp_path):
    write_rows(tmp_path / "free" / "test.jsonl", rows_of_text(60, 4))
    killed = AfterLines(tmp_path / "out.shards" / "0" / "answers.jsonl", 4, kill)
    evaluated(folder, tmp_path / "out", tasks=[str(tmp_path / "free")])
    assert killed.went_on()
    assert main(command_line("evaluate", folder, tmp_path / "one", EVALUATION | {"tasks": tmp_path / "free"})) == 0
    assert same_evaluation(tmp_path / "out", tmp_path / "one")


@pytest.fixture
def heeds_ctrl_c():
    """A process that a shell has started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_killed_worker_and_ctrl_c_lose_nothing_of_a_job(folder, two_workers, tmp_path, heeds_ctrl_c):
    shards = tmp_path / "out.jsonl.shards"
    killed = AfterLines(shards / "1.jsonl", 1, kill)
    stopped = AfterLines(shards / "2.jsonl", 1, lambda worker: interrupt_main())
    with pytest.raises(KeyboardInterrupt):
        generated(folder, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert generated(folder, tmp_path / "out.jsonl") == (24, 4)
    assert killed.went_on() and stopped.went_on()
    generated(folder, tmp_path / "other.jsonl", shards=2)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


@pytest.mark.slow
def test_a_shard_that_fails_ends_the_call_and_the_same_call_goes_on(folder, two_workers, tmp_path):
    shards = tmp_path / "out.jsonl.shards"
    shards.mkdir()
    (shards / "1.jsonl").write_text("mine\n")
    with pytest.raises(Exception, match="1.jsonl: line 1 is not an answer"):
        generated(folder, tmp_path / "out.jsonl", workers=1)
    (shards / "1.jsonl").unlink()
    assert generated(folder, tmp_path / "out.jsonl") == (24, 4)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_shard_goes_on_in_a_bucket(folder, two_workers, bucket, tmp_path):
    begun = bucket / "out.jsonl.shards" / "0.jsonl.shard.json"
    (bucket / "in.jsonl").write_bytes((folder / "in.jsonl").read_bytes())

    def kill_the_worker():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(only_worker(), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_worker, daemon=True)
    killer.start()
    here = {"backbone": folder / "backbone", "adapters": [f"{folder}/tenants/*"]}
    assert generated(bucket, bucket / "out.jsonl", workers=1, **here) == (24, 4)
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert generated(folder, tmp_path / "out.jsonl", shards=1) == (24, 4)
    assert (bucket / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.long
def test_each_shard_is_answered_once_also_those_that_lost_workers(two_workers, tmp_path):
    outputs = [tmp_path / str(index) for index in range(6)]
    run_shards(StubWorker, "", outputs, "trying", 3, {"num_cpus": 1})  # there is room for two workers
    tries = [output.read_text().split() for output in outputs]
    assert [len(one) for one in tries] == [1, 3, 1, 1, 1, 3]
    assert all(len(set(one)) == len(one) for one in tries)
