"""Runs whose backbone, data and output lie in a bucket: killed on one host, they go on on another one."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import quick_compiler
from long_cases import long, slow
from tiny_run import rows_of_text, run_config, run_folder, write_rows

from para_jax import cli, train, train_tenants
from para_jax.config import load_config, save_config
from para_jax.training.log import TIMES
from para_jax.training.metrics_file import read_metrics

CHILD = Path(__file__).parents[1] / "helpers" / "killed_run.py"
LIMIT = 400  # seconds, for a child that hangs


def uploaded(folder: Path, to):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (to / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return to


@pytest.fixture(scope="module")
def there(bucket, tmp_path_factory):
    """The folder in the bucket with backbone/ and data/, tenants/ and run.yaml files."""
    here = run_folder(tmp_path_factory.mktemp("bucket"))
    for seed, (name, size) in enumerate({"acme": 8, "globex": 12}.items()):
        write_rows(here / "tenants" / name / "train.jsonl", rows_of_text(size, seed=seed))
        write_rows(here / "tenants" / name / "validation.jsonl", rows_of_text(8, seed=seed + 10))
    there = uploaded(here, bucket / "runs")
    places = [f"backbone.source={there}/backbone", f"output_dir={there}/run", "eval.every=4", "checkpoint.every=2"]
    places += ["logging.report_to=[tensorboard]"]
    save_config(run_config(here, *places, f"data.train={there}/data", "train.max_steps=8"), there / "one.yaml")
    own = ["train.rows_per_tenant=4", "train.num_epochs=2", "train.max_steps=null", "train.tenants_at_once=1"]
    save_config(
        run_config(here, *places, *own, "data.train=null", f"data.tenants={there}/tenants"), there / "many.yaml"
    )
    return there


class Host:
    """A process of para-jax on a host with nothing on its disk. (Compiled programs are shared, to save the time.)"""

    def __init__(self, disk: Path, *arguments, linger="0"):
        disk.mkdir()
        environment = os.environ | {
            "HOME": str(disk), "XDG_CACHE_HOME": str(disk / "cache"), "PYTHONUNBUFFERED": "1",
            "LINGER": linger,
            "XLA_FLAGS": quick_compiler.FLAGS + quick_compiler.OLD_EMITTERS,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }  # fmt: skip
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=disk)
        self.process = subprocess.Popen([sys.executable, str(CHILD), *map(str, arguments)], env=environment, **pipes)
        self.timer = threading.Timer(LIMIT, self.process.kill)
        self.timer.start()

    def kill_after(self, word: str, times: int) -> None:
        for line in self.process.stdout:
            times -= line.strip() == word
            if not times:
                break
        self.process.send_signal(signal.SIGKILL)
        errors = self.process.communicate()[1]
        self.timer.cancel()
        assert self.process.returncode == -signal.SIGKILL and not times, errors

    def ended(self) -> str:
        out, errors = self.process.communicate()
        self.timer.cancel()
        assert self.process.returncode == 0, errors
        return out + errors


def result(folder):
    """What a run leaves that does not depend on the time it took."""
    weights = {str(file)[len(str(folder)) :]: file.read_bytes() for file in folder.glob("adapter/*.safetensors")}
    weights |= {str(file)[len(str(folder)) :]: file.read_bytes() for file in folder.glob("*/adapter/*.safetensors")}
    logs = {}
    for file in [folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl")]:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(file)]
        logs[str(file)[len(str(folder)) :]] = rows
    return weights, logs


@pytest.mark.parametrize("kind", [long("many"), slow("one")])
def test_a_run_killed_and_resumed_on_another_host_ends_with_the_same_bits(kind, there, tmp_path):
    unkilled, killed = there / f"{kind}-unkilled", there / f"{kind}-killed"
    whole = Host(tmp_path / "a", "train", there / f"{kind}.yaml", f"output_dir={unkilled}")
    for disk, word, times in (("b", "written", 2), ("c", "save", 1))[: 2 if kind == "one" else 1]:
        host = Host(tmp_path / disk, "train", there / f"{kind}.yaml", f"output_dir={killed}", linger="0.2")
        host.kill_after(word, times)
    whole.ended()
    said = Host(tmp_path / "d", "train", there / f"{kind}.yaml", f"output_dir={killed}").ended()
    assert "Traceback" not in said
    weights, logs = result(killed)
    assert (weights, logs) == result(unkilled) and len(weights) == (1 if kind == "one" else 2)


@pytest.mark.long
def test_what_lies_in_a_bucket_is_evaluated_described_plotted_and_answers_a_job(there, tmp_path, monkeypatch, capsys):
    """Without a local file but the cache. Killed jobs go on; the answers end as one object."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run, model = there / "done", ["--backbone", f"{there}/backbone", "--allow-cpu", "--no-compilation-cache"]
    train(load_config(there / "one.yaml", [f"output_dir={run}", "train.max_steps=2", "logging.report_to=[]"]))
    (there / "in.jsonl").write_bytes(b"".join(b'{"prompt": "w20 w3%d"}\n' % i for i in range(3)))
    job = [
        "--input",
        f"{there}/in.jsonl",
        "--output",
        f"{there}/out.jsonl",
        "--max-new-tokens",
        "3",
        "--max-length",
        "64",
    ]
    many = ["--tasks", f"{there}/data:loss", "--output", f"{there}/scores", "--limit", "4", "--rows", "8"]
    for _ in range(2):  # the second time all is answered already
        assert cli.main(["evaluate", str(run / "config.yaml"), "--adapter", f"{run}/adapter", "--limit", "4"]) == 0
        assert cli.main(["evaluate", *model, "--adapters", f"{run}/adapter", *many]) == 0
        assert cli.main(["generate", *model, "--adapter", f"{run}/adapter", *job]) == 0
        assert cli.main(["inspect", str(run)]) == cli.main(["inspect", f"{run}/adapter"]) == 0
        answers = [json.loads(line) for line in (there / "out.jsonl").read_bytes().splitlines()]
        assert [answer["custom_id"] for answer in answers] == ["line-1", "line-2", "line-3"]
        assert not list((there / "out.jsonl").iterdir())
    assert cli.main(["plot", str(run), "--output", f"{there}/curves.png"]) == 0
    assert (there / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"answers.jsonl", "table.md"} <= {path.name for path in (there / "scores").iterdir()}
    assert "validation_loss" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.long
def test_a_tenants_own_fields_are_read_from_a_bucket(there, tmp_path):
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows_of_text(8, seed=4))
        (there / "own" / "acme" / f"{split}.jsonl").write_bytes(text.encode())
    (there / "own" / "acme" / "tenant.yaml").write_bytes(b"train: {max_steps: 3}\neval: {metric: exact_match}\n")
    given = [f"data.tenants={there}/own", f"output_dir={there}/own-run", "logging.report_to=[]"]
    given += ["runtime.compilation_cache=false", "runtime.allow_cpu=true"]
    found = train_tenants(load_config(there / "many.yaml", given))
    assert (found.tenants["acme"]["steps"], found.tenants["acme"]["metric"]) == (3, "exact_match")
    assert train_tenants(load_config(there / "many.yaml", given)).tenants == found.tenants
