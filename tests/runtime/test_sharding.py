"""One table from axis names to a mesh; what the mesh does not divide is replicated. A step's numbers over meshes are
compared in training/test_step.py."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, strong
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from para_jax import (
    ParaConfig,
    forward,
    hidden_states,
    init_adapter,
    load_backbone,
    make_mesh,
    multi_tenant_forward,
    pick,
    prefill,
    stack_adapters,
    vectors,
)
from para_jax.backbone.kernels import KERNELS
from para_jax.model.adapted import adjustments_for
from para_jax.runtime.sharding import (
    constrain,
    partition,
    place,
    replicated_lines,
    shard_rows,
    tree_shardings,
)


@pytest.fixture(scope="module")
def cube():
    return make_mesh(2, 2, 2)


# ----------------------------------------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(("asked", "made"), [
    ({}, (1, 1, 1)),
    ({"data": -1}, (8, 1, 1)),
    ({"data": -1, "tensor": 4}, (2, 1, 4)),
    ({"fsdp": -1, "data": 8}, (8, 1, 1)),
    ({"data": 2, "fsdp": 3}, (2, 3, 1)),  # a part of the devices, when it is asked for
])  # fmt: skip
def test_a_mesh_has_the_requested_sizes_and_fills_the_open_one(asked, made):
    assert tuple(make_mesh(**asked).shape.values()) == made and make_mesh().axis_names == ("data", "fsdp", "tensor")


def test_the_axes_are_left_to_the_compiler():
    assert set(make_mesh(8).axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(("asked", "message"), [
    ({"data": 9}, "mesh {'data': 9, 'fsdp': 1, 'tensor': 1} does not fit 8 devices"),
    ({"data": -1, "fsdp": 3}, "mesh {'data': -1, 'fsdp': 3, 'tensor': 1} does not fit 8 devices"),
    ({"data": -1, "fsdp": -1}, "'fsdp': -1"),
    ({"data": 0}, "'data': 0"),
    ({"tensor": -2}, "'tensor': -2"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named_as_requested(asked, message):
    with pytest.raises(ValueError) as error:
        make_mesh(**asked)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- table


@pytest.mark.parametrize(("names", "counts", "expected"), [
    (("width", "heads"), (64, 4), P("fsdp", "tensor")),
    (("width", "kv_heads"), (64, 1), P("fsdp", None)),  # one kv head can't be cut in two
    (("width", "hidden"), (63, 128), P(None, "tensor")),
    (("vocab", "width"), (256, 64), P("tensor", "fsdp")),
    (("batch", None, None), (8, 5, 64), P(("data", "fsdp"), None, None)),
    (("batch", None), (6, 5), P(None, None)),
    ((None, "rank", "unheard of"), (3, 4, 8), P(None, None, None)),
])  # fmt: skip
def test_names_become_mesh_axes_where_the_mesh_divides_the_count(names, counts, expected, cube):
    assert partition(names, counts, cube.shape) == expected


def test_tensor_parallelism_splits_heads_and_not_their_width():
    mesh = make_mesh(tensor=4)
    attention = tree_shardings(backbone("llama"), mesh, backbone("llama").config).layers[0].attention
    spec = lambda linear: linear.kernel.get_value().spec  # noqa: E731
    assert spec(attention.q_proj) == P("fsdp", "tensor")  # 4 heads of 16
    assert spec(attention.k_proj) == P("fsdp", None)  # 2 heads of 16: 4 would divide 32, and cut heads


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_a_loaded_backbone_is_sharded_and_unchanged(layout, cube):
    placed = load_backbone(FIXTURES / "llama", mesh=cube, layout=layout)
    alone = backbone("llama") if layout == "layers" else load_backbone(FIXTURES / "llama", layout=layout)
    for mine, other in zip(jax.tree.leaves(placed), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert len(mine.sharding.device_set) == 8
    up = (placed.layers[0] if layout == "layers" else placed.layers[0][0]).feedforward.up_proj.kernel.get_value()
    assert up.addressable_shards[0].data.shape[-2:] == (32, 64)  # of 64 x 128


def test_another_layout_has_the_same_shards(cube):
    model = load_backbone(FIXTURES / "llama", mesh=cube)
    for layout in ("stacked", "layers"):
        model = model.with_layout(layout)
        expected = jax.tree.leaves(tree_shardings(model, cube, model.config))
        for leaf, sharding in zip(jax.tree.leaves(model), expected, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_leading_axes_of_layers_and_tenants_are_replicated(cube):
    config = backbone("llama").config
    one = strong(init_adapter(ParaConfig(r=4, up_bias=True), config))
    for tree, leading in ((one, 1), (stack_adapters([one, one]).adapters, 2)):
        placed = place(tree, cube, config)
        assert placed.down.get_value().sharding.spec == P(*[None] * leading, "fsdp", None)
        assert placed.up["v_proj"].get_value().sharding.spec == P(*[None] * leading, None, "tensor")
        assert placed.up_bias["v_proj"].get_value().sharding.spec == P(*[None] * leading, "tensor")
        for mine, other in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(("sizes", "said"), [
    ((1, 2, 2), None),
    ((1, 3, 1), r"^mesh.fsdp=3 does not divide width 64"),
    ((1, 6, 1), r"^mesh.fsdp=6 does not divide width 64"),
    ((1, 1, 3), r"^mesh.tensor=3 does not divide heads 4, hidden 128, kv_heads 2, vocab 256"),
    ((1, 1, 4), r"^mesh.tensor=4 does not divide kv_heads 2"),
])  # fmt: skip
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_that_the_mesh_does_not_split_are_named(sizes, said, quantize):
    mesh = make_mesh(*sizes)
    model = load_backbone(FIXTURES / "llama", mesh=mesh, layout="stacked", quantize=quantize)
    lines = replicated_lines(model, mesh, model.config)
    assert len(lines) == (said is not None)
    assert said is None or re.match(said, lines[0])


def named(variable):
    """Each name of a parameter's axes with the mesh axis that it lies over."""
    array = variable.get_value()
    spec = [*array.sharding.spec, *[None] * array.ndim][: array.ndim]
    return list(zip(variable.axes, spec[-len(variable.axes) :], strict=True))


