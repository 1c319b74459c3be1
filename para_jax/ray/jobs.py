"""Evaluations and batch jobs in shards on a Ray cluster, with the tables and answers of one machine.

Each shard goes to a folder or file of its own next to the output, as `para-jax evaluate --shard` and `para-jax generate
--shard` write it, and survives its worker there. At the end the shards are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.names import named_adapters
from ..cli import generate
from ..cli.checks import check_adapters, check_backbone
from ..config import RunConfig
from ..evaluation.merge import merge_folders
from ..evaluation.options import EvalOptions
from ..io.checks import expanded
from ..io.shards import parse_shard
from ..io.storage.bucket import Place
from ..serving.job_merge import merge_jobs
from .claim import claimed
from .command import arguments, parsed
from .pool import ray_data, run_shards
from .workers import Evaluated, EvaluationWorker, GenerationWorker


def evaluate_on_ray(
    config: RunConfig,
    adapters: Mapping[str, str] | Sequence[str],
    tasks: Any = None,
    *,
    output: str | Path,
    shards: int,
    workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    tensor_parallel_size: int = 1,
    options: EvalOptions | None = None,
) -> str:
    """Evaluates adapters on a Ray cluster, into `output`. Returns the Markdown table.

    The same call goes on where an earlier one stopped, until `output` is complete.

    Args:
        config: gives the backbone, the runtime and the variables of the chat template: a run's, or
            load_config(None, ["backbone.source=..."]).
        adapters: {name: folder}, or folders and patterns, as for `evaluate`.
        tasks: as for `evaluate`; default: the data of the config.
        output: a folder that every worker can write: on shared storage, or gs://. The shards are in `output`.shards.
        shards: how many parts the adapters are divided into.
        workers: actors, each with a backbone of its own. They answer one shard after the other.
        num_cpus, num_gpus, resources: what Ray reserves for a worker, such as resources={"TPU": 4}.
        tensor_parallel_size: devices of a worker that share the weights.

    Raises ValueError, before anything is started, for a backbone or adapters that are not there and for an output with
    other settings, and at the end for shards that failed.
    """
    ray_data()
    parse_shard(f"0/{shards}")
    sources = dict(adapters) if isinstance(adapters, Mapping) else named_adapters(list(map(str, adapters)))
    if not sources:
        raise ValueError("adapters is empty; give folders, or {name: folder}")
    check_backbone(config.backbone.source)
    check_adapters(sources.values())
    tasks = config if tasks is None else tasks
    call = Evaluated(config, sources, tasks, options or EvalOptions(), tensor_parallel_size)
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    if (place / "table.md").exists():
        raise ValueError(f"output {place}: it is complete already; choose another folder, or remove it")
    folders = [shards_of(place) / str(index) for index in range(shards)]
    described = [f"{name}={value!r}" for name, value in call._asdict().items()]
    with claimed(place, shards_of(place), described, shards):
        run_shards(EvaluationWorker, call, folders, "evaluating", workers, reserved)
        return merge_folders(folders, place, again=True)


def generate_on_ray(
    input: str | Path,
    *,
    output: str | Path,
    shards: int,
    workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    **options: Any,
) -> tuple[int, int]:
    """Answers a file of requests on a Ray cluster, into the file `output`. Returns how many answers there are, and how
    many of them are errors.

    The same call goes on where an earlier one stopped, until `output` is there.

    Args:
        input: requests, one JSON object per line, that every worker can read.
        output, shards, workers, num_cpus, num_gpus, resources: as for evaluate_on_ray.
        options: those of `para-jax generate`, by their names: adapters=["runs/*/adapter"], max_new_tokens=32.

    Raises ValueError as evaluate_on_ray does.
    """
    ray_data()
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    call = arguments("generate", {"input": input, **options})
    generate.checked(parsed([*call, f"--shard=0/{shards}", f"--output={place}"]))
    if place.exists():
        raise ValueError(f"output {place}: it is complete already; choose another path, or remove it")
    files = [shards_of(place) / f"{index}.jsonl" for index in range(shards)]
    with claimed(place, shards_of(place), call, shards):
        run_shards(GenerationWorker, call, files, "answering", workers, reserved)
        return merge_jobs(files, place)


def shards_of(output: Place) -> Place:
    """The folder of an output's shards."""
    return output.with_name(f"{output.name}.shards")
