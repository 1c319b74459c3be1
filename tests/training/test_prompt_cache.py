"""Prompts that are computed once: the same loss and gradients as where the step computes them, and each prompt once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, strong

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, make_mesh, pick, stack_adapters
from para_jax.adapters.adapter import Adapter
from para_jax.adapters.para import Para
from para_jax.data.batches import Bucket, Plan, collate, example_lengths
from para_jax.data.examples import Example
from para_jax.data.packing import RowShape, collate_packed
from para_jax.data.schedule import TenantOrder
from para_jax.training import prompt_cache, prompt_file, prompt_states
from para_jax.training.loss import completion_nll
from para_jax.training.passes import Layout
from para_jax.training.prompt_cache import cached_prompts, distinct_prompts

#: (prompt, completion) tokens: shorter and longer than the windows
SIZES = [(9, 4), (3, 1), (12, 2), (1, 3), (5, 6), (2, 2), (8, 1)]
ROWS = [[0, 1, 3], [4, 6], [2, 5]]
BUCKET, ROW_SHAPE = Bucket(24, 6, 16), RowShape(24, 9, 4, 16)
POOLERS = ("last", "mean", "max", "constant")
CASES = [("llama", ParaConfig(r=4, scope="response", pooler=pooler)) for pooler in POOLERS]
CASES += [
    ("gemma3_text", ParaConfig(r=4, scope="response", scope_window=4)),
    ("llama", LoraConfig(r=4, scope="response", scope_window=3)),
    ("llama", Ia3Config(scope="response")),
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def family(request):
    return request.param


def model_of(family, held={}):  # noqa: B006
    if family not in held:
        held[family] = load_backbone(FIXTURES / family, layout="stacked")
    return held[family]


def examples():
    draw = np.random.default_rng(0)
    return [Example(*(draw.integers(3, 200, n).tolist() for n in size)) for size in SIZES]


def batches():
    """A padded and a packed batch of all examples, in one pass, with their shapes."""
    padded = collate(examples(), BUCKET, 8)
    packed = collate_packed([[examples()[i] for i in row] for row in ROWS], ROW_SHAPE, 4)
    return [(jax.tree.map(lambda a: a[None], batch), shape) for batch, shape in ((padded, BUCKET), (packed, ROW_SHAPE))]


def order_of(made, steps=100, seed=0, rows=2) -> TenantOrder:
    return TenantOrder(made, Plan(example_lengths(made), buckets=(BUCKET,), rows=rows, seed=seed), steps)


def cached(config, family="llama", where="memory", orders=None, rows=4):
    layout = Layout(1, 1, 8, 1)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        return cached_prompts(
            where, model_of(family), config, orders or [order_of(examples())], (BUCKET, ROW_SHAPE), layout, rows
        )


def value_and_gradient(of, adapter):
    value, gradient = jax.jit(jax.value_and_grad(of))(adapter)
    return float(value), gradient


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(("family", "config"), CASES, ids=lambda c: c if isinstance(c, str) else repr(c)[:60])
def test_given_prompts_have_the_loss_and_gradients_of_computed_ones(family, config):
    model = model_of(family)
    adapter, cache = strong(init_adapter(config, model.config)), cached(config, family)
    for batch, shape in batches():
        states = jax.tree.map(lambda a: jnp.asarray(a[0]), cache.states(batch, shape.prompt))
        part, static = jax.tree.map(lambda a: jnp.asarray(a[0]), batch), dict(prompt=shape.prompt)
        nll = lambda a, states=None: completion_nll(model, a, part, shape.completion, states=states, **static)[0].sum()  # noqa: E731, B023
        assert_same(value_and_gradient(lambda a: nll(a, states), adapter), value_and_gradient(nll, adapter))  # noqa: B023
