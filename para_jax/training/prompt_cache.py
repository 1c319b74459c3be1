"""train.cache_prompts: the states of a run's prompts, computed once and given to every step.

With scope `response` the prompts' pass through the plain backbone is the same for every epoch, tenant, rate and seed.
So each distinct prompt is computed once, before the first step, and a step runs the tails alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..adapters.adapter import Adapter
from ..data.batches import Batch, Bucket
from ..data.example_arrays import ExampleArrays, examples_digest
from ..data.packing import Packed, RowShape
from ..data.prefetch import AHEAD, THREADS
from ..data.schedule import TenantOrder
from ..messages import say
from ..progress import Progress
from ..tail import PromptStates
from . import prompt_file
from .prompt_states import StatesFormat, computed, pooler_digest, pooler_of, states_format_of
from .stop import interruption_point

#: The share of the free memory, or of the free space on the disk, that may be taken.
USABLE = 0.5


class PromptCache(NamedTuple):
    """The states of distinct prompts."""

    place: dict[bytes, slice]
    """where each prompt's record is in the data, by its token ids as int32"""
    data: np.ndarray
    """uint8 [bytes]"""
    states_format: StatesFormat

    def states(self, batch: Batch | Packed, prompt: int) -> PromptStates:
        """The states of a batch's prompts, arrays [passes, layers, rows, ...] of NumPy.

        Args:
            batch: arrays [passes, rows, ...].
            prompt: the tokens per row to pad to.
        """
        (passes, rows), form = batch.tokens.shape[:2], self.states_format
        segments = batch.start.shape[2:] if isinstance(batch, Packed) else ()
        shape = passes, form.layers, rows, form.kv_heads, prompt, form.head_dim
        keys, values = (np.zeros(shape, form.dtype) for _ in range(2))
        summaries = np.zeros((passes, form.layers, rows, *segments, form.width), form.summary_dtype)
        for index in np.ndindex(passes, rows):
            row, stop = (index[0], slice(None), index[1]), 0
            for segment, ids in prompts_of_row(batch, index):
                start, stop = stop, stop + len(ids)
                found = self.states_format.read(self.data[self.place[ids.tobytes()]], len(ids))
                keys[row][:, :, start:stop], values[row][:, :, start:stop] = found.keys, found.values
                summaries[(*row, *segment)] = found.summaries
        return PromptStates(keys, values, summaries)  # pyright: ignore[reportArgumentType]


