"""Factors are made, and their gradients summed over the tokens, in float32, whatever the backbone computes in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts, strong
from long_cases import quick
from tpu_compiler import tpu_devices

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, make_mesh, pick, stack_adapters
from para_jax.adapters.adapter import Factors, named_leaves, scaled, token_at
from para_jax.adapters.rows import Rows, by_layer
from para_jax.adapters.segments import adjust_segments
from para_jax.config import load_config
from para_jax.data.batches import Batch
from para_jax.estimate.topology import step_arguments
from para_jax.model.adapted import decode, forward, prefill
from para_jax.training.loss import completion_nll
from para_jax.training.step import train_step

pytestmark = pytest.mark.filterwarnings("ignore:a bfloat16 backbone")
WIDTH = 64  # of the golden llama
RANK = 5  # no axis of it is so long


def equations(jaxpr):
    """The equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(function, *arguments):
    return [e for e in equations(jax.make_jaxpr(function)(*arguments).jaxpr) if e.primitive.name == "dot_general"]


# --------------------------------------------------------------------------------------------------- how they are made


def makers(config: ParaConfig) -> dict:
    """Every way in which a batch's factors are made: adapters, and the further arguments."""
    model = backbone("llama").config
    one = strong(init_adapter(config, model))
    stack = stack_adapters([one, one])
    lengths = jnp.array([3, 5])
    packed = jnp.array([[2, 3], [1, 4]]), jnp.array([[0, 2], [0, 1]])
    return {
        "one adapter": (one, lengths),
        "packed rows": (one, *packed),
        "rows": (pick(stack, [1, -1]), lengths),
        "groups": (Rows((stack,), jnp.array([[1]]), rows_each=2, distinct=True), lengths),
        "packed groups": (Rows((stack,), jnp.array([[1]]), rows_each=2), *packed),
    }


@pytest.mark.parametrize("way", ["one adapter", "packed rows", "rows", "groups", "packed groups"])
@pytest.mark.parametrize("summary", ["raw", "rms"])
def test_every_product_that_makes_factors_is_exact_float32(way, summary):
    adapters, *rest = makers(ParaConfig(r=RANK, summary=summary))[way]
    weights, make = by_layer(adapters)
    layer = jax.tree.map(lambda a: a[0], weights)
    found = products(lambda x: make(layer, x, *rest), jnp.ones((2, 8, WIDTH), jnp.bfloat16))
    assert len(found) == 4  # down, and up for q, v and up
    for product in found:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        assert {operand.aval.dtype for operand in (*product.invars, *product.outvars)} == {jnp.dtype("float32")}


# --------------------------------------------------------------------------------------------- how gradients are summed


