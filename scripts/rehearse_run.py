"""A run of a config on virtual CPU devices with a tiny backbone, killed and resumed: part (2) of rehearse.py.

Command: `python scripts/rehearse.py v5e:4x4 configs/llama2-7b-boolq.yaml --no-compile`.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from tiny_run import rows_of_text, run_folder, write_rows  # noqa: E402

from para_jax.config import RunConfig, load_config  # noqa: E402
from para_jax.data.tasks import TASKS  # noqa: E402
from para_jax.io.checks import expanded  # noqa: E402
from para_jax.training.log import TIMES  # noqa: E402
from para_jax.training.metrics_file import read_metrics  # noqa: E402

STEPS = 4
LIMIT = 600  # seconds for one run
TOLERANCE = 1e-4  # of losses and scores, between one process and several


def tiny_overrides(config: RunConfig, folder: Path, sizes: dict[str, int]) -> list[str]:
    """The overrides that keep a config's method, mesh and settings, and replace its backbone, data and lengths."""
    replicas = sizes["data"] * sizes["fsdp"]
    data = ("train", "validation", "test", "tenants", "data_dir", "task")
    templates = ("prompt", "completion")
    metric = "accuracy" if ranks(config) else "exact_match"
    return [
        *(f"data.{name}=null" for name in data),
        *(f"data.{name}={{{name}}}" for name in templates if getattr(config.data, name)),
        f"data.tenants={folder / 'tenants'}" if config.data.tenants else f"data.train={folder / 'data'}",
        f"backbone.source={folder / 'backbone'}", "backbone.dtype=float32",
        "data.max_seq_length=16", "data.truncate=error", "data.buckets=1",
        *(f"mesh.{name}={size}" for name, size in sizes.items()),
        "train.batch_size=null", "train.per_device_batch_size=2", "train.gradient_accumulation_steps=2",
        "train.rows_per_tenant=2", f"train.max_steps={STEPS}", "train.learning_rate=0.01", "train.warmup_ratio=0",
        "train.schedule=constant",
        "eval.every=2", "checkpoint.every=1", f"eval.metric={metric}", "eval.also=[]", "eval.choices=[]",
        "eval.limit=8", f"eval.batch_size={replicas}", "eval.max_new_tokens=4", "eval.patience=null",
        "logging.report_to=[]", "runtime.allow_cpu=true",
    ]  # fmt: skip


def ranks(config: RunConfig) -> bool:
    """Whether the config's metric ranks choices instead of reading written answers."""
    task = TASKS.get(config.data.task or "")
    return (config.eval.metric or (task.metric if task else None)) == "accuracy"


def make_data(folder: Path) -> Path:
    """A tiny backbone with data for one adapter, and the data of two tenants."""
    run_folder(folder)
    for seed, name in enumerate(("acme", "globex")):
        for split, count in (("train", 12), ("validation", 4), ("test", 4)):
            write_rows(folder / "tenants" / name / f"{split}.jsonl", rows_of_text(count, seed=10 * seed + len(split)))
    return folder


def rehearse(config_file: Path, sizes: dict[str, int], processes: int, folder: Path, output: str) -> dict[str, Any]:
    """Runs a config three times: in one process, and in several that are killed after two steps and then resumed on
    empty disks. Each run has as many virtual devices as the mesh.

    Args:
        folder: of make_data.
        output: where run folders go, a path or gs:// address.

    Raises RuntimeError with a process's output if one fails, and if the numbers differ.
    """
    config = load_config(config_file)
    overrides = tiny_overrides(config, folder, sizes)
    devices = math.prod(sizes.values())
    name = config_file.stem
    begun = time.monotonic()
    alone = [Started(config_file, [*overrides, f"output_dir={output}/{name}-one"], devices, folder / "home-one")]
    finish(alone)
    killed = start_all(config_file, overrides, processes, devices, f"{output}/{name}-several", folder / "home-a")
    try:
        wait_for_checkpoint(killed, expanded(f"{output}/{name}-several"), 2)
    finally:
        for process in killed:
            process.kill()
    resumed = start_all(config_file, overrides, processes, devices, f"{output}/{name}-several", folder / "home-b")
    finish(resumed)
    one, several = (logged(expanded(f"{output}/{name}-{which}"), config) for which in ("one", "several"))
    if not one or one.keys() != several.keys():
        raise RuntimeError(f"{processes} processes logged {sorted(several)}, one process {sorted(one)}")
    worst = max(abs(one[key] - several[key]) for key in one)
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{processes} processes differ from one by {worst}")
    return {"processes": processes, "difference": worst, "seconds": time.monotonic() - begun}


def logged(output, config: RunConfig) -> dict[tuple[str, int, str], float]:
    """What a run logged by tenant, step and name, without the times."""
    tenants = ("acme", "globex") if config.data.tenants else ("",)
    files = {tenant: (output / tenant if tenant else output) / "metrics.jsonl" for tenant in tenants}
    return {
        (tenant, int(row["step"]), name): value
        for tenant, file in files.items()
        for row in read_metrics(file)
        for name, value in row.items()
        if name not in TIMES
    }


class Started:
    """`para-jax train` in a process with virtual devices and its own home folder."""

    def __init__(self, config_file: Path, overrides: list[str], devices: int, home: Path):
        home.mkdir(parents=True, exist_ok=True)
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)}
        command = [sys.executable, "-m", "para_jax.cli", "train", str(config_file), *overrides]
        self.said = TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=self.said, text=True
        )

    def text(self) -> str:
        self.said.seek(0)
        return self.said.read()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def start_all(config_file, overrides, processes, devices, output, home) -> list[Started]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    among = [f"runtime.coordinator={address}", f"runtime.num_processes={processes}", f"output_dir={output}"]
    return [
        Started(config_file, [*overrides, *among, f"runtime.process_id={i}"], devices // processes, Path(f"{home}-{i}"))
        for i in range(processes)
    ]


def finish(started: list[Started]) -> None:
    try:
        for one in started:
            one.process.wait(LIMIT)
    finally:
        for one in started:
            one.process.kill()
    for one in started:
        if one.process.returncode:
            raise RuntimeError(f"exit code {one.process.returncode}: {one.text()[-3000:]}")


def wait_for_checkpoint(started: list[Started], output, step: int) -> None:
    """Waits until the first process has a checkpoint of this step or a later one."""
    end, folder = time.monotonic() + LIMIT, output / "checkpoints"
    while not any(path.name.isdecimal() and int(path.name) >= step for path in entries(folder)):
        if started[0].process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"no checkpoint of step {step}: {started[0].text()[-3000:]}")
        time.sleep(0.2)


def entries(folder) -> list:
    try:
        return list(folder.iterdir())
    except OSError:  # not there yet
        return []
