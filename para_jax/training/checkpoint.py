"""Checkpoints of a run, written by orbax while training continues: adapters, optimiser state and where the run stands;
never the backbone. Only the first process reads and writes them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..io import atomic
from ..io.checks import expanded, printable
from ..io.messages import warn
from ..io.progress import Progress
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.service import file_system
from ..runtime.processes import broadcast_arrays, full_arrays, is_first, on_first_process


@contextmanager
def open_checkpoints(folder: Place, *, keep: int = 2) -> Iterator[Any]:
    """The checkpoints in a folder (None on processes other than the first). The newest few are kept, and an interrupted
    save is never mistaken for a complete one. Waits at the end for what is still being written.

    Raises ValueError where the folder can't be opened, and where something could not be written, unless the body
    raised an error before.
    """
    if not is_first():
        yield None
        return
    import orbax.checkpoint as ocp
    from etils import epath

    folder.mkdir(parents=True, exist_ok=True)
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False, cleanup_tmp_directories=True, multiprocessing_options=alone
    )
    directory = epath.Path(str(folder.absolute()))
    if isinstance(folder, BucketPath):
        file_system()  # raises where gcsfs is not installed, and sets up orbax's
    checkpoints = ocp.CheckpointManager(directory, options=options)
    # Only the loop may ask the preemption service, step by step: asked about an older step, it forgets the newest.
    checkpoints.reached_preemption = lambda step: False
    try:
        yield checkpoints
        finish_saving(checkpoints)
    finally:
        with suppress(Exception):  # an error of the body must not be hidden
            checkpoints.close()


# -------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(checkpoints, state: Any, step: int, progress: dict[str, Any]) -> None:
    """Copies the state to host memory and writes it from there while the caller continues. Every process calls this.

    Where there is a checkpoint of this step, which is of the same state, its progress alone is replaced.

    Args:
        state: a TrainState.
        progress: where the run stands (runs.standing.Standing).

    Raises ValueError for a state that is not finite, and if the save before could not be written (a full disk).
    """
    arrays = {}
    for name, leaf in arrays_by_path(state).items():
        array = full_arrays(leaf)
        if is_first():  # the others keep one array at a time
            arrays[name] = array
    on_first_process(lambda: start_saving(checkpoints, arrays, step, progress))


def start_saving(checkpoints, arrays: dict[str, Any], step: int, progress: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    finish_saving(checkpoints)
    folder = expanded(str(checkpoints.directory))
    arrays = {name: np.array(array) for name, array in arrays.items()}  # copies: the next step reuses this memory
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"step {step}: the state is not finite, and is not saved; lower train.learning_rate")
    about = progress | {"sha256": digest_of(arrays)}
    saved = ocp.args.Composite(state=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(about))
    with errors_in_one_line(checkpoints):
        if step in steps_in(folder):
            atomic.write_text(progress_file(folder, step), json.dumps(about))
        else:
            checkpoints.save(step, args=saved, force=True)  # whatever interval orbax would choose


def finish_saving(checkpoints) -> None:
    """Waits until everything is written. Raises ValueError for what could not be written."""
    if checkpoints is not None:
        with errors_in_one_line(checkpoints), Progress("saving the checkpoint"):
            checkpoints.wait_until_finished()


# ------------------------------------------------------------------------------------------------------------- reading


def restore_checkpoint(checkpoints, state: Any, run: dict[str, str]) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint of this run, in the shapes and shardings of `state`, and its progress; None if there is
    none. Newer ones that are damaged are set aside with a warning.

    The arrays of `state` are deleted as those of the checkpoint replace them: a device needs memory for its part of one
    state, and for a piece of an array on its way (processes.PIECE).

    Args:
        run: what the run is made of; see runs.standing.Standing.

    Raises ValueError if there are checkpoints and none of them can be used, or if the newest is of another backbone or
    other data.
    """
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in arrays_by_path(state).items()}

    def read_first() -> dict[str, Any] | None:
        found = newest_whole(checkpoints, arrays, run)
        arrays.update(found[0] if found else {})
        return found and found[1]

    progress = on_first_process(read_first)
    if progress is None:
        return None
    leaves = []
    for name, leaf in arrays_by_path(state).items():
        leaves.append(placed_like(leaf, broadcast_arrays(arrays.pop(name))))  # popped: the host lets go of it too
        leaf.delete()  # one array at a time, not two states
    return jax.tree.unflatten(jax.tree.structure(state), leaves), progress