def prompts_of_row(batch: Batch | Packed, index: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """The prompts of one row in their order, without padding: (its segment, in packed rows), token ids."""
    tokens, prompt, length = batch.tokens[index], batch.prompt_length[index], batch.length[index]
    if not isinstance(batch, Packed):
        if length > prompt:
            yield (), tokens[:prompt]
        return
    for segment in np.flatnonzero(length > prompt).tolist():
        start = batch.start[index][segment]
        yield (segment,), tokens[start : start + prompt[segment]]


def cached_prompts(
    where: str,
    model,
    adapter_config: Any,
    orders: Sequence[TenantOrder],
    shapes: Sequence[Bucket | RowShape],
    *,
    step_rows: int,
    rows: int,
    held: dict[Any, PromptCache],
) -> PromptCache:
    """The states of every prompt that the steps of these orders read, on the current mesh.

    Args:
        where: "memory" or "disk".
        shapes, step_rows: the shapes of a step's rows, and their number.
        rows: of a batch that computes prompts, over all devices.
        held: what this function gave before for the same model. It keeps the last one.

    Raises ValueError, before any prompt is computed, where there is too little memory or space.
    """
    prompts, pooler = distinct_prompts(orders), pooler_of(adapter_config, model.config)
    key = where, examples_digest(prompts), pooler_digest(pooler), rows, jax.sharding.get_mesh()
    if key not in held:
        held.clear()
        states_format = states_format_of(model, pooler)
        ahead = (AHEAD + THREADS) * step_rows * max(row_size(states_format, shape) for shape in shapes)
        held[key] = filled(where, model, pooler, prompts, states_format, rows, ahead)
    return held[key]


def filled(
    where: str, model, pooler: Adapter, prompts: ExampleArrays, states_format: StatesFormat, rows: int, ahead: int
) -> PromptCache:
    """The states of these prompts.

    Args:
        ahead: bytes of the batches that are made ahead of their steps.
    """
    ends = np.cumsum(states_format.size(prompts.lengths)).tolist()
    size = ends[-1]
    say(
        f"train.cache_prompts={where}: {len(prompts)} distinct prompts with {prompts.lengths.sum()} tokens take "
        f"{size:,} bytes, and the batches that are made ahead up to {ahead:,} bytes of memory"
    )
    require_room(where, ahead + size * (where == "memory"), free_memory(), "memory")

    def records() -> Iterator[bytes]:
        with Progress("computing prompts", len(prompts), unit="prompt") as bar:
            for count, part in computed(model, pooler, prompts, rows):
                yield part
                bar.advance(count)
                interruption_point()

    if where == "memory":
        data = in_memory(size, records())
    else:
        data = on_disk(prompt_file.file_of(model, pooler, prompts, rows), size, records())
    ids = (prompts.ids[a:b].tobytes() for a, b in zip(prompts.starts, prompts.starts[1:], strict=False))
    place = {key: slice(a, b) for key, a, b in zip(ids, [0, *ends[:-1]], ends, strict=True)}
    return PromptCache(place, data, states_format)


def distinct_prompts(orders: Sequence[TenantOrder]) -> ExampleArrays:
    """The distinct prompts that all steps of these orders read, as examples without completions, shortest first."""
    read: dict[int, tuple[Sequence, set[int]]] = {}  # the combinations of a sweep share their examples
    for order in orders:
        _, chosen = read.setdefault(id(order.examples), (order.examples, set()))
        for step in range(min(order.total_steps, order.plan.batches_per_epoch)):
            chosen.update(order.plan.batch_indices(step)[1])
    found = {np.array(examples[i].prompt_ids, np.int32).tobytes() for examples, chosen in read.values() for i in chosen}
    prompts = [np.frombuffer(ids, np.int32) for ids in sorted(found, key=lambda ids: (len(ids), ids))]
    return ExampleArrays(np.concatenate(prompts), np.array([(len(ids), 0) for ids in prompts], np.int32))


def in_memory(size: int, records: Iterator[bytes]) -> np.ndarray:
    data, stop = np.empty(size, np.uint8), 0
    for part in records:
        start, stop = stop, stop + len(part)
        data[start:stop] = np.frombuffer(part, np.uint8)
    assert stop == size, (stop, size)
    return data


def on_disk(file: Path, size: int, records: Iterator[bytes]) -> np.ndarray:
    """The records in a file of the user's cache, which are computed only if it does not exist."""
    found = prompt_file.mapped(file, size)
    if found is not None:
        say(f"using the states of prompts in {file}")
        return found
    require_room("disk", size, prompt_file.free_space(), f"space in {file.parent}")
    prompt_file.write(file, size, records)
    found = prompt_file.mapped(file, size)
    if found is None:
        raise ValueError(f"train.cache_prompts=disk: {file} was deleted as soon as it was written; use memory or off")
    return found


# -------------------------------------------------------------------------------------------------------------- limits


def row_size(states_format: StatesFormat, shape: Bucket | RowShape) -> int:
    """Bytes of a row's states in a batch of this shape."""
    segments = shape.segments if isinstance(shape, RowShape) else 1
    return states_format.size(shape.prompt or shape.length) + (segments - 1) * states_format.summary_size


def require_room(where: str, size: int, free: int | None, what: str) -> None:
    """Raises ValueError where `size` bytes are more than may be taken of the free ones."""
    if free is not None and size > USABLE * free:
        others = "train.cache_prompts=off or disk" if where == "memory" else "train.cache_prompts=off"
        raise ValueError(
            f"train.cache_prompts={where} needs {size:,} bytes of {what}, more than {USABLE:.0%} of the {free:,} that "
            f"are free; use {others}, fewer examples or steps, or shorter prompts (data.max_seq_length)"
        )


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, also in a container; None if unknown."""
    found = []
    with suppress(OSError, ValueError):
        match = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found += [1024 * int(match[1])] if match else []
        found += free_in_group(Path("/sys/fs/cgroup"))
    if not found:
        try:
            found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        except (ValueError, OSError, AttributeError):  # not on this system
            return None
    return min(found)


def free_in_group(group: Path) -> list[int]:
    """Bytes that the processes of a control group (a container) may still take; none without a limit. Pages of files
    that were read once count as free, because the kernel drops them: a backbone's file leaves many."""
    most, used, held = ((group / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    once = re.search(r"^inactive_file (\d+)$", held, re.MULTILINE)
    return [] if most.strip() == "max" else [int(most) - int(used) + (int(once[1]) if once else 0)]