def test_whole_sequences_are_traced_for_the_mesh_of_their_model(cube, monkeypatch):
    """`over_mesh` cuts a kernel into one per device where it knows the mesh. A TPU's compiler refuses any other."""
    seen, plain = [], KERNELS["plain"]
    monkeypatch.setitem(KERNELS, "plain", lambda *given: seen.append(jax.sharding.get_abstract_mesh()) or plain(*given))
    model = load_backbone(FIXTURES / "llama", mesh=cube)
    adapter = init_adapter(ParaConfig(r=4), model.config)

    def reference(model, adapter, *given):
        return multi_tenant_forward(model, pick(stack_adapters([adapter]), [0]), *given)

    functions = forward, hidden_states, vectors, adjustments_for, partial(prefill, max_length=20), reference
    for i, function in enumerate(functions):
        tokens = [[5] * (9 + i)]  # lengths of their own, because JAX keeps what it has traced
        jax.make_jaxpr(lambda adapter, of=function, tokens=tokens: of(model, adapter, tokens, 3))(adapter)
        assert seen and all(mesh.shape == cube.shape for mesh in seen)
        seen.clear()


# ---------------------------------------------------------------------------------------------------------- activations


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, ("batch", None)) is x


def test_constrain_shards_over_the_current_mesh(cube):
    with jax.set_mesh(cube):
        x = jax.jit(lambda x: constrain(x, ("batch", None, "hidden")))(jnp.ones((8, 3, 4)))
    assert x.addressable_shards[0].data.shape == (2, 3, 2)


@pytest.mark.parametrize("names", [("data", "model"), ("data", "fsdp", "tensor")])
def test_a_mesh_that_another_program_made_is_named(names):
    """jax.make_mesh makes explicit axes by default."""
    mesh = jax.make_mesh((1,) * len(names), names, axis_types=(AxisType.Explicit,) * len(names))
    with pytest.raises(ValueError, match="'data': 1.*use para_jax.make_mesh"):
        load_backbone(FIXTURES / "llama", mesh=mesh)


def test_rows_of_each_pass_are_sharded_over_data_and_fsdp(cube):
    array = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    with jax.set_mesh(cube):
        spread = shard_rows(array)
    np.testing.assert_array_equal(spread, array)
    assert spread.sharding.spec == P(None, ("data", "fsdp")) and spread.addressable_shards[0].data.shape == (2, 2, 3)


def test_rows_that_the_mesh_does_not_divide_are_an_error_of_one_line(cube):
    with (
        jax.set_mesh(cube),
        pytest.raises(ValueError, match="6 rows .* 4 devices") as error,
    ):
        shard_rows(np.zeros((1, 6, 3)))
    assert "\n" not in str(error.value)
