"""scripts/rehearse.py: every config has a tiny run that it can do, and what fails is seen in its exit code."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import rehearse  # noqa: E402
import rehearse_run  # noqa: E402

from para_jax.config import load_config  # noqa: E402
from para_jax.data.tokenizer import load_tokenizer  # noqa: E402
from para_jax.evaluation.tasks import task_of_run  # noqa: E402
from para_jax.io.hub import resolve_backbone  # noqa: E402

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rehearse_run.make_data(tmp_path_factory.mktemp("rehearsal"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_config_has_a_tiny_run_of_its_own_method_and_mesh(file, folder):
    real, sizes = load_config(file), {"data": 2, "fsdp": 4, "tensor": 2}
    tiny = load_config(file, rehearse_run.tiny_overrides(real, folder, sizes))
    assert (tiny.adapter, vars(tiny.mesh), tiny.many) == (real.adapter, sizes, real.many)
    assert tiny.train.remat == real.train.remat and tiny.backbone.source == str(folder / "backbone")
    if not tiny.many:
        resolve_backbone(tiny.backbone.source)
        task = task_of_run(tiny, "validation", load_tokenizer(tiny.backbone.source))
        assert task and task.ranks == rehearse_run.ranks(real)


def test_the_table_tells_what_fails_and_what_does_not_fit():
    fits, too_much = ({"fits": True, "needed": 2**30}, {"fits": False, "needed": 2**34})
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    found = {
        "a": {"mesh": mesh, "programs": {"train": fits}, "run": {"processes": 2, "difference": 0.0, "seconds": 1.0}},
        "b": {"mesh": mesh, "programs": {"train": too_much}},
        "c": {"mesh": mesh, "run": {"error": "RuntimeError: exit code 2: no such file"}},
    }
    assert [rehearse.failed(entry) for entry in found.values()] == [False, True, True]
    lines = rehearse.table(found)
    assert "1 x 4 x 1" in lines[2] and "1.00" in lines[2] and "killed, resumed" in lines[2]
    assert "16.00: too much" in lines[3] and "failed" in lines[4] and "no such file" in lines[-1]
    assert "decode" not in lines[0]  # a column that nobody filled


def test_a_run_of_many_is_compiled_for_its_own_tenants_where_they_are_here(tmp_path):
    there = load_config(ROOT / "configs" / "smollm2-tenants.yaml", [f"data.tenants={tmp_path}"])
    assert rehearse.tenants_of(load_config(None, ["data.tenants=absent", "output_dir=run"])) == rehearse.TENANTS
    for name in ("acme", "globex", "umbrella"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert rehearse.tenants_of(there) == 3


def test_results_of_another_slice_are_not_taken(tmp_path, monkeypatch, capsys):
    file = tmp_path / "held.json"
    monkeypatch.setattr(rehearse, "compiled", lambda topology, *_: {"train": {"fits": True, "needed": len(topology)}})
    for topology in ("h100", "h100", "v5e:1x1"):
        given = ["rehearse.py", topology, str(ROOT / "configs" / "smollm2-sst2.yaml"), "--no-runs", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", given)
        if topology == "h100":
            assert rehearse.main() == 0
    with pytest.raises(SystemExit):
        rehearse.main()
    assert "holds smollm2-sst2 for h100; give another file for v5e:1x1" in capsys.readouterr().err


def test_processes_that_wrote_no_checkpoint_are_killed(folder, monkeypatch):
    hosts = [SimpleNamespace(process=None, killed=False) for _ in range(2)]
    for host in hosts:
        host.kill = lambda host=host: setattr(host, "killed", True)

    def no_checkpoint(*given):
        raise RuntimeError("no checkpoint of step 2")

    monkeypatch.setattr(rehearse_run, "Started", lambda *given: None)
    monkeypatch.setattr(rehearse_run, "finish", lambda started: None)
    monkeypatch.setattr(rehearse_run, "start_all", lambda *given: hosts)
    monkeypatch.setattr(rehearse_run, "wait_for_checkpoint", no_checkpoint)
    with pytest.raises(RuntimeError, match="no checkpoint of step 2"):
        rehearse_run.rehearse(CONFIGS[0], {"data": 2, "fsdp": 1, "tensor": 1}, 2, folder, str(folder))
    assert all(host.killed for host in hosts)


@pytest.mark.slow
def test_a_rehearsal_kills_and_resumes_in_a_bucket():
    command = [sys.executable, str(ROOT / "scripts" / "rehearse.py"), "v5e:2x2", str(CONFIGS[0]), "--no-compile"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "killed, resumed; 2 processes" in done.stdout, done.stdout + done.stderr
