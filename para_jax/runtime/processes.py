"""Several processes of one run: work that only the first one does, and values that all of them must agree on.

Every process must call these functions, in the same order. With one process they do nothing special.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

#: The maximum number of bytes that travel between processes at once. Every device holds such a piece twice, but never a
#: complete array, which may be larger than a device.
PIECE = 1 << 26


def is_first() -> bool:
    """Whether this process is the one that logs and writes."""
    return jax.process_index() == 0


def full_arrays(tree):
    """The tree with complete NumPy arrays in the memory of this process, wherever on the mesh their parts are."""

    def full_array(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        from jax.experimental.multihost_utils import process_allgather

        return process_allgather(leaf, tiled=True) if leaf.nbytes <= PIECE else gather_shards(leaf)

    return jax.tree.map(full_array, tree)


def gather_shards(leaf: jax.Array) -> np.ndarray:
    """A complete array that is spread over the processes. Each part comes from a process that has it."""
    full = np.empty(leaf.shape, leaf.dtype)
    own = {shard.device: shard for shard in leaf.addressable_shards}
    owners = {str(index): (device, index) for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()}
    for device, index in owners.values():
        part = np.asarray(own[device].data) if device in own else np.empty(full[index].shape, full.dtype)
        full[index] = broadcast_array(part, device.process_index)
    return full


def broadcast_array(array: np.ndarray, process: int) -> np.ndarray:
    """The array of one process, on all of them. The others pass an array of the same shape and dtype with any values.
    It travels in pieces of at most PIECE bytes, whose sizes are powers of two, because each size compiles a program."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    source = jax.process_index() == process
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
    received = np.empty(data.size, np.uint8)
    size = min(PIECE, 1 << max(0, data.size - 1).bit_length())
    for start in range(0, data.size, size):
        piece = np.zeros(size, np.uint8)
        if source:
            piece[: data.size - start] = data[start : start + size]
        got = broadcast_one_to_all(piece, is_source=source)
        received[start : start + size] = got[: data.size - start]
    return received.view(array.dtype).reshape(array.shape)


def on_first_process(make: Callable[[], Any]) -> Any:
    """Runs `make` on the first process only, and returns its value (which JSON can hold) on all of them. A ValueError
    or OSError there is raised everywhere, as a ValueError."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"value": make()}
        except (ValueError, OSError) as error:
            said = {"error": str(error)}
    said = json.loads(broadcast_text(json.dumps(said)))  # an error too, or the others would wait
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


def on_every_process(make: Callable[[], Any]) -> Any:
    """Runs `make` on every process, and returns its value on this one. A ValueError or OSError on one of them is raised
    on all, as a ValueError that names the process, so that no process waits for one that has stopped."""
    if jax.process_count() == 1:
        return make()
    value, problem = None, ""
    try:
        value = make()
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    for process, text in enumerate(gather_texts(problem)):  # every process gathers, also after an error
        if text:
            raise ValueError(f"process {process}: {text}")
    return value


def require_same(what: str, value: Callable[[], Any]) -> None:
    """Raises ValueError on all processes if `value` returns something else on one of them than on the first, compared
    as JSON."""
    if jax.process_count() > 1:
        texts = gather_texts(hashlib.sha256(json.dumps(value()).encode()).hexdigest())
        other = next((i for i, text in enumerate(texts) if text != texts[0]), None)
        if other is not None:
            raise ValueError(f"{what} differs between process 0 and process {other}; give every host the same")


def gather_texts(text: str) -> list[str]:
    """The text of every process, in order, each cut to 1000 bytes."""
    from jax.experimental.multihost_utils import process_allgather

    data = np.zeros(1000, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)[: data.size]
    data[: encoded.size] = encoded
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in process_allgather(data)]


def broadcast_text(text: str) -> str:
    """The text of the first process, on all of them."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(broadcast_arrays(np.int64(data.size)))  # the others need arrays of this size
    return broadcast_arrays(data if is_first() else np.zeros(size, np.uint8)).tobytes().decode()


def broadcast_arrays(tree):
    """The arrays of the first process, as NumPy arrays, on all of them. The others pass a tree of the same shapes and
    dtypes. Arrays travel one after another, in pieces, so no device holds a complete one."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: broadcast_array(np.asarray(leaf), 0), tree)
