"""train.cache_prompts: the states of a run's prompts, computed once and given to every step.

With scope `response` the prompts' pass through the plain backbone is the same for every epoch, tenant, rate and seed.
So each distinct prompt is computed once, before the first step, and a step runs the tails alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..data.batches import Batch, Bucket, full_batches, plan_buckets
from ..data.example_arrays import ExampleArrays, examples_digest
from ..data.packing import Packed, RowShape
from ..data.schedule import AHEAD, THREADS, TenantOrder
from ..io.messages import say
from ..io.progress import Progress
from ..model.tail import PromptStates, prompt_states
from ..runtime.sharding import shard_rows
from .stop import interruption_point

#: The share of the free memory that may be taken.
USABLE = 0.5
#: The maximum number of padded lengths that are compiled.
BUCKETS = 4


class PromptCache(NamedTuple):
    """The states of distinct prompts."""

    place: dict[bytes, slice]
    """where each prompt's tokens are, by its token ids as int32"""
    keys: np.ndarray
    """[tokens, layers, kv_heads, head_dim]"""
    values: np.ndarray
    """as keys"""

    def states(self, batch: Batch | Packed, prompt: int) -> PromptStates:
        """The states of a batch's prompts, arrays [passes, layers, rows, ...] of NumPy.

        Args:
            batch: arrays [passes, rows, ...].
            prompt: the tokens per row to pad to.
        """
        passes, rows = batch.tokens.shape[:2]
        _, layers, kv_heads, head_dim = self.keys.shape
        found = [np.zeros((passes, layers, rows, kv_heads, prompt, head_dim), self.keys.dtype) for _ in range(2)]
        for number, row in np.ndindex(passes, rows):
            stop = 0
            for ids in prompts_of_row(batch, (number, row)):
                start, stop = stop, stop + len(ids)
                for states, held in zip(found, (self.keys, self.values), strict=True):
                    states[number, :, row, :, start:stop] = np.moveaxis(held[self.place[ids.tobytes()]], 0, 2)
        return PromptStates(*found)  # pyright: ignore[reportArgumentType]


def prompts_of_row(batch: Batch | Packed, index: tuple[int, int]) -> Iterator[np.ndarray]:
    """The token ids of each prompt of one row in their order, without padding."""
    tokens, prompt, length = batch.tokens[index], batch.prompt_length[index], batch.length[index]
    if not isinstance(batch, Packed):
        if length > prompt:
            yield tokens[:prompt]
        return
    for segment in np.flatnonzero(length > prompt).tolist():
        start = batch.start[index][segment]
        yield tokens[start : start + prompt[segment]]


def cached_prompts(
    model,
    orders: Sequence[TenantOrder],
    shapes: Sequence[Bucket | RowShape],
    *,
    step_rows: int,
    rows: int,
    held: dict[Any, PromptCache],
) -> PromptCache:
    """The states of every prompt that the steps of these orders read, on the current mesh.

    Args:
        shapes, step_rows: the shapes of a step's rows, and their number.
        rows: of a batch that computes prompts, over all devices.
        held: what this function gave before for the same model. It keeps the last one.

    Raises ValueError, before any prompt is computed, where there is too little memory.
    """
    prompts = distinct_prompts(orders)
    key = examples_digest(prompts), rows, jax.sharding.get_mesh()
    if key not in held:
        held.clear()
        held[key] = computed(model, prompts, rows, step_rows * max(shape.prompt or shape.length for shape in shapes))
    return held[key]


def computed(model, prompts: ExampleArrays, rows: int, step_tokens: int) -> PromptCache:
    """The states of these prompts, shortest first.

    Args:
        rows: of a batch, over all devices.
        step_tokens: tokens of a step's prompts, with padding.
    """
    one = jax.eval_shape(prompt_states, model, jax.ShapeDtypeStruct((1, 1), jnp.int32)).keys
    layers, _, kv_heads, _, head_dim = one.shape
    tokens, of_token = int(prompts.lengths.sum()), 2 * layers * kv_heads * head_dim * one.dtype.itemsize
    size, ahead = tokens * of_token, (AHEAD + THREADS) * step_tokens * of_token
    say(
        f"train.cache_prompts=memory: {len(prompts)} distinct prompts with {tokens} tokens take {size:,} bytes, and "
        f"the batches that are made ahead up to {ahead:,} bytes of memory"
    )
    require_memory(size + ahead, free_memory())
    cache = PromptCache({}, *(np.empty((tokens, layers, kv_heads, head_dim), one.dtype) for _ in range(2)))
    stop = 0
    with Progress("computing prompts", len(prompts), unit="prompt") as bar:
        for chosen, batch in full_batches(prompts, rows, plan_buckets(prompts, BUCKETS)):
            states = jax.device_get(prompt_states(model, shard_rows(batch.tokens, ("batch",))))
            for i, example in enumerate(chosen):
                ids = np.asarray(prompts[example].prompt_ids, np.int32)
                place = slice(stop, stop := stop + len(ids))
                cache.place[ids.tobytes()] = place
                cache.keys[place] = np.moveaxis(states.keys[:, i, :, : len(ids)], 2, 0)
                cache.values[place] = np.moveaxis(states.values[:, i, :, : len(ids)], 2, 0)
            bar.advance(len(chosen))
            interruption_point()
    return cache


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


def require_memory(size: int, free: int | None) -> None:
    """Raises ValueError where `size` bytes are more than may be taken of the free ones."""
    if free is not None and size > USABLE * free:
        raise ValueError(
            f"train.cache_prompts=memory needs {size:,} bytes, more than {USABLE:.0%} of the {free:,} that are free; "
            "use train.cache_prompts=off, fewer examples or steps, or shorter prompts (data.max_seq_length)"
        )


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take; None if unknown."""
    with suppress(OSError):
        match = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return 1024 * int(match[1]) if match else None
