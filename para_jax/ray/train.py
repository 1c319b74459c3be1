"""train_on_ray: a run on the workers of Ray Train, which starts them again when one is lost.

Ray joins the workers' JAX processes. The run is that of ../runs/train.py on several hosts: it saves into its
output_dir, and resumes from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import RunConfig
from ..io.checks import expanded


class RayRun(NamedTuple):
    """A run that has ended."""

    output_dir: str
    """what `train`, `train_tenants` and `compare_methods` write"""
    report: str
    """base model and adapters side by side, or the methods of sweep.method; empty if nothing was scored"""


def train_on_ray(
    config: RunConfig,
    *,
    scaling: Mapping[str, Any],
    max_failures: int = 3,
    environment: Mapping[str, str] | None = None,
    storage: str | Path | None = None,
) -> RayRun:
    """Trains the adapter of a config, or those of its tenants or methods, on the workers of a Ray cluster. The same
    call resumes.

    A worker that is lost makes Ray start all of them again, and the run resumes from its last checkpoint.

    Args:
        config: the run. output_dir must be on storage that every worker reaches, or in a bucket; the backbone and the
            data too, unless each host has its own at the same path.
        scaling: fields of ray.train.ScalingConfig. For CPUs {"num_workers": 2}, for hosts of 8 GPUs {"num_workers": 2,
            "use_gpu": True, "resources_per_worker": {"GPU": 8}}, for a TPU slice {"num_workers": 4, "use_tpu": True,
            "topology": "4x4", "accelerator_type": "TPU-V6E"}: one worker per host.
        max_failures: how often the workers are started again at most, not counting hosts that are preempted.
        environment: variables of the workers, such as JAX_COMPILATION_CACHE_DIR.
        storage: a folder for Ray's own notes, which every worker reaches. Default: output_dir with -ray at its end.

    Raises ray.train.TrainingFailedError after too many failures, also of a config that `train` refuses.
    """
    output_dir = str(expanded(config.output_dir).resolve())
    config = replace(config, output_dir=output_dir, runtime=replace(config.runtime, distributed="given"))
    trainer = trainer_of(config, scaling, max_failures, environment, str(storage or f"{output_dir}-ray"))
    report: Any = trainer.fit().return_value
    return RayRun(output_dir, report)


def trainer_of(config: RunConfig, scaling, max_failures: int, environment, storage: str):
    """Ray's JaxTrainer for the run.

    Its backend joins the processes of TPU and GPU workers only. With use_tpu and JAX_PLATFORMS=cpu it joins those of
    CPU workers too (ray 2.60, train/v2/jax/config.py).
    """
    try:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.v2.jax import JaxTrainer
        from ray.train.v2.jax.config import JaxConfig
    except ImportError as error:
        raise ImportError(f"train_on_ray: {error.name} is not installed: pip install 'para_jax[ray]'") from None
    workers, on_cpus = ScalingConfig(**scaling), {}
    if not (workers.use_tpu or workers.use_gpu):
        on_cpus = {"JAX_PLATFORMS": "cpu"}
        config = replace(config, runtime=replace(config.runtime, allow_cpu=True))  # a host may have a GPU too
    return JaxTrainer(
        run_on_worker,
        train_loop_config={"config": config, "folder": os.getcwd()},
        jax_config=JaxConfig(use_tpu=not workers.use_gpu, use_gpu=bool(workers.use_gpu)),
        scaling_config=workers,
        run_config=RayRunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": {**on_cpus, **(environment or {})}},
        ),
    )


def run_on_worker(given: dict) -> str:
    """The report of the run on one worker. Ray starts all workers again after an error of one of them.

    Args:
        given: the config, and the folder that its relative paths are relative to, if this host has it. Ray gives a
            worker a folder of its own.
    """
    from ..io.messages import log_to_stderr
    from ..training.stop import Stopped

    log_to_stderr()
    if os.path.isdir(given["folder"]):
        os.chdir(given["folder"])
    try:
        return report_of(given["config"])
    except Stopped:
        raise RuntimeError("the run was told to stop and has saved; Ray starts it again") from None


def report_of(config: RunConfig) -> str:
    """The report of a run, as `para-jax train` chooses it by its config."""
    from ..runs.compare import compare_methods
    from ..runs.train import train, train_tenants

    if config.sweep.method:
        return compare_methods(config).report()
    return (train_tenants if config.many else train)(config).report()
