"""The last state of a tenant that gave its slot away: read back with the same bits, or refused by its file's name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, strong
from tiny_run import ADAPTER, TRAIN

from para_jax import init_adapter, stack_adapters
from para_jax.training.last_state import read_last_state, write_last_state
from para_jax.training.step import init_state, put_state, tenant_of


def state_of(seeds):
    config = backbone("llama").config
    adapters = [strong(init_adapter(ADAPTER, config, seed=seed), seed) for seed in seeds]
    return init_state(stack_adapters(adapters).adapters, TRAIN)


@pytest.fixture
def ended():
    """The state of a tenant that has done seven steps."""
    state = state_of([1, 2])
    moments = jax.tree.map(lambda leaf: leaf + 1, state.optimizer)
    return tenant_of(state._replace(optimizer=moments, step=state.step + 7), jnp.int32(1))


def test_a_tenant_goes_on_in_another_slot_with_the_bits_of_its_last_state(ended, tmp_path):
    write_last_state(tmp_path, 7, ended)
    read = read_last_state(tmp_path, 7, jax.eval_shape(lambda: ended))
    others = state_of([3, 4])
    before = jax.device_get(tenant_of(others, jnp.int32(1)))
    state = put_state(others, jnp.int32(0), read)
    for slot, expected in ((0, ended), (1, before)):
        found = tenant_of(state, jnp.int32(slot))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype


@pytest.mark.parametrize("damage", ["missing", "cut", "of other shapes"])
def test_a_missing_or_damaged_state_is_named(damage, ended, tmp_path):
    write_last_state(tmp_path, 7, ended)
    (file,) = tmp_path.iterdir()
    if damage == "missing":
        file.unlink()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    like = jax.eval_shape(lambda: ended)
    if damage == "of other shapes":
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 2), leaf.dtype), like)
    with pytest.raises(ValueError, match=f"{file}: .*output_dir") as error:
        read_last_state(tmp_path, 7, like)
    assert "\n" not in str(error.value)
