"""Checkpoints of a run, by orbax: adapter, optimiser state, step and best score; never the backbone.

The first process alone writes and reads them, so that hosts need share no disk; the others get the arrays from it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..processes import arrays_of_first, by_first, gathered, is_first
from .step import TrainState


class Progress(NamedTuple):
    """Where a run stands beside its arrays. The data position is the step: batch i is a pure function of (seed, i)."""

    step: int
    best_score: float | None
    best_step: int
    since_best: int
    """evaluations without a better score"""


def open_checkpoints(folder: Path, *, keep: int = 2):
    """The checkpoints under a folder, of which the newest few are kept; an interrupted save is never taken for a
    whole one. None on a process that is not the first."""
    if not is_first():
        return nullcontext()
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save_checkpoint(checkpoints, state: TrainState, progress: Progress) -> None:
    arrays = gathered(named(state))
    by_first(lambda: write(checkpoints, arrays, progress))


def write(checkpoints, arrays: dict[str, np.ndarray], progress: Progress) -> None:
    import orbax.checkpoint as ocp

    saved = ocp.args.Composite(state=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress._asdict()))
    checkpoints.save(progress.step, args=saved)
    checkpoints.wait_until_finished()


def restore_checkpoint(checkpoints, state: TrainState) -> tuple[TrainState, Progress] | None:
    """The newest checkpoint, in the shapes and shardings of `state`; None where there is none.

    Raises ValueError, naming its folder, for a checkpoint that is damaged.
    """
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named(state).items()}
    found = by_first(lambda: read(checkpoints, arrays))
    if found is None:
        return None
    arrays = arrays_of_first(arrays)
    leaves = [laid_out(arrays[name], leaf) for name, leaf in named(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), Progress(**found)


def read(checkpoints, arrays: dict[str, np.ndarray]) -> dict | None:
    """Fills the arrays from the newest checkpoint, and gives its Progress as a dictionary."""
    import orbax.checkpoint as ocp

    step = checkpoints.latest_step()
    if step is None:
        return None
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(arrays), progress=ocp.args.JsonRestore())
    try:
        restored = checkpoints.restore(step, args=wanted)
        arrays.update({name: restored.state[name] for name in arrays})
        return Progress(**restored.progress)._asdict()
    except (KeyError, TypeError, ValueError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{checkpoints.directory}/{step}: the checkpoint can't be read ({said}); delete that folder to resume from "
            "the one before it"
        ) from None


def laid_out(array: np.ndarray, leaf: jax.Array) -> jax.Array:
    """The array as `leaf` lies; what lies on no mesh (a counter) is left to go where the others are."""
    return jax.device_put(array, leaf.sharding) if isinstance(leaf.sharding, NamedSharding) else jnp.asarray(array)


def named(state: TrainState) -> dict[str, jax.Array]:
    """A state's arrays by their paths: orbax sees plain arrays, not Flax's classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