def newest_whole(
    checkpoints, wanted: dict[str, np.ndarray], run: dict[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    folder, problems = expanded(str(checkpoints.directory)), {}
    for step in steps_in(folder):
        try:
            progress = json.loads(progress_file(folder, step).read_bytes())
            other = differences(progress["run"], run)  # before the arrays, which are large
            arrays = {} if other else read_arrays(checkpoints, step, wanted, progress.pop("sha256"))
        except Exception as error:  # the readers below orbax raise anything for damaged files
            problems[step] = reason(error)
            continue
        if other:
            raise ValueError(
                f"{folder / str(step)}: it is of another run: {other}; put that back, or choose another output_dir "
                "(train.init_from starts from an adapter)"
            )
        for damaged, said in problems.items():
            warn(
                f"{folder / str(damaged)}: the checkpoint can't be used ({said}); it is kept as "
                f"{set_aside(folder / str(damaged)).name}, and the run resumes from step {step}"
            )
        # Folders may have been renamed behind orbax's back.
        checkpoints.reload()
        return arrays, progress
    if problems:
        step, said = next(iter(problems.items()))
        raise ValueError(
            f"{folder}: none of the checkpoints can be used ({folder / str(step)}: {said}); choose another output_dir, "
            "or delete that folder to start again"
        )
    return None


def differences(held: dict[str, str], run: dict[str, str]) -> str:
    """What a checkpoint's run is made of that this run is not: "another backbone, other training data (20 examples
    there, 24 here)"; empty if nothing is."""
    said = []
    for name in sorted(held | run):
        there, here = held.get(name), run.get(name)
        if name.startswith("backbone"):  # one in another dtype has another name
            said += [f"another {name}"] * (None not in (there, here) and there != here)
        elif there != here:
            counts = [(digest or "0").partition(" ")[0] for digest in (there, here)]
            same = f"{counts[1]} examples, not the same"
            count = same if counts[0] == counts[1] else f"{counts[0]} examples there, {counts[1]} here"
            said.append(f"other {printable(name, 150)} ({count})")
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def read_arrays(checkpoints, step: int, wanted: dict[str, np.ndarray], digest: str) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint, in the shapes of `wanted`. Raises ValueError for bytes with another digest: orbax
    notices no flipped bit."""
    import orbax.checkpoint as ocp

    read = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
    restored = checkpoints.restore(step, args=read).state
    arrays = {name: np.asarray(restored[name]) for name in wanted}
    if digest_of(arrays) != digest:
        raise ValueError("its bytes have changed since they were written")
    return arrays


def progress_file(folder: Place, step: int) -> Place:
    """What orbax's JsonSave writes, under the name `progress`."""
    return folder / str(step) / "progress" / "metadata"


#: What orbax writes last into a checkpoint. In a bucket it alone tells a whole one from one that a kill broke off.
WHOLE = "commit_success.txt"


def steps_in(folder: Place) -> list[int]:
    """The steps of the whole checkpoints in a folder, the newest first. Orbax deletes others in the background."""
    names = [path.name for path in folder.iterdir() if path.name.isdecimal() and str(int(path.name)) == path.name]
    if isinstance(folder, BucketPath):
        names = [name for name in names if (folder / name / WHOLE).is_file()]
    return sorted(map(int, names), reverse=True)


def set_aside(folder: Place) -> Place:
    """Renames a damaged checkpoint, so that it stays but is not read again. In a bucket its objects are copied."""
    names = (folder.with_name(f"{folder.name}.damaged{i or ''}") for i in range(1000))
    aside = next(path for path in names if not path.exists())
    if isinstance(folder, BucketPath):
        for file in folder.all_files():
            file.copy_to(BucketPath(file.bucket, aside.key + file.key.removeprefix(folder.key)))
        folder.delete_all()
    else:
        os.rename(folder, aside)
    return aside


# -------------------------------------------------------------------------------------------------------------- pieces


def arrays_by_path(state: Any) -> dict[str, jax.Array]:
    """A state's arrays by their paths: orbax gets plain arrays instead of Flax's classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def placed_like(leaf: jax.Array, array: np.ndarray) -> jax.Array:
    """The array with the layout of `leaf`. A counter that has not met a mesh yet stays free to go anywhere."""
    if isinstance(leaf.sharding, NamedSharding):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])
    return jnp.asarray(array)


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    """The sha256 of all arrays' bytes in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def reason(error: Exception) -> str:
    """What the operating system said, where that is the cause; else the error's first line. A long line is cut in
    the middle: orbax names files first, and the cause last."""
    said = str(error)
    system = (os.strerror(number) for number in errno.errorcode)
    line = (said.splitlines() or [type(error).__name__])[0]
    line = line if len(line) <= 520 else f"{line[:200]} ... {line[-300:]}"
    return next((text for text in system if text in said), line if line.isprintable() else repr(line))


@contextmanager
def errors_in_one_line(checkpoints) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax raises what the file system or its threads raise
        said = reason(error)
        full = said in map(os.strerror, atomic.FULL)
        what = "make room there" if full else "make sure that the folder can be written and renamed in"
        raise ValueError(
            f"{checkpoints.directory}: a checkpoint could not be saved ({said}); what was saved before is kept: "
            f"{what}, and the same command resumes"
        ) from None
