"""Checkpoints of a run, by orbax: adapter, optimiser state, step and best score; never the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

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
    whole one."""
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))


def save_checkpoint(checkpoints, state: TrainState, progress: Progress) -> None:
    import orbax.checkpoint as ocp

    saved = ocp.args.Composite(
        state=ocp.args.StandardSave(named(state)), progress=ocp.args.JsonSave(progress._asdict())
    )
    checkpoints.save(progress.step, args=saved)
    checkpoints.wait_until_finished()


def restore_checkpoint(checkpoints, state: TrainState) -> tuple[TrainState, Progress] | None:
    """The newest checkpoint, in the shapes and shardings of `state`; None where there is none.

    Raises ValueError, naming its folder, for a checkpoint that is damaged.
    """
    import orbax.checkpoint as ocp

    if checkpoints.latest_step() is None:
        return None
    wanted = ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, named(state))),
        progress=ocp.args.JsonRestore(),
    )
    step = checkpoints.latest_step()
    try:
        restored = checkpoints.restore(step, args=wanted)
        leaves = [restored.state[name] for name in named(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), Progress(**restored.progress)
    except (KeyError, TypeError, ValueError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{checkpoints.directory}/{step}: the checkpoint can't be read ({said}); delete that folder to resume from "
            "the one before it"
        ) from None


def named(state: TrainState) -> dict[str, jax.Array]:
    """A state's arrays by their paths: orbax sees plain arrays, not Flax's classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
