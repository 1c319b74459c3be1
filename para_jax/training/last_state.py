"""Keeps the state of a tenant that has ended in its folder, because another tenant takes its slot. If the run is made
longer, the tenant continues from this state.

Each has a file of its own, named by its steps. A run that is made longer twice, or that is killed and goes back to a
checkpoint from before the tenant ended again, needs the earlier one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..io import atomic
from ..io.storage.bucket import BucketPath, Place
from ..runtime.processes import broadcast_arrays, full_arrays, on_first_process
from .checkpoint import arrays_by_path, check_shapes


def file_of(folder: Place, steps: int) -> Place:
    return folder / f"last_state_{steps}.safetensors"


def last_states_left(folder: Place) -> list[Place]:
    """Temporary files that killed writes left; none in a bucket."""
    if isinstance(folder, BucketPath):
        return []
    return sorted(folder.glob(".last_state_*.safetensors." + "[0-9a-f]" * 8))


def write_last_state(folder: Place, steps: int, state: Any) -> None:
    """Writes one tenant's weights, moments and step, a slice of a TrainState, after `steps` of its own steps."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays_by_path(full_arrays(state)).items()}
    on_first_process(lambda: atomic.write_bytes(file_of(folder, steps), save(arrays)))


def read_last_state(folder: Place, steps: int, like: Any) -> Any:
    """What `write_last_state` wrote after these steps, as arrays of NumPy.

    Args:
        like: a tree with the shapes of the state.

    Raises ValueError, naming the file, where it is missing or damaged.
    """
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in arrays_by_path(like).items()}

    file = file_of(folder, steps)

    def read_first() -> None:
        from safetensors.numpy import load

        try:
            found = load(file.read_bytes())
            found = {name: array.reshape(arrays[name].shape) for name, array in found.items() if name in arrays}
            check_shapes({name: array.shape for name, array in found.items()}, arrays)
        except Exception as error:  # whatever the file system or safetensors say
            raise ValueError(
                f"{file}: the tenant can't go on from it ({error}); restore it from a copy, or choose another "
                "output_dir"
            ) from None
        arrays.update(found)

    on_first_process(read_first)
    leaves = [broadcast_arrays(arrays[name]) for name in arrays_by_path(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
