"""Prompts that are computed once: the same loss and gradients as where the step computes them, and each prompt once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, strong
from long_cases import long, slow
from one_adapter import examples_of, value_and_gradient

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, make_mesh
from para_jax.data.batches import Bucket, Plan, collate, example_lengths
from para_jax.data.examples import Example
from para_jax.data.packing import RowShape, collate_packed
from para_jax.data.schedule import TenantOrder
from para_jax.model.tail import prompt_states
from para_jax.training import prompt_cache
from para_jax.training.loss import completion_nll
from para_jax.training.prompt_cache import cached_prompts, distinct_prompts

#: (prompt, completion) tokens: shorter and longer than the windows, and two different prompts of one length
SIZES = [(9, 4), (3, 1), (12, 2), (1, 3), (5, 6), (3, 2), (8, 1)]
EXAMPLES = examples_of(SIZES)
ROWS = [[0, 1, 3], [4, 6], [2, 5]]
BUCKET, ROW_SHAPE = Bucket(24, 6, 16), RowShape(24, 9, 4, 16)
CASES = [
    long("llama", ParaConfig(r=4, scope="response")),
    long("llama", LoraConfig(r=4, scope="response", scope_window=3)),
    slow("llama", ParaConfig(r=4, scope="response", pooler="constant")),
    slow("llama", Ia3Config(scope="response")),
]


def batches():
    """A padded and a packed batch of all examples, in one pass, with their shapes."""
    padded = collate(EXAMPLES, BUCKET, 8)
    packed = collate_packed([[EXAMPLES[i] for i in row] for row in ROWS], ROW_SHAPE, 4)
    return [(jax.tree.map(lambda a: a[None], batch), shape) for batch, shape in ((padded, BUCKET), (packed, ROW_SHAPE))]


def order_of(made, steps=100, seed=0, rows=2) -> TenantOrder:
    return TenantOrder(made, Plan(example_lengths(made), buckets=(BUCKET,), rows=rows, seed=seed), steps)


def cached(model=None, held=None, made=None):
    """The cache of all examples' prompts, which are computed four at a time."""
    given = model or backbone("llama", "stacked"), [order_of(made or EXAMPLES)], (BUCKET, ROW_SHAPE)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        return cached_prompts(*given, step_rows=8, rows=4, held={} if held is None else held)


@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_given_prompts_have_the_loss_and_gradients_of_computed_ones(family, config):
    model = backbone(family, "stacked")
    adapter, prompts = strong(init_adapter(config, model.config)), cached(model)
    for batch, shape in batches():
        part, states = (jax.tree.map(lambda a: jnp.asarray(a[0]), tree) for tree in (batch, prompts.states(batch, 16)))

        def nll(adapter, states=None, part=part, completion=shape.completion):
            return completion_nll(model, adapter, part, completion, prompt=16, states=states)[0].sum()

        ours, theirs = (
            value_and_gradient(lambda a, s=states, of=nll: of(a, s), adapter),
            value_and_gradient(nll, adapter),
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_each_distinct_prompt_that_the_steps_read_is_kept_once():
    made = EXAMPLES
    again = [Example(prompt, [5]) for prompt, _ in made[:4]]
    distinct = distinct_prompts([order_of(made), order_of(made, seed=1), order_of(again)])
    shortest_first = [list(one.prompt_ids) for one in distinct]
    assert sorted(shortest_first) == sorted(one.prompt_ids for one in made)
    assert [len(ids) for ids in shortest_first] == sorted(len(one.prompt_ids) for one in made)
    order = order_of(made, steps=2)
    read = {i for step in range(2) for i in order.plan.batch_indices(step)[1]}
    expected = sorted((made[i].prompt_ids for i in read), key=len)
    assert [one.prompt_ids for one in distinct_prompts([order])] == expected and len(read) == 4


@pytest.mark.long
def test_the_states_of_a_row_are_those_of_its_prompts_alone():
    model, prompts = backbone("llama", "stacked"), cached()
    (padded, _), (packed, _) = batches()
    padded, packed = prompts.states(padded, 16), prompts.states(packed, 16)
    for row, made in enumerate(EXAMPLES):
        size = len(made.prompt_ids)
        tokens = jnp.asarray([made.prompt_ids])
        alone = prompt_states(model, tokens)
        place, segment = next((i, one.index(row)) for i, one in enumerate(ROWS) if row in one)
        before = sum(len(EXAMPLES[i].prompt_ids) for i in ROWS[place][:segment])
        for ours, in_packed, theirs in zip(padded[:2], packed[:2], alone[:2], strict=True):
            np.testing.assert_allclose(ours[0, :, row, :, :size], theirs[:, 0], atol=1e-4)
            np.testing.assert_array_equal(ours[0, :, row, :, :size], in_packed[0, :, place, :, before : before + size])
            assert not ours[0, :, row, :, size:].any()


@pytest.mark.long
def test_the_states_of_int8_weights_in_bfloat16_are_those_that_a_step_computes():
    model = load_backbone(FIXTURES / "llama", layout="stacked", dtype="bfloat16", quantize="int8")
    adapter = strong(init_adapter(ParaConfig(r=4, scope="response"), model.config))
    prompts = cached(model)
    assert prompts.keys.dtype == "bfloat16"
    (batch, shape), _ = batches()
    part, states = (jax.tree.map(lambda a: jnp.asarray(a[0]), tree) for tree in (batch, prompts.states(batch, 16)))
    nll = jax.jit(lambda states: completion_nll(model, adapter, part, shape.completion, prompt=16, states=states)[0])
    np.testing.assert_allclose(nll(states), nll(None), rtol=1e-4)  # those of the weights before: up to 1.6e-2


def test_runs_of_one_command_share_the_cache_of_the_same_prompts_alone():
    held = {}
    first = cached(held=held)
    assert cached(held=held) is first
    fewer = cached(held=held, made=EXAMPLES[:3])
    assert fewer is not first and len(fewer.keys) < len(first.keys) and list(held.values()) == [fewer]


def test_states_that_take_too_much_are_refused_with_the_numbers_before_any_is_computed(monkeypatch, capsys):
    size = 2 * cached().keys.nbytes
    assert f"7 distinct prompts with 41 tokens take {size:,} bytes" in capsys.readouterr().err
    monkeypatch.setattr(prompt_cache, "free_memory", lambda: 1000)
    monkeypatch.setattr(prompt_cache, "full_batches", None)
    with pytest.raises(ValueError, match="memory needs .* of the 1,000 .*off"):
        cached()
