"""A checkpoint gives back the very bits, on the devices they came from, and is whole or not there."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import backbone, strong
from tiny_run import ADAPTER, STEPS, TRAIN

from para_jax import init_adapter
from para_jax.sharding import make_mesh, place
from para_jax.training.checkpoint import Progress, named, open_checkpoints, restore_checkpoint, save_checkpoint
from para_jax.training.step import init_state


def state_on(mesh, seed):
    config = backbone("llama").config
    with jax.set_mesh(mesh):
        return init_state(place(strong(init_adapter(ADAPTER, config, seed=seed), seed), mesh, config), TRAIN, STEPS)


@jax.jit
def moved(state):
    """A state as a step leaves it: other counters and moments."""
    return state._replace(step=state.step + 4, optimizer=jax.tree.map(lambda leaf: leaf + 1, state.optimizer))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_what_is_restored_is_bit_for_bit_what_was_saved(tmp_path, sizes):
    mesh, progress = make_mesh(*sizes), Progress(4, 0.123456789012345, 3, 1)
    with jax.set_mesh(mesh):
        saved = moved(state_on(mesh, seed=1))
    with jax.set_mesh(mesh), open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        save_checkpoint(checkpoints, saved, progress)
    wanted = state_on(mesh, seed=2)
    with jax.set_mesh(mesh), open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, found = restore_checkpoint(checkpoints, wanted)
    assert found == progress and jax.tree.structure(state) == jax.tree.structure(saved) and state.step == 4
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
    for mine, other in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert mine.ndim == 0 or mine.sharding == other.sharding
    with jax.set_mesh(mesh):
        assert moved(state).step == 8  # counters and weights can be used together, as a step does


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert restore_checkpoint(checkpoints, state_on(make_mesh(), seed=1)) is None


def test_the_newest_few_are_kept_and_an_interrupted_save_is_not_taken_for_a_whole_one(tmp_path):
    folder, state = tmp_path / "checkpoints", state_on(make_mesh(), seed=1)
    with open_checkpoints(folder) as checkpoints:
        for step in (2, 4, 6):
            save_checkpoint(checkpoints, state, Progress(step, None, 0, 0))
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["4", "6"]
    shutil.copytree(
        folder / "6" / "state", folder / "8.orbax-checkpoint-tmp" / "state"
    )  # as orbax names what it writes
    with open_checkpoints(folder) as checkpoints:
        assert restore_checkpoint(checkpoints, state)[1].step == 6


def test_a_checkpoint_holds_adapter_optimiser_and_step_and_never_the_backbone(tmp_path):
    state = state_on(make_mesh(), seed=1)
    names = named(state)
    assert len(names) == len(jax.tree.leaves(state)) and {name.split(".")[1].split("[")[0] for name in names} == {
        "adapter", "optimizer", "step",
    }  # fmt: skip
    assert all(isinstance(leaf, jnp.ndarray) for leaf in names.values())


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    state = state_on(make_mesh(), 1)
    with open_checkpoints(tmp_path) as checkpoints:
        save_checkpoint(checkpoints, state, Progress(4, None, 0, 0))
    (tmp_path / "4" / "progress" / "metadata").write_text("garbage")
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"/4: .* delete that folder"):
        restore_checkpoint(checkpoints, state)