def rounded(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_factors_is_the_sum_of_exact_products(packed):
    """4096 tokens: rounded to bfloat16 it would be off by 0.2 %, and summed in it by far more."""
    rows, length, out = 2, 4096, 4
    y, gradient = rounded((rows, length, out), 1), rounded((rows, length, out), 2)
    distance = jnp.asarray(np.random.default_rng(3).normal(size=(rows, out)), jnp.float32)
    exact = np.einsum("bto,bto->bo", *(np.asarray(a, np.float64) for a in (y, gradient)))

    def adjusted(distance):
        if packed:
            segment = jnp.zeros((rows, length), jnp.int32)
            return adjust_segments(Factors({"q_proj": distance[:, None]}), segment)("q_proj", y, y)
        return jax.vmap(scaled)(y, distance)

    (found,) = jax.vjp(adjusted, distance)[1](gradient)
    assert found.dtype == jnp.float32
    rounding = 2e-3 * np.sqrt(length) if packed else 1e-4  # packed rows round each product once, and no sum
    np.testing.assert_allclose(found, exact, atol=rounding, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_in_float32_the_gradients_are_those_that_jax_derives(packed):
    draw = np.random.default_rng(0)
    y, gradient = (jnp.asarray(draw.normal(size=(2, 6, 4)), jnp.float32) for _ in range(2))
    distance = jnp.asarray(draw.normal(size=(2, 3, 4)), jnp.float32)
    segment = jnp.array([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])

    def ours(y, distance):
        if packed:
            return adjust_segments(Factors({"q_proj": distance}), segment)("q_proj", y, y)
        return jax.vmap(scaled)(y, distance[:, 0])

    def plain(y, distance):
        each = jnp.take_along_axis(distance, jnp.maximum(segment, 0)[..., None], axis=1)
        each = jnp.where(segment[..., None] >= 0, each, 0) if packed else distance[:, :1]
        return y + y * each

    for mine, derived in zip(*(jax.vjp(f, y, distance)[1](gradient) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(mine, derived, atol=1e-5)


@pytest.mark.parametrize("config", [ParaConfig(r=RANK), Ia3Config()])
def test_no_gradient_of_a_bfloat16_step_is_summed_over_tokens_in_bfloat16(config):
    model = load_backbone(FIXTURES / "llama", layout="stacked", dtype="bfloat16")
    adapter = strong(init_adapter(config, model.config))
    batch = Batch(jnp.asarray(prompts(model, 2, 8)), jnp.array([3, 5]), jnp.array([8, 7]))
    loss = lambda adapter: completion_nll(model, adapter, batch, 5)[0].sum()  # noqa: E731
    sums = [e for e in equations(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr) if e.primitive.name == "reduce_sum"]
    assert len(sums) > 5 and all(e.outvars[0].aval.dtype != jnp.bfloat16 for e in sums)


@pytest.mark.parametrize("config", quick([ParaConfig(r=RANK), Ia3Config(), LoraConfig()], ParaConfig(r=RANK)))
def test_in_bfloat16_decode_rounds_where_the_teacher_forced_pass_does(config):
    """What it carries is bfloat16; a pass whose factors stayed float32 would be another one."""
    model = load_backbone(FIXTURES / "llama", layout="layers", dtype="bfloat16")
    adapter = strong(init_adapter(config, model.config), scale=0.5)
    tokens = prompts(model, 2, 8)
    expected = forward(model, adapter, tokens, 5)[:, 5:]
    _, state = prefill(model, adapter, tokens[:, :5], 5, max_length=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.adjustments)} == {jnp.dtype("bfloat16")}
    for i in range(3):
        logits, state = decode(model, state, tokens[:, 5 + i])
        np.testing.assert_allclose(logits, expected[:, i], atol=2e-2 * float(abs(expected).max()))


# --------------------------------------------------------------------------------------------------- on a TPU


@pytest.fixture(scope="module")
def tpu_text():
    """A training step in bfloat16, as the TPU's compiler made it."""
    config = load_config(None, [
        f"backbone.source={FIXTURES / 'llama'}", "backbone.dtype=bfloat16", f"adapter.r={RANK}",
        "mesh.data=1", "mesh.fsdp=4", "data.max_seq_length=16", "train.per_device_batch_size=3",
    ])  # fmt: skip
    mesh = make_mesh(**vars(config.mesh), devices=tpu_devices())
    with jax.set_mesh(mesh):
        lowered = train_step.lower(*step_arguments(config, mesh), completion=4, config=config.train)
        return lowered.compile().as_text()


@pytest.mark.long
def test_on_a_tpu_the_generators_weights_are_never_rounded(tpu_text):
    assert re.search(rf"f32\[(\d+,)*{RANK}(,\d+)*\]", tpu_text)
    assert not re.search(rf"bf16\[(\d+,)*{RANK}(,\d+)*\]", tpu_text)


@pytest.mark.long
def test_on_a_tpu_pooling_is_no_loop_over_the_rows(tpu_text):
    """The loops of the step: over the layers forwards and backwards; and the loss's own gradient of its positions,
    which lies outside of them. A scatter of the pooled rows would be one more in the layers' body."""
    loops = [line for line in tpu_text.splitlines() if re.search(r"= .* while\(", line)]
    inside = [line for line in loops if "while/body" in line]
    assert loops and not inside


def test_the_pooled_tokens_gradient_is_that_of_indexing_bit_for_bit():
    x, places = rounded((2, 4, 3), 1), jnp.array([1, 3])
    ours, plain = (jax.vjp(jax.vmap(f), x, places) for f in (token_at, lambda x, place: x[place]))
    gradient = rounded((2, 3), 2)
    found, expected = (np.asarray(f[1](gradient)[0], np.float32) for f in (ours, plain))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ours[0], plain[0])
    unclean = np.asarray(ours[1](gradient.at[1].set(jnp.nan))[0], np.float32)
    np.testing.assert_array_equal(unclean[0], expected[0])  # what is not finite stays in its row


def test_pooling_the_segments_of_a_row_makes_no_array_of_all_tokens_for_each_of_them():
    """An array for each segment, added up, is the gradient of `x` too, and took a quarter of a packed step."""
    segments, length, width = 5, 11, 7
    x, places = rounded((length, width), 1), jnp.array([0, 3, 4, 9, 10])
    pool = jax.vmap(token_at, in_axes=(None, 0))
    text = jax.jit(jax.grad(lambda x: pool(x, places).astype(jnp.float32).sum())).lower(x).as_text()
    assert f"tensor<{segments}x{length}x" in text  # zeros and ones
    assert f"tensor<{segments}x{length}x{width}x" not in text
    gradient = rounded((segments, width), 2)
    found, expected = (jax.vjp(f, x)[1](gradient)[0] for f in (lambda x: pool(x, places), lambda x: x[places]))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    "config",
    [
        ParaConfig(r=2, summary="rms", up_bias=True), ParaConfig(r=2, pooler="constant"), LoraConfig(r=2),
        Ia3Config(),
    ],
)  # fmt: skip
def test_an_adapter_is_the_same_where_jax_has_64_bits(config):
    """A notebook may have turned them on for something else."""
    model = backbone("llama").config
    expected = named_leaves(init_adapter(config, model, seed=3))
    jax.config.update("jax_enable_x64", True)
    try:
        found = named_leaves(init_adapter(config, model, seed=3))
    finally:
        jax.config.update("jax_enable_x64", False)
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype == jnp.float32
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6)
