"""train_on_ray: the same bits as the run without Ray, also if a worker is killed on the way."""

import hashlib
import json
import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from local_ray import cluster
from quick_compiler import FLAGS, OLD_EMITTERS
from running_server import eventually
from tiny_run import metrics, run_config, run_folder
from two_processes import run_two

from para_jax.config import save_config
from para_jax.ray import train as module
from para_jax.ray.train import run_on_worker, train_on_ray
from para_jax.training.log import TIMES
from para_jax.training.stop import Stopped

STEPS, SAVED = 240, 20
COORDINATOR = "runtime.coordinator={address} runtime.num_processes=2 runtime.process_id={process}".split()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("train"))
    length = (f"train.max_steps={STEPS}", f"eval.every={4 * SAVED}", f"checkpoint.every={SAVED}")
    return run_config(folder, "mesh.data=2", *length)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the processes that compute, so that they compile the same programs, once. Each has one CPU device."""
    compiled = tmp_path_factory.mktemp("compiled")
    return {"XLA_FLAGS": FLAGS + OLD_EMITTERS, "JAX_COMPILATION_CACHE_DIR": str(compiled)}


@pytest.fixture(scope="module")
def own_cluster():
    pytest.importorskip("ray.train")
    with cluster(3):
        yield


def result(folder):
    """What a run leaves that does not depend on the time it took."""
    weights = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def workers(environment):
    """The processes of Ray Train's workers with this environment."""
    own, found = f"JAX_COMPILATION_CACHE_DIR={environment['JAX_COMPILATION_CACHE_DIR']}", set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if "RayTrainWorker" in (process / "cmdline").read_text() and own in (process / "environ").read_text():
                found.add(int(process.name))
    return found


def kill_one(checkpoints, environment, killed):
    """Kills a worker as soon as there is a checkpoint."""
    eventually(lambda: any(path.name.isdecimal() for path in checkpoints.glob("*")), 600)
    killed += sorted(workers(environment))
    os.kill(killed[-1], signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_loses_a_worker_ends_with_the_bits_of_the_run_without_ray(own_cluster, config, environment):
    folder = Path(config.output_dir).parent
    save_config(config, folder / "run.yaml")
    plain = ["-m", "para_jax.cli", "train", str(folder / "run.yaml"), f"output_dir={folder / 'plain'}"]
    assert [ended.code for ended in run_two(*plain, *COORDINATOR, **environment)] == [0, 0]

    killed = []
    killer = threading.Thread(
        target=kill_one, args=(Path(config.output_dir) / "checkpoints", environment, killed), daemon=True
    )
    killer.start()
    ended = train_on_ray(config, scaling={"num_workers": 2}, environment=environment)
    killer.join(60)
    assert len(killed) == 2 and result(folder / "plain") == result(Path(ended.output_dir))
    assert "validation" in ended.report
    rows = metrics(config)
    assert any("loss" in row and row["step"] == STEPS for row in rows)

    again = train_on_ray(config, scaling={"num_workers": 2}, environment=environment)
    assert again == ended and metrics(config) == rows  # nothing was left to do


@pytest.mark.slow
def test_a_mistake_in_the_config_is_named(own_cluster, config, environment):
    wrong = replace(config, output_dir=str(Path(config.output_dir).parent))
    with pytest.raises(Exception, match="is not a run folder; choose another"):
        train_on_ray(wrong, scaling={"num_workers": 2}, environment=environment, max_failures=0)


def test_a_worker_raises_what_ends_its_run(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as Ray does, to a folder of the worker's own
    given = {"config": config, "folder": config.output_dir}  # a host may lack it

    def refused(config):
        raise ValueError("output_dir: choose another")

    def stopped(config):
        raise Stopped

    monkeypatch.setattr("para_jax.runs.train.train", refused)
    with pytest.raises(ValueError, match="output_dir: choose another"):
        run_on_worker(given)
    assert Path.cwd() == tmp_path
    monkeypatch.setattr("para_jax.runs.train.train", stopped)
    there = tmp_path / "where the run was started"
    there.mkdir()
    with pytest.raises(RuntimeError, match="Ray starts it again"):
        run_on_worker(given | {"folder": str(there)})
    assert Path.cwd() == there


@pytest.mark.long
def test_a_worker_compares_methods_as_the_command_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a worker goes to its folder; back afterwards
    own = run_config(run_folder(tmp_path), "sweep.method=[para,ia3]", "train.max_steps=1", "runtime.distributed=given")
    report = run_on_worker({"config": own, "folder": str(tmp_path)})
    assert "para" in report and "ia3" in report and (tmp_path / "run" / "comparison.md").exists()


def test_workers_get_a_config_that_leaves_jax_and_signals_to_ray(config, monkeypatch):
    class Fitting:
        return_value = "scores"

        def fit(self):
            return self

    given = []
    monkeypatch.setattr(module, "trainer_of", lambda *arguments: given.append(arguments) or Fitting())
    monkeypatch.chdir(Path(config.output_dir).parent)
    ended = train_on_ray(replace(config, output_dir="run"), scaling={"num_workers": 2})
    own, scaling, _, _, storage = given[0]
    assert own.runtime.distributed == "given" and scaling == {"num_workers": 2}
    assert ended == (own.output_dir, "scores") and own.output_dir == config.output_dir == storage.removesuffix("-ray")
