"""Scope `response` trains on tails after plain prompts: the same loss and gradients as the whole pass gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, strong
from long_cases import long, slow
from one_adapter import examples_of, value_and_gradient

from para_jax import Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, pick, stack_adapters
from para_jax.config import TrainSection
from para_jax.data.batches import Bucket, collate
from para_jax.data.packing import RowShape, collate_packed
from para_jax.model import tail
from para_jax.training.loss import completion_nll, negative_log_likelihood
from para_jax.training.step import eval_nll, state_of_one, step_of_one

#: (prompt, completion) tokens: shorter and longer than the windows
SIZES = [(9, 4), (3, 1), (12, 2), (1, 3), (5, 6), (2, 2), (8, 1)]
EXAMPLES = examples_of(SIZES)
ROWS = [[0, 1, 3], [4, 6], [2, 5]]
PROMPT, COMPLETION = 12, 6
CASES = [
    ("llama", ParaConfig(r=4, scope="response")),
    slow("gemma3_text", ParaConfig(r=4, scope="response", late_r=6)),
    slow("llama", Ia3Config(scope="response")),
    long("llama", LoraConfig(r=4, scope="response", scope_window=3)),
    slow("llama", ParaConfig(r=4, scope="response", pooler="constant")),
]


def padded():
    return jax.tree.map(jnp.asarray, collate(EXAMPLES, Bucket(16, COMPLETION), len(SIZES)))


def packed():
    shape = RowShape(24, 9, 4)
    return jax.tree.map(jnp.asarray, collate_packed([[EXAMPLES[i] for i in row] for row in ROWS], shape, len(ROWS)))


def of_whole_pass(model, adapter, batch):
    """Summed loss by `forward`, which computes every position."""
    logits = forward(model, adapter, batch.tokens, batch.prompt_length, batch.length)
    nll = negative_log_likelihood(logits[:, :-1], batch.tokens[:, 1:])
    place = jnp.arange(1, batch.tokens.shape[1])
    real = (place >= batch.prompt_length[:, None]) & (place < batch.length[:, None])
    return jnp.where(real, nll, 0).sum()


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.long
@pytest.mark.parametrize(("family", "config"), CASES, ids=str)
def test_padded_and_packed_tails_equal_the_whole_pass(family, config):
    model = backbone(family, "stacked")
    adapter = strong(init_adapter(config, model.config))
    expected = value_and_gradient(lambda a: of_whole_pass(model, a, padded()), adapter)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(expected[1]))
    nll = lambda batch, **shape: lambda a: completion_nll(model, a, batch, **shape)[0].sum()  # noqa: E731
    for remat in ("dots", "block"):
        shape = dict(completion=COMPLETION, prompt=PROMPT, remat=remat)
        assert_same(value_and_gradient(nll(padded(), **shape), adapter), expected)
    assert_same(value_and_gradient(nll(padded(), completion=COMPLETION), adapter), expected)
    assert_same(value_and_gradient(nll(packed(), completion=9, prompt=14), adapter), expected)


@pytest.mark.long
def test_the_tails_attend_by_splash_as_by_plain_attention(monkeypatch):
    model, config = backbone("llama", "stacked"), LoraConfig(r=4, scope="response", scope_window=3)
    adapter = strong(init_adapter(config, model.config))
    batches = [(padded(), dict(completion=COMPLETION, prompt=PROMPT)), (packed(), dict(completion=9, prompt=14))]
    of = [
        lambda a, given=given, shape=shape: completion_nll(model, a, given, **shape)[0].sum()
        for given, shape in batches
    ]
    expected = [value_and_gradient(nll, adapter) for nll in of]
    monkeypatch.setattr(tail, "attention_kernel", lambda *given, **also: ("splash", ""))
    monkeypatch.setattr(tail, "LANES", 1)
    for nll, theirs in zip(of, expected, strict=True):
        ours = value_and_gradient(nll, adapter)
        assert_same(ours, theirs)
        both = zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True)
        assert not all(np.array_equal(mine, other) for mine, other in both)  # it was another kernel


@pytest.mark.long
def test_a_window_beyond_every_prompt_is_a_window_of_the_whole_prompt():
    model, sizes = backbone("llama", "stacked"), []
    for window in (12, 2**20):
        adapter = strong(init_adapter(LoraConfig(r=4, scope="response", scope_window=window), model.config))
        for batch, shape in ((padded(), (COMPLETION, PROMPT)), (packed(), (9, 14))):
            total, _, _ = eval_nll(model, adapter, batch, completion=shape[0], prompt=shape[1])
            sizes.append(float(total.sum()))
    np.testing.assert_allclose(sizes, sizes[:1] * 4, rtol=1e-5)


@pytest.mark.long
def test_a_mixed_batch_of_tenants_trains_as_each_alone():
    model, config = backbone("llama", "stacked"), ParaConfig(r=4, scope="response")
    tenants = [strong(init_adapter(config, model.config, seed=seed), seed) for seed in (0, 1)]
    rows = pick(stack_adapters(tenants), np.array([0, 1, -1, 0, 1, 1, -1]))
    mixed, _, _ = eval_nll(model, rows, padded(), completion=COMPLETION, prompt=PROMPT)
    for row, adapter in enumerate([tenants[0], tenants[1], None, tenants[0], tenants[1], tenants[1], None]):
        alone, _, _ = eval_nll(model, adapter, padded(), completion=COMPLETION)
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("config", [ParaConfig(r=4, scope="response"), LoraConfig(r=4, scope="prompt")], ids=str)
def test_training_lowers_the_loss(config):
    model, train = backbone("llama", "stacked"), TrainSection(learning_rate=1e-2, warmup_ratio=0.0)
    state = state_of_one(init_adapter(config, model.config), train)
    batch, losses = jax.tree.map(lambda a: a[None], padded()), []
    for _ in range(12):
        static = dict(completion=COMPLETION, prompt=PROMPT, config=train, total_steps=1000)
        state, values = step_of_one(state, model, batch, **static)
        losses.append(float(values["loss"][0]))
    assert losses[-1] < losses[0] - 0.05
