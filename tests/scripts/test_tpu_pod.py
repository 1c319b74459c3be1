"""scripts/tpu_pod.sh with a gcloud that only records, and runs on this machine what a host of the slice would."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "tpu_pod.sh"
TOKEN = "hf_nobody_may_see_this"
ARGUMENTS = ("configs/run.yaml", "mesh.fsdp=16", r"data.prompt={a 'b'}\n$HOME")

GCLOUD = """#!/usr/bin/env python3
import json, os, pathlib, shutil, subprocess, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
host, arguments = pathlib.Path(os.environ["HOST"]), sys.argv[4:]
if arguments[0] == "scp":
    for file in [a for a in arguments[1:] if a.startswith("/")]:
        shutil.copy(file, host)
    sys.exit(0)
command = next(a.removeprefix("--command=") for a in arguments if a.startswith("--command="))
without = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
sys.exit(subprocess.run(["bash", "-c", command], cwd=host, env=without | {"HOME": str(host)}).returncode)
"""

# An environment whose para-jax says what it was given.
UV = """#!/usr/bin/env bash
echo "$PWD $*" >> "$HOME/uv_calls"
if [ "$1" = venv ]; then
  mkdir -p .venv/bin
  printf '#!/usr/bin/env python3\\nimport json, os, sys\\nprint(json.dumps([sys.argv[1:], os.environ.get("HF_TOKEN")]))' > .venv/bin/para-jax
  chmod +x .venv/bin/para-jax
  ln -s "$(command -v python3)" .venv/bin/python
fi
"""  # noqa: E501


@pytest.fixture
def pod(tmp_path):
    """Runs the script in a small checkout; gives what it printed, the calls of gcloud, and the host's folder."""
    checkout, host, bin = tmp_path / "checkout", tmp_path / "host", tmp_path / "bin"
    for folder in (checkout / "scripts", checkout / "configs", host, bin):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "scripts")
    (checkout / "configs" / "run.yaml").write_text("seed: 1\n")
    (checkout / ".gitignore").write_text("runs/\n")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "large").write_text("not sent")
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    for name, text in (("gcloud", GCLOUD), ("uv", UV)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)

    def run(*arguments, **variables):
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {
            "PATH": f"{bin}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "HOST": str(host),
            "TPU": "slice", "ZONE": "zone-a", "PROJECT": "us", "TMPDIR": str(tmp_path),
        }  # fmt: skip
        done = subprocess.run(
            [checkout / "scripts" / "tpu_pod.sh", *arguments],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, list(map(json.loads, calls)), host

    return run


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


def test_every_host_gets_the_checkout_an_environment_and_the_same_command(pod, tmp_path):
    done, calls, host = pod(*ARGUMENTS)
    assert done.returncode == 0, done.stderr
    given, token = json.loads(done.stdout.splitlines()[-1])
    assert given == ["train", *ARGUMENTS, "runtime.coordinator=auto"] and token is None
    verbs = ("ssh", "scp", "ssh", "ssh")
    assert [call[:4] for call in calls] == [["compute", "tpus", "tpu-vm", verb] for verb in verbs]
    for call in calls:
        assert {"--zone=zone-a", "--project=us", "--worker=all", "--quiet"} < set(call)
    assert (host / "para_jax" / "configs" / "run.yaml").exists() and not (host / "para_jax" / "runs").exists()
    assert (host / "uv_calls").read_text().splitlines() == [
        f"{host / 'para_jax'} venv --quiet --seed --python 3.12",
        f"{host / 'para_jax'} pip install --quiet -e .[tpu,gcs]",
    ]
    assert not list(tmp_path.glob("tmp.*"))  # what was sent is not left here


def test_the_token_reaches_the_run_and_nothing_else(pod):
    done, calls, host = pod(*ARGUMENTS, HF_TOKEN=TOKEN)
    assert json.loads(done.stdout.splitlines()[-1])[1] == TOKEN
    assert TOKEN not in json.dumps(calls) + done.stderr + "".join(done.stdout.splitlines()[:-1])
    assert [call[3] for call in calls] == ["ssh", "scp", "ssh", "scp", "ssh"] and not (host / "para_jax.token").exists()


def test_a_file_that_is_gone_here_is_gone_on_the_hosts(pod, tmp_path):
    data = tmp_path / "checkout" / "data" / "tenants"
    for name in ("acme", "it's gone"):
        (data / name).mkdir(parents=True)
        (data / name / "train.jsonl").write_text("{}")
    _, _, host = pod(*ARGUMENTS)
    (host / "para_jax" / "runs").mkdir()
    shutil.rmtree(data / "it's gone")
    done, _, _ = pod(*ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (host / "para_jax" / "data" / "tenants").iterdir()] == ["acme"]
    assert (host / "para_jax" / "runs").exists() and (host / "para_jax" / ".venv" / "bin" / "python").exists()


def test_a_second_run_keeps_the_environment(pod):
    pod(*ARGUMENTS)
    _, _, host = pod(*ARGUMENTS)
    assert (host / "uv_calls").read_text().count("venv --quiet") == 1


def test_nothing_is_sent_while_a_run_is_going_on_a_host(pod):
    _, before, host = pod(*ARGUMENTS)
    program = host / "para_jax" / ".venv" / "bin" / "para-jax"
    program.write_text("import time; time.sleep(60)")
    going = subprocess.Popen([sys.executable, str(program), "train", "configs/run.yaml"])
    try:
        done, calls, _ = pod(*ARGUMENTS)
    finally:
        going.kill()
        going.wait()
    assert done.returncode != 0 and "a run is still going here" in done.stderr
    assert [call[3] for call in calls[len(before) :]] == ["ssh"]
    assert program.read_text().startswith("import time")  # what it runs from was not replaced


def test_a_host_that_fails_ends_the_script(pod):
    done, calls, _ = pod(*ARGUMENTS, HOST="/nowhere/at/all", HF_TOKEN=TOKEN)
    assert done.returncode != 0 and len(calls) == 1
