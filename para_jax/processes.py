"""Several processes of one run: what the first one alone does, and what all of them must know.

Every process must call these functions, in the same order. With one process they are plain.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_first() -> bool:
    """Whether this process is the one that logs and writes."""
    return jax.process_index() == 0


def gathered(tree):
    """The tree with whole NumPy arrays in this process's memory, wherever on the mesh their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def by_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process (a value that JSON holds), on all of them; it runs there alone, and its
    ValueError is raised everywhere."""
    if jax.process_count() == 1:
        return make()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"made": make()}
        except ValueError as error:
            said = {"error": str(error)}
    said = json.loads(text_of_first(json.dumps(said)))
    if "error" in said:
        raise ValueError(said["error"])
    return said["made"]


def text_of_first(text: str) -> str:
    """The first process's text."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(arrays_of_first(np.int64(data.size)))
    return arrays_of_first(data if is_first() else np.zeros(size, np.uint8)).tobytes().decode()


def arrays_of_first(tree):
    """The first process's arrays, as NumPy arrays; the others give a tree of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return jax.device_get(broadcast_one_to_all(tree))
