"""Every mesh whose sizes multiply to a slice's chips is possible on every kind of TPU, and the TPU's compiler takes the
training step and the decode step on the shapes that fit a slice worst."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from long_cases import quick
from tiny_run import run_config, run_folder
from tpu_compiler import tpu_devices

from para_jax import decode, init_adapter, make_mesh, pick, prefill, stack_adapters
from para_jax.backbone.load import abstract_backbone, load_model_config
from para_jax.estimate.topology import compile_step

SLICES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4")
#: A shape for each kind, as far as there is one, for which a mesh axis must take a part of an axis of the slice.
AWKWARD = {"v4:2x2x4": (2, 2, 4), "v5e:4x4": (1, 8, 2), "v5p:2x2x4": (2, 2, 4), "v6e:4x4": (2, 8, 1)}


def shapes(chips: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) of powers of two with this product."""
    powers = [2**i for i in range(chips.bit_length())]
    return [sizes for sizes in product(powers, repeat=3) if np.prod(sizes) == chips]


@pytest.mark.parametrize("topology", SLICES)
def test_every_shape_of_a_slice_is_a_mesh_of_all_its_chips(topology):
    devices = tpu_devices(topology)
    assert len(devices) == 16 and len(shapes(16)) == 15
    for sizes in shapes(16):
        mesh = make_mesh(*sizes, devices=devices)
        assert tuple(mesh.shape.values()) == sizes and set(mesh.devices.flat) == set(devices)
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_part_of_a_slice_keeps_its_own_order():
    devices = list(tpu_devices("v6e:4x4"))
    assert list(make_mesh(3, 2, devices=devices).devices.flat) == devices[:6]


@pytest.mark.parametrize("topology", quick(SLICES, slow=("v4:2x2x4", "v5e:4x4", "v5p:2x2x4")))
def test_the_compiler_takes_training_and_decode_on_an_awkward_shape(topology, tmp_path):
    data, fsdp, tensor = AWKWARD[topology]
    own = f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "data.max_seq_length=16"
    config = run_config(run_folder(tmp_path), *own, "backbone.dtype=bfloat16", "train.per_device_batch_size=1")
    mesh = make_mesh(data, fsdp, tensor, devices=tpu_devices(topology))
    assert compile_step(config, mesh).fits
    model_config = load_model_config(config.backbone.source)
    model = abstract_backbone(model_config, "bfloat16", mesh, "layers")
    tokens = jax.ShapeDtypeStruct((16, 8), jnp.int32)

    def prefilled(model, tokens):
        rows = pick(stack_adapters([init_adapter(config.adapter, model_config)]), jnp.zeros(16, jnp.int32))
        return prefill(model, rows, tokens, 8, max_length=16)[1]

    state = jax.eval_shape(prefilled, model, tokens)
    with jax.set_mesh(mesh):
        assert jax.jit(decode).lower(model, state, jax.ShapeDtypeStruct((16,), jnp.int32)).compile()
