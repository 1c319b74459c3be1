"""Evaluations and batch jobs in shards on a Ray cluster, with the tables and answers of one machine.

Each shard goes to a folder or file of its own next to the output, as `para-jax evaluate --shard` and `para-jax generate
--shard` write it, and survives its worker there. At the end the shards are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli import evaluate, generate
from ..evaluation.merge import merge_folders
from ..io.checks import expanded
from ..io.storage.bucket import Place
from ..serving.job_merge import merge_jobs
from .claim import claimed
from .command import arguments, parsed
from .pool import ray_data, run_shards
from .workers import EvaluationWorker, GenerationWorker


def evaluate_on_ray(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    output: str | Path,
    shards: int,
    workers: int = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    **options: Any,
) -> str:
    """Evaluates adapters on a Ray cluster, into `output`. Returns the Markdown table.

    The same call goes on where an earlier one stopped, until `output` is complete.

    Args:
        config, overrides: as in `para-jax evaluate CONFIG FIELD=VALUE`.
        output: a folder that every worker can write: on shared storage, or gs://. The shards are in `output`.shards.
        shards: how many parts the adapters are divided into.
        workers: actors, each with a backbone of its own. They answer one shard after the other.
        num_cpus, num_gpus, resources: what Ray reserves for a worker, such as resources={"TPU": 4}.
        options: those of `para-jax evaluate`, by their names: adapters=["runs/*/adapter"], tasks=["data"], limit=100.

    Raises ValueError, before anything is started, for wrong options and for an output with other settings, and at the
    end for shards that failed.
    """
    ray_data()
    at_least_one(shards=shards, workers=workers)
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    given = arguments("evaluate", [config] if config else [], overrides, options)
    first = parsed([*given, f"--shard=0/{shards}", f"--output={place}"])
    evaluate.check_options(first)
    evaluate.check_sources(first, evaluate.config_of(first))
    if (place / "table.md").exists():
        raise ValueError(f"output {place}: it is complete already; choose another folder, or remove it")
    folders = [shards_of(place) / str(index) for index in range(shards)]
    with claimed(place, shards_of(place), given, shards):
        run_shards(EvaluationWorker, given, folders, "evaluating", workers, reserved)
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
    at_least_one(shards=shards, workers=workers)
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    given = arguments("generate", [], [], {"input": input, **options})
    generate.checked(parsed([*given, f"--shard=0/{shards}", f"--output={place}"]))
    if place.exists():
        raise ValueError(f"output {place}: it is complete already; choose another path, or remove it")
    files = [shards_of(place) / f"{index}.jsonl" for index in range(shards)]
    with claimed(place, shards_of(place), given, shards):
        run_shards(GenerationWorker, given, files, "answering", workers, reserved)
        return merge_jobs(files, place)


def shards_of(output: Place) -> Place:
    """The folder of an output's shards."""
    return output.with_name(f"{output.name}.shards")


def at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r}: give a whole number of at least 1")
