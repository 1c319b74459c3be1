"""int8 kernels: how far they lie from the float ones, that everything computes the same with them, and that only the
adapter is trained."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_models import FIXTURES, backbone, prompts, strong
from hlo import collective_bytes, continues_collective, instructions_run, parse_hlo
from jax.sharding import NamedSharding, PartitionSpec
from long_cases import slow
from one_adapter import fresh_state, trained_step
from tiny_run import ADAPTER, COMPLETION, LENGTH, ROWS, STEPS, TRAIN
from tpu_compiler import tpu_devices

from para_jax import decode, forward, init_adapter, load_backbone, make_mesh, pick, prefill, stack_adapters
from para_jax.backbone.layers import Linear
from para_jax.backbone.load import abstract_backbone, load_model_config
from para_jax.backbone.quantize import Int8Linear, quantise
from para_jax.data.batches import Batch
from para_jax.runtime.sharding import place, shard_rows
from para_jax.training.loss import completion_nll


@cache
def int8(family: str = "llama", layout: str = "layers", sizes=None):
    mesh = sizes and make_mesh(*sizes)
    return load_backbone(FIXTURES / family, layout=layout, mesh=mesh, quantize="int8")


def linears(model) -> list:
    kind = (Linear, Int8Linear)
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in leaves if isinstance(node, kind)]


@cache
def rounded(family: str = "llama", layout: str = "layers"):
    """The float backbone with the dequantised int8 kernels."""
    model = jax.tree.map(jnp.copy, backbone(family))
    for mine, other in zip(linears(model), linears(int8(family)), strict=True):
        mine.kernel[...] = other.kernel[...] * other.scale[...]
    return model.with_layout(layout)


def noisy(seed: int, family: str = "llama", layout: str = "layers"):
    """The float backbone with random noise on its kernels, uniform within half an int8 step, as large as rounding."""
    model, draw = jax.tree.map(jnp.copy, backbone(family)), np.random.default_rng(seed)
    for mine, other in zip(linears(model), linears(int8(family)), strict=True):
        mine.kernel[...] += draw.uniform(-0.5, 0.5, mine.kernel.shape).astype(np.float32) * other.scale[...]
    return model.with_layout(layout)


@cache
def tenants():
    fresh = init_adapter(replace(ADAPTER, summary="raw"), backbone("llama").config)
    return [strong(fresh, seed) for seed in (1, 2)]


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# ----------------------------------------------------------------------------------------------------------- the values


def test_a_weight_is_off_by_half_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32) * np.logspace(
        -6, 3, 32, dtype=np.float32
    )
    kernel[:, 5] = 0
    values, scale = map(np.asarray, quantise(jnp.asarray(kernel)))
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (1, 32)
    assert (np.abs(values * scale - kernel) <= 0.5001 * scale).all() and not values[:, 5].any()
    assert set(np.abs(values.astype(int)).max(axis=0).tolist()) == {127, 0}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma3_text"])
def test_the_kernels_are_int8_and_all_else_stays(family):
    model, plain = int8(family), backbone(family)
    assert len(linears(model)) == 7 * model.config.num_layers
    for mine, other in zip(linears(model), linears(plain), strict=True):
        values, scale = quantise(other.kernel[...])
        np.testing.assert_array_equal(mine.kernel[...], values)
        np.testing.assert_array_equal(mine.scale[...], scale)
        assert mine.bias is None or np.array_equal(mine.bias[...], other.bias[...])
    np.testing.assert_array_equal(model.embedding[...], plain.embedding[...])
    assert model.fingerprint == plain.fingerprint and model.dtype == plain.dtype


def test_the_kernels_take_three_tenths_of_the_memory_at_most():
    kernels = lambda model: [(linear.kernel, getattr(linear, "scale", None)) for linear in linears(model)]  # noqa: E731
    assert size(kernels(int8())) <= 0.3 * size(kernels(backbone("llama")))
    assert size(int8()) == size(backbone("llama")) - size(kernels(backbone("llama"))) + size(kernels(int8()))


# ----------------------------------------------------------------------------------------------------------- the logits


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])
def test_logits_match_the_rounded_weights(family):
    tokens = prompts(backbone(family))
    mine, exact, plain = (
        forward(model, None, tokens, 1) for model in (int8(family), rounded(family), backbone(family))
    )
    np.testing.assert_allclose(mine, exact, atol=1e-4)
    share = lambda logits: float(jnp.std(logits - plain) / jnp.std(plain))  # noqa: E731
    shares = [share(forward(noisy(seed, family), None, tokens, 1)) for seed in range(3)]
    assert 0.7 * min(shares) < share(mine) < 1.3 * max(shares), "int8 is off by its rounding and by nothing else"


def test_decode_on_int8_equals_the_teacher_forced_pass():
    model, tokens = int8(), prompts(int8(), 3, 12)
    rows = pick(stack_adapters(tenants()), np.array([0, -1, 1]))
    whole = forward(model, rows, tokens, 6)
    assert abs(whole - forward(model, None, tokens, 6))[0].max() > 0.1
    logits, state = prefill(model, rows, tokens[:, :6], 6, max_length=16)
    for position in range(6, 12):
        np.testing.assert_allclose(logits, whole[:, position - 1], atol=1e-4)
        logits, state = decode(model, state, tokens[:, position])
    np.testing.assert_allclose(logits, whole[:, -1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_both_layouts_hold_and_give_the_same(family):
    model, stacked = int8(family), int8(family, "stacked")
    tokens = prompts(model)
    np.testing.assert_allclose(forward(stacked, None, tokens, 1), forward(model, None, tokens, 1), atol=1e-4)
    back = load_backbone(FIXTURES / family, layout="stacked", quantize="int8").with_layout("layers")
    for mine, other in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.filterwarnings("ignore:a bfloat16 backbone")
def test_a_bfloat16_backbone_computes_in_bfloat16():
    model = load_backbone(FIXTURES / "llama", dtype="bfloat16", quantize="int8")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16", "int8", "float32"}
    for mine, other in zip(linears(model), linears(int8()), strict=True):
        np.testing.assert_array_equal(mine.kernel[...], other.kernel[...])  # rounded once, not by way of bfloat16
        assert mine(jnp.ones((2, mine.kernel.shape[0]), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_small_weights_keep_their_precision(dtype):
    """Their scale is less than float16's smallest normal number."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(0, 1e-5, (64, 32)).astype(np.float32), rng.normal(size=(4, 64)).astype(np.float32)
    linear = Linear(64, 32, axes=("embed", "mlp"), bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.asarray(kernel)
    made = np.asarray(Int8Linear(linear)(jnp.asarray(x, dtype)), np.float32)
    assert np.linalg.norm(made - x @ kernel) < 0.02 * np.linalg.norm(x @ kernel)


# ------------------------------------------------------------------------------------------------------------- training


def step(model, sizes=(1, 1, 1)):
    """The state after a training step of 8 rows. Its first moments are the gradients times a factor."""
    mesh = make_mesh(*sizes)
    lengths = np.array([6, 3, 8, 5, 6, 4, 9, 7], np.int32), np.array([12, 8, 10, 8, 7, 5, 12, 8], np.int32)
    batch = jax.tree.map(lambda a: np.asarray(a)[None], Batch(prompts(model, ROWS, LENGTH), *lengths))
    adapter = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tenants()[0])
    config = replace(TRAIN, per_device_batch_size=ROWS // (sizes[0] * sizes[1]))
    with jax.set_mesh(mesh):
        state = fresh_state(place(adapter, mesh, model.config), config)
        batch = jax.tree.map(shard_rows, batch)
        return trained_step(state, model, batch, completion=COMPLETION, config=config, total_steps=STEPS)


def gradients(stepped) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(optax.tree_utils.tree_get(stepped[0].optimizer, "mu"))]


