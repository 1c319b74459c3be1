"""Shards on a pool of Ray Data's actors: one shard is one task, and a worker that died is replaced."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from ..io.progress import Progress
from ..io.shards import Shard
from ..io.storage.bucket import Place


def run_shards(
    worker: type, call: Any, outputs: Sequence[Place], what: str, workers: int, reserved: Mapping[str, Any]
) -> None:
    """Has all shards answered.

    Args:
        worker: a class as workers.ShardWorker.
        call: what all shards have in common.
        outputs: of each shard.
        what: for the bar of the shards that have ended.
        workers: actors of the pool.
        reserved: what each of them needs: num_cpus, num_gpus, resources.

    Raises ValueError for shards that failed, after all have been tried; but at once if the first one that ends has
    failed, since all may fail alike.
    """
    data, count = ray_data(), len(outputs)
    rows = [{"index": index, "output": str(output)} for index, output in enumerate(outputs)]
    shards = data.from_items(rows, override_num_blocks=count).map_batches(
        worker,
        batch_size=1,
        # Without a queue in front of each worker, none waits behind a long shard while another worker is idle.
        compute=data.ActorPoolStrategy(size=min(workers, count), max_tasks_in_flight_per_actor=1),
        fn_constructor_kwargs={"call": call, "folder": os.getcwd(), "count": count},
        **reserved,
    )  # Ray Data replaces an actor that died, and gives its task to the new one, any number of times
    shards.context.enable_progress_bars = False
    failed: dict[int, str] = {}
    with Progress(what, count, unit="shard", keep=True) as bar, closing(iter(shards.iter_rows())) as ended:
        for row in ended:  # closed after Ctrl-C too: that ends the workers
            if row["error"]:
                failed[row["index"]] = row["error"]
                if bar.done == 0:
                    break
            bar.advance()
    if failed:
        first = min(failed)
        counted = f"{len(failed)} of {count} shards failed" if bar.done else "the first shard to end failed"
        raise ValueError(f"{counted}; shard {Shard(first, count)}: {failed[first]}")


def ray_data():
    """Ray Data. Raises ImportError, naming the extra, if Ray is not installed."""
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'para_jax[ray]'") from None
    return ray.data
