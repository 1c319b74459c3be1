"""A checkpoint gives back the very bits, on the devices they came from, and is whole or not there."""

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, strong
from one_adapter import fresh_state
from tiny_run import ADAPTER, TRAIN

from para_jax import init_adapter
from para_jax.runtime.sharding import make_mesh, place
from para_jax.training.checkpoint import (
    arrays_by_path,
    finish_saving,
    open_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)


def save(checkpoints, state, step, best_step=0, run=None):
    save_checkpoint(checkpoints, state, step, {"step": step, "best_step": best_step, "run": run or {}})


def restore(checkpoints, state, run=None):
    return restore_checkpoint(checkpoints, state, run or {})


def state_on(mesh, seed, adapter=ADAPTER):
    config = backbone("llama").config
    with jax.set_mesh(mesh):
        return fresh_state(place(strong(init_adapter(adapter, config, seed=seed), seed), mesh, config), TRAIN)


@jax.jit
def moved(state):
    """A state as a step leaves it: other counters and moments."""
    return state._replace(step=state.step + 4, optimizer=jax.tree.map(lambda leaf: leaf + 1, state.optimizer))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_what_is_restored_is_bit_for_bit_what_was_saved(tmp_path, sizes):
    mesh, progress = make_mesh(*sizes), {"run": {}, "best_score": 0.123456789012345}
    with jax.set_mesh(mesh):
        saved = moved(state_on(mesh, seed=1))
    with jax.set_mesh(mesh), open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        save_checkpoint(checkpoints, saved, 4, progress)
    wanted = state_on(mesh, seed=2)
    with jax.set_mesh(mesh), open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, found = restore(checkpoints, wanted)
    assert found == progress and jax.tree.structure(state) == jax.tree.structure(saved) and state.step == 4
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert mine.sharding.is_equivalent_to(other.sharding, mine.ndim)
    with jax.set_mesh(mesh):
        assert moved(state).step == 8  # counters and weights can be used together, as a step does


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert restore(checkpoints, state_on(make_mesh(), seed=1)) is None


def test_the_newest_few_are_kept_and_an_interrupted_save_is_not_taken_for_a_whole_one(tmp_path):
    folder, state = tmp_path / "checkpoints", state_on(make_mesh(), seed=1)
    with open_checkpoints(folder) as checkpoints:
        for step in (2, 4, 6):
            save(checkpoints, state, step)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["4", "6"]
    shutil.copytree(
        folder / "6" / "state", folder / "8.orbax-checkpoint-tmp" / "state"
    )  # as orbax names what it writes
    with open_checkpoints(folder) as checkpoints:
        assert restore(checkpoints, state)[1]["step"] == 6


def test_a_checkpoint_of_the_same_step_and_state_gets_the_new_progress(tmp_path):
    saved = state_on(make_mesh(), seed=1)
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        for best in (0, 1):
            save(checkpoints, saved, 4, best)
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, found = restore(checkpoints, state_on(make_mesh(), seed=3))
    assert found["best_step"] == 1
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_checkpoint_holds_adapter_optimiser_and_step_and_never_the_backbone(tmp_path):
    state = state_on(make_mesh(), seed=1)
    names = arrays_by_path(state)
    assert len(names) == len(jax.tree.leaves(state)) and {name.split(".")[1].split("[")[0] for name in names} == {
        "adapters", "optimizer", "step", "finite",
    }  # fmt: skip
    assert all(isinstance(leaf, jnp.ndarray) for leaf in names.values())


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


DAMAGES = {
    "one byte is flipped": lambda folder: flip(largest(folder)),
    "the largest file is gone": lambda folder: largest(folder).unlink(),
    "the progress is garbage": lambda folder: (folder / "progress" / "metadata").write_text("garbage"),
    "everything is gone": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(damage, saved_twice, tmp_path, capsys):
    folder = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints"))
    state = state_on(make_mesh(), seed=3)
    DAMAGES[damage](folder / "6")
    with open_checkpoints(folder) as checkpoints:
        restored, progress = restore(checkpoints, state)
        assert progress["step"] == restored.step == 4
        warned = capsys.readouterr().err
        assert len(warned.splitlines()) == 1
        assert f"warning: {folder / '6'}: the checkpoint can't be used" in warned and "resumes from step 4" in warned
        assert sorted(path.name for path in folder.iterdir()) == ["4", "6.damaged"]
        save(checkpoints, restored, 6)  # its place is free
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6", "6.damaged"]


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """A folder with checkpoints of the steps 4 and 6."""
    folder, state = tmp_path_factory.mktemp("saved") / "checkpoints", state_on(make_mesh(), seed=1)
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, moved(state), 4)
        save(checkpoints, moved(state), 6)
    return folder


