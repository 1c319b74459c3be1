"""Evaluations and batch jobs in shards on a Ray cluster, with the tables and answers of one machine.

Each shard goes to a folder or file of its own next to the output, as `para-jax evaluate --shard` and `para-jax generate
--shard` write it, and survives its worker there. At the end the shards are merged.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .. import cli
from ..adapters.names import named_adapters
from ..cli import generate
from ..config import RunConfig
from ..evaluation.merge import merge_folders
from ..evaluation.options import EvalOptions
from ..io.checks import expanded
from ..io.progress import Progress
from ..io.storage.bucket import Place
from ..serving.job_merge import merge_jobs
from .workers import Evaluated, EvaluationWorker, GenerationWorker

#: Further workers that a shard gets after one has died. Ray itself would replace them for ever.
MORE_WORKERS = 3


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

    The same call goes on where an earlier one stopped.

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

    Raises the error of the first shard that fails, as Ray wraps it.
    """
    sources = dict(adapters) if isinstance(adapters, Mapping) else named_adapters(list(map(str, adapters)))
    tasks = config if tasks is None else tasks
    call = Evaluated(config, sources, tasks, options or EvalOptions(), tensor_parallel_size)
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    folders = [shards_of(place) / str(index) for index in range(shards)]
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

    Raises ValueError, before anything is started, for an unknown option or tenant and for a missing input, and the
    error of the first shard that fails, as Ray wraps it.
    """
    place, reserved = expanded(output).absolute(), {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources}
    call = command_options("generate", {**options, "input": expanded(input), "output": place})
    call.sources, call.tenants = generate.checked(call)
    files = [shards_of(place) / f"{index}.jsonl" for index in range(shards)]
    run_shards(GenerationWorker, call, files, "answering", workers, reserved)
    return merge_jobs(files, place)


def command_options(command: str, given: Mapping[str, Any]) -> Namespace:
    """The options of a command: its defaults, and what is given by name."""
    options = vars(cli.parse([command]))
    if unknown := ", ".join(given.keys() - options.keys()):
        raise ValueError(f"para-jax {command} has no option {unknown}; see para-jax {command} --help")
    return Namespace(**{**options, **given})


def shards_of(output: Place) -> Place:
    """The folder of an output's shards."""
    return output.with_name(f"{output.name}.shards")


def run_shards(
    worker: type, call: Any, outputs: Sequence[Place], what: str, workers: int, reserved: Mapping[str, Any]
) -> None:
    """Has all shards answered by a pool of Ray Data's actors: one shard is one task.

    Args:
        worker: a class as workers.ShardWorker.
        call: what all shards have in common.
        outputs: of each shard.
        what: for the bar of the shards that have ended.
        workers: actors of the pool.
        reserved: what each of them needs: num_cpus, num_gpus, resources.
    """
    try:
        import ray.data as data
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'para_jax[ray]'") from None
    count = len(outputs)
    rows = [{"index": index, "output": str(output)} for index, output in enumerate(outputs)]
    shards = data.from_items(rows, override_num_blocks=count).map_batches(
        worker,
        batch_size=1,
        # Without a queue in front of each worker, none waits behind a long shard while another worker is idle.
        compute=data.ActorPoolStrategy(size=min(workers, count), max_tasks_in_flight_per_actor=1),
        fn_constructor_kwargs={"call": call, "folder": os.getcwd(), "count": count},
        max_task_retries=MORE_WORKERS,
        **reserved,
    )
    shards.context.enable_progress_bars = False
    ended: Any = iter(shards.iter_rows())
    with Progress(what, count, unit="shard", keep=True) as bar, closing(ended):
        for _ in ended:  # closed after Ctrl-C too: that ends the workers
            bar.advance()
