"""The state of a tenant that has ended and whose slot another tenant took, in its folder. A longer run goes on from
it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .. import atomic
from ..adapters.folder import safetensors_bytes
from ..processes import broadcast_arrays, full_arrays, on_first_process
from ..storage.bucket import Place
from .checkpoint import check_shapes, named

FILE = "last_state.safetensors"


def write_last_state(folder: Place, state: Any) -> None:
    """Writes one tenant's weights, moments and step, a slice of a TrainState."""
    arrays = {name: np.asarray(array) for name, array in named(full_arrays(state)).items()}
    on_first_process(lambda: atomic.write_bytes(folder / FILE, safetensors_bytes(arrays)))


def read_last_state(folder: Place, like: Any) -> Any:
    """What `write_last_state` wrote, as arrays of NumPy.

    Args:
        like: a tree with the shapes of the state.

    Raises ValueError, naming the file, where it is missing or damaged.
    """
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named(like).items()}

    def read_first() -> None:
        from safetensors.numpy import load

        try:
            found = load((folder / FILE).read_bytes())
            found = {name: array.reshape(arrays[name].shape) for name, array in found.items() if name in arrays}
            check_shapes({name: array.shape for name, array in found.items()}, arrays)
        except Exception as error:  # whatever the file system or safetensors say
            raise ValueError(
                f"{folder / FILE}: the tenant can't go on from it ({error}); restore it from a copy, or choose another "
                "output_dir"
            ) from None
        arrays.update(found)

    on_first_process(read_first)
    leaves = [broadcast_arrays(arrays[name]) for name in named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