def test_where_no_checkpoint_can_be_read_nothing_is_touched(saved_twice, tmp_path):
    folder = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints"))
    for step in ("4", "6"):
        flip(largest(folder / step))
    with (
        open_checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match="none of the .* start again") as error,
    ):
        restore(checkpoints, state_on(make_mesh(), seed=3))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]


# ------------------------------------------------------------------------------------------------------ of another run


RUN = {"training data": "20 d1"}


def restored_step(folder, state, run):
    with open_checkpoints(folder) as checkpoints:
        return restore(checkpoints, state, run)[1]["step"]


def test_a_checkpoint_of_another_backbone_ends_the_resume(saved_twice, tmp_path):
    """Going on from an older one of this backbone would lose steps."""
    folder, state = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints")), state_on(make_mesh(), seed=3)
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, moved(state), 8, run=RUN | {"backbone in float32": "b1"})
    with pytest.raises(ValueError, match=f"{folder / '8'}: .*another backbone in float32"):
        restored_step(folder, state, RUN | {"backbone in float32": "b2"})
    assert (folder / "8").is_dir()
    assert restored_step(folder, state, RUN | {"backbone in bfloat16": "b3"}) == 8


def test_a_checkpoint_of_other_data_ends_the_resume(saved_twice, tmp_path):
    folder, state = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints")), state_on(make_mesh(), seed=3)
    for step in ("4", "6"):
        shutil.rmtree(folder / step)
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, moved(state), 8, run=RUN)
    other = RUN | {"training data": "24 d2", "validation data": "8 v1"}
    said = r"training data \(20 examples there, 24 here\), .*validation data.*; put that back"
    with pytest.raises(ValueError, match=said):
        restored_step(folder, state, other)


def test_what_is_saved_is_what_the_state_was_although_the_next_step_reuses_its_memory(tmp_path):
    state = state_on(make_mesh(), seed=1)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    donating = jax.jit(lambda state: jax.tree.map(lambda leaf: (leaf + 1).astype(leaf.dtype), state), donate_argnums=0)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state, 4)
        for _ in range(5):
            state = donating(state)
        finish_saving(checkpoints)
        restored, _ = restore(checkpoints, state)
    for mine, other in zip(jax.tree.leaves(restored), before, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_state_that_is_not_finite_is_not_saved(saved_twice, tmp_path):
    folder = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints"))
    state = state_on(make_mesh(), seed=1)
    state.adapters.down[...] = state.adapters.down[...].at[0, 0, 0].set(np.nan)
    with pytest.raises(ValueError, match="step 8: the state is not finite, and is not saved"):
        with open_checkpoints(folder) as checkpoints:
            save(checkpoints, state, 8)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]


def test_a_save_that_fails_in_the_background_is_one_error_and_keeps_earlier_saves(saved_twice, tmp_path):
    folder = Path(shutil.copytree(saved_twice, tmp_path / "checkpoints"))
    state = moved(state_on(make_mesh(), seed=1))
    with pytest.raises(ValueError, match=r"could not be saved \(.*File too large\).*same command resumes") as error:
        with open_checkpoints(folder) as checkpoints, files_of_at_most(5000):
            save(checkpoints, state, 8)
            finish_saving(checkpoints)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    with open_checkpoints(folder) as checkpoints:
        assert restore(checkpoints, state)[1]["step"] == 6
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ["4", "6"]


@contextmanager
def files_of_at_most(size):
    """Lets no file grow beyond so many bytes, as a full disk does: writing fails in the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