@cache
def int8_step():
    return step(load_backbone(FIXTURES / "llama", layout="stacked", mesh=make_mesh(), quantize="int8"))


@pytest.mark.long
def test_gradients_match_the_rounded_weights():
    exact = step(place(rounded(layout="stacked"), make_mesh(), backbone("llama").config))
    plain = step(load_backbone(FIXTURES / "llama", layout="stacked", mesh=make_mesh()))
    random = step(place(noisy(0, layout="stacked"), make_mesh(), backbone("llama").config))
    off = lambda a, b: 1 - (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    for mine, rounded_one, float_one, random_one in zip(
        *map(gradients, (int8_step(), exact, plain, random)), strict=True
    ):
        np.testing.assert_allclose(mine, rounded_one, atol=1e-5)
        assert 1e-6 < off(mine, float_one) < 2 * off(random_one, float_one)
    np.testing.assert_allclose(int8_step()[1]["loss"], plain[1]["loss"], rtol=2e-2)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 2, 2), slow((8, 1, 1)), slow((1, 8, 1)), slow((1, 1, 8))])
def test_a_mesh_has_the_same_int8_weights_and_step(sizes):
    alone = load_backbone(FIXTURES / "llama", layout="stacked", quantize="int8")
    model = int8("llama", "stacked", sizes)
    for mine, other in zip(jax.tree.leaves(model), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert len(mine.sharding.device_set) == 8
    stepped = step(model, sizes)
    np.testing.assert_allclose(stepped[1]["loss"], int8_step()[1]["loss"], atol=1e-5)
    for mine, other in zip(gradients(stepped), gradients(int8_step()), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_scales_are_cut_as_the_outputs_of_their_linears():
    layer = int8("llama", "layers", (1, 4, 2)).layers[0]
    parts = lambda leaf: leaf.get_value().addressable_shards[0].data.shape  # noqa: E731
    up, down = layer.feedforward.up_proj, layer.feedforward.down_proj
    assert (parts(up.kernel), parts(up.scale)) == ((16, 64), (1, 64))
    assert (parts(down.kernel), parts(down.scale)) == ((64, 16), (1, 16))


# ----------------------------------------------------------------------------------------------------- over the network


@pytest.mark.long
def test_fsdp_gathers_int8_kernels_as_bytes():
    mesh = make_mesh(fsdp=4, devices=tpu_devices("v5e:2x2"))
    config = load_model_config(FIXTURES / "llama")
    config = replace(config, width=256, hidden_width=512, head_dim=64, kinds=config.kinds[:1] * 2)
    everywhere, over = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    adapter = jax.eval_shape(lambda: init_adapter(ADAPTER, config))
    adapter = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), adapter)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=over) for shape in ((8, 32), (8,), (8,))))

    def compiled(quantize):
        model = abstract_backbone(config, jnp.bfloat16, mesh, quantize=quantize)
        of = lambda adapter, model, batch: completion_nll(model, adapter, batch, 3, remat="block")[0].sum()  # noqa: E731
        with jax.set_mesh(mesh):
            return jax.jit(jax.grad(of)).lower(adapter, model, batch).compile().as_text()

    texts = {quantize: compiled(quantize) for quantize in (None, "int8")}
    sizes = {quantize: sum(collective_bytes(text).values()) for quantize, text in texts.items()}
    assert sizes["int8"] < 0.55 * sizes[None]
    gathered = [
        run.instruction.gives
        for run in instructions_run(parse_hlo(texts["int8"]))
        if run.instruction.opcode == "all-gather"
        and run.times == 2
        and not continues_collective(run.instruction, run.computation)
    ]  # in the loops over the layers
    assert sum(gives.startswith("s8") for gives in gathered) == 2 * 7  # forward and backward
    assert not any(gives.startswith("bf16") for gives in gathered)
