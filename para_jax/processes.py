"""Several processes of one run: what the first one alone does, and what all of them must know.

Every process must call these functions, in the same order. With one process they are plain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

#: The most bytes that travel between processes at once. Every device holds such a piece twice meanwhile, and no more:
#: a whole array may be larger than a device.
PIECE = 1 << 26


def is_first() -> bool:
    """Whether this process is the one that logs and writes."""
    return jax.process_index() == 0


def gathered(tree):
    """The tree with whole NumPy arrays in this process's memory, wherever on the mesh their parts lie."""

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(leaf, tiled=True) if leaf.nbytes <= PIECE else by_shards(leaf)

    return jax.tree.map(whole, tree)


def by_shards(leaf: jax.Array) -> np.ndarray:
    """The whole of an array that is spread over the processes: each part comes from a process that has it."""
    made = np.empty(leaf.shape, leaf.dtype)
    own = {shard.device: shard for shard in leaf.addressable_shards}
    owners = {str(index): (device, index) for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()}
    for device, index in owners.values():
        held = np.asarray(own[device].data) if device in own else np.empty(made[index].shape, made.dtype)
        made[index] = array_of(held, device.process_index)
    return made


def array_of(array: np.ndarray, process: int) -> np.ndarray:
    """One process's array, on all of them. The others give an array of the same shape and dtype, whose values do not
    matter. It travels in pieces of at most PIECE bytes, of few sizes, for each size is a program."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    source = jax.process_index() == process
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
    made = np.empty(data.size, np.uint8)
    size = min(PIECE, 1 << max(0, data.size - 1).bit_length())
    for start in range(0, data.size, size):
        piece = np.zeros(size, np.uint8)
        if source:
            piece[: data.size - start] = data[start : start + size]
        got = broadcast_one_to_all(piece, is_source=source)
        made[start : start + size] = got[: data.size - start]
    return made.view(array.dtype).reshape(array.shape)


def by_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process (a value that JSON holds), on all of them; it runs there alone, and its
    ValueError or OSError is raised everywhere, as a ValueError."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"made": make()}
        except (ValueError, OSError) as error:
            said = {"error": str(error)}
    said = json.loads(text_of_first(json.dumps(said)))
    if "error" in said:
        raise ValueError(said["error"])
    return said["made"]


def by_each(make: Callable[[], Any]) -> Any:
    """What `make` gives on this process; a ValueError or OSError on one of them is raised on all, as a ValueError that
    names the process, so that none waits for one that has stopped."""
    if jax.process_count() == 1:
        return make()
    made, problem = None, ""
    try:
        made = make()
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    for process, text in enumerate(texts_of_all(problem)):
        if text:
            raise ValueError(f"process {process}: {text}")
    return made


def require_same(what: str, value: Callable[[], Any]) -> None:
    """Raises ValueError on all processes where `value` gives one of them something else than the first; it is compared
    as JSON."""
    if jax.process_count() > 1:
        texts = texts_of_all(hashlib.sha256(json.dumps(value()).encode()).hexdigest())
        other = next((i for i, text in enumerate(texts) if text != texts[0]), None)
        if other is not None:
            raise ValueError(f"{what}: not the same on process {other} as on process 0; give every host the same")


def texts_of_all(text: str) -> list[str]:
    """Every process's text, in their order; of a long one its first 1000 bytes."""
    from jax.experimental.multihost_utils import process_allgather

    data = np.zeros(1000, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)[: data.size]
    data[: encoded.size] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in process_allgather(data)]


def text_of_first(text: str) -> str:
    """The first process's text."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(arrays_of_first(np.int64(data.size)))
    return arrays_of_first(data if is_first() else np.zeros(size, np.uint8)).tobytes().decode()


def arrays_of_first(tree):
    """The first process's arrays, as NumPy arrays; the others give a tree of the same shapes and dtypes. One array
    after another, in pieces: no device holds a whole one."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: array_of(np.asarray(leaf), 0), tree)
