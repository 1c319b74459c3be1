"""Packed rows train as their examples alone do: the same loss and gradients, whatever stands beside them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, golden_tenants, strong
from long_cases import long, slow
from one_adapter import examples_of

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, pick, stack_adapters
from para_jax.adapters.segments import Segments
from para_jax.data.batches import Batch, Bucket, collate
from para_jax.data.packing import RowShape, collate_packed
from para_jax.training.loss import completion_nll

#: (prompt, completion) tokens; some are longer than the families' windows, rows are packed full and half empty
SIZES = [(9, 4), (3, 1), (12, 2), (1, 3), (5, 6), (2, 2), (8, 1)]
EXAMPLES = examples_of(SIZES)
ROWS = [[0, 1, 3], [4, 6], [2, 5]]
SHAPE = RowShape(24, 9, 4)
# Windows: a layer's (mistral), some layers' (gemma 2 and 3; qwen2's variant); soft caps: gemma 2
CASES = [
    ("llama", None, ParaConfig(r=4, up_bias=True)),
    long("qwen3", None, ParaConfig(r=4, pooler="mean", target_modules=("k_proj", "o_proj", "gate_proj", "down_proj"))),
    long("llama", None, LoraConfig(r=4)),
    long("llama", None, Ia3Config()),
    long("llama", None, ParaConfig(r=4, scope="prompt")),
    long("gemma3_text", None, ParaConfig(r=4)),
    slow("gemma2", None, ParaConfig(r=4)),
    slow("qwen2", "swa", ParaConfig(r=4)),
    slow("llama", None, ParaConfig(r=4, pooler="mean", summary="rms")),
    slow("mistral", None, ParaConfig(r=4)),
]


def packed(rows=ROWS, shape=SHAPE):
    made = collate_packed([[EXAMPLES[i] for i in row] for row in rows], shape, len(rows))
    return jax.tree.map(jnp.asarray, made)


def alone():
    return jax.tree.map(jnp.asarray, collate(EXAMPLES, Bucket(16, 6), len(SIZES)))


@cache
def model_of(family, variant=None):
    """In the layout of training; a variant, which shares its family's arrays, in the other."""
    return backbone(family, config=variant) if variant else load_backbone(FIXTURES / family, layout="stacked")


@cache
def of_case(family, variant, config, remat="dots"):
    """loss_and_gradient of the packed rows."""
    model = model_of(family, variant)
    return loss_and_gradient(model, strong(init_adapter(config, model.config)), packed(), remat)


def loss_and_gradient(model, adapter, batch, remat="dots"):
    """(nats, tokens) summed, and their gradient by the adapter's weights."""

    def summed(adapter, batch):
        total, count = completion_nll(model, adapter, batch, Bucket(16, 6).completion, remat=remat)
        return total.sum(), count.sum()

    (total, count), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(adapter, batch)
    return np.asarray(total), np.asarray(count), gradient


def assert_same(ours, theirs):
    """To 1e-5 of the loss a token and of the largest gradient of an array."""
    assert ours[1] == theirs[1] == sum(completion for _, completion in SIZES)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2]), strict=True):
        size = abs(np.asarray(other)).max()
        assert size > 1e-3
        np.testing.assert_allclose(mine, other, atol=1e-5 * max(1, size))


@pytest.mark.parametrize(("family", "variant", "config"), CASES, ids=lambda value: getattr(value, "pooler", value))
def test_packed_rows_have_the_loss_and_the_gradients_of_their_examples_alone(family, variant, config):
    model = model_of(family, variant)
    expected = loss_and_gradient(model, strong(init_adapter(config, model.config)), alone())
    fresh, _ = completion_nll(model, None, alone(), 6)
    assert abs(expected[0] - fresh.sum()) > 0.1  # the adapter does something
    assert_same(of_case(family, variant, config), expected)


def test_positions_begin_anew_with_every_segment():
    places = Segments(packed().segment, packed().start)
    one_after_another = [np.arange(sum(SIZES[i])) for i in ROWS[0]]
    expected = np.concatenate(one_after_another)
    np.testing.assert_array_equal(places.position[0, : len(expected)], expected)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "block"])
def test_packed_rows_do_not_depend_on_what_the_backward_pass_keeps(remat):
    case = ("gemma2", None, ParaConfig(r=4))
    assert_same(of_case(*case, remat), of_case(*case))


@pytest.mark.long
def test_neither_order_nor_padding_nor_filling_matters():
    model, adapter = model_of("llama"), golden_tenants("llama")[0]
    wider = packed([[3, 1, 0], [6, 4], [5, 2], []], RowShape(32, 16, 6))
    wider = wider._replace(tokens=jnp.where(wider.segment < 0, 99, wider.tokens))
    assert_same(loss_and_gradient(model, adapter, wider), loss_and_gradient(model, adapter, packed()))


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_factors_wait_for_the_backward_pass_a_segment_and_never_a_token(remat):
    model = model_of("llama")
    adapter = strong(init_adapter(ParaConfig(r=4, target_modules=("k_proj", "up_proj")), model.config))

    def kept(batch):
        """The shapes of what waits for the backward pass, but for the weights."""
        of = lambda adapter: completion_nll(model, adapter, batch, 6, remat=remat)[0].sum()  # noqa: E731
        leaves = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(of, a)[1], adapter))
        return sorted(leaf.shape for leaf in leaves)

    layers, (rows, tokens), hidden = model.config.num_layers, packed().tokens.shape, model.config.hidden_width
    unpacked = Batch(packed().tokens, jnp.full(rows, 3), jnp.full(rows, 9))
    ours, theirs = kept(packed()), kept(unpacked)
    assert ours.count((layers, rows, SHAPE.segments, hidden)) == (0 if remat == "block" else 1)
    assert ours.count((layers, rows, tokens, hidden)) == theirs.count((layers, rows, tokens, hidden))
    assert (theirs.count((layers, rows, tokens, hidden)) == 0) == (remat == "block")


def test_packed_rows_of_several_adapters_equal_each_adapter_alone():
    model, tenants = model_of("llama"), golden_tenants("llama")
    mixed, _ = completion_nll(model, pick(stack_adapters(tenants), jnp.array([1, 0, -1])), packed(), 6)
    alone = [completion_nll(model, adapter, packed(), 6)[0] for adapter in (tenants[1], tenants[0], None)]
    for row, theirs in enumerate(alone):
        np.testing.assert_allclose(mixed[row], theirs[row], rtol=1e-5)
        assert all(abs(theirs[row] - other[row]) > 0.05 for other in alone if other is not theirs)
