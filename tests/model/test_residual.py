"""The whole pass with scopes: what each scope means, next to a definition by decode steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts
from long_cases import long, quick
from scoped import CONFIGS, PROMPT, adapter_of, name_of

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    decode,
    forward,
    hidden_states,
    init_adapter,
    multi_tenant_forward,
    prefill,
    stack_adapters,
)
from para_jax.adapters.rows import Adjustments, Rows
from para_jax.adapters.scope import reach_of_config
from para_jax.model.adapted import DecodeState, adjustments_for

FAMILIES = ["llama", "gemma3_text"]


def by_definition(model, adapter, tokens, prompt_length):
    """One row's logits from p - w on, [T - p + w, vocab]: the plain backbone's cache before the window, then a decode
    step for each token. A layer's adjustment comes from what enters it at the last prompt token, once the layers below
    have theirs."""
    config = adapter.config
    begin = max(prompt_length - config.scope_window, 0)
    length, reach = len(tokens), reach_of_config(config, 1)
    adjustments = made_of(adapter, jnp.zeros((model.config.num_layers, model.config.width)))
    adjustments = jax.tree.map(jnp.zeros_like, adjustments)
    for i in range(model.config.num_layers):
        so_far = Adjustments(tuple(adjustments), reach)
        entered = hidden_states(model, so_far, tokens[None], prompt_length, all_layers=True)[:-1, 0]
        adjustments[i] = made_of(adapter, entered[:, prompt_length - 1])[i]
    if begin:
        _, plain = prefill(model, None, tokens[None, :begin], begin, max_length=length)
        cache = plain.cache
    else:
        _, plain = prefill(model, None, tokens[None, :1], 1, max_length=length)
        cache = jax.tree.map(jnp.zeros_like, plain.cache)
    state, found = DecodeState(cache, tuple(adjustments), jnp.array([begin], jnp.int32)), []
    for token in tokens[begin:]:
        logits, state = decode(model, state, np.array([token]))
        found.append(logits[0])
    return np.stack(found)


def made_of(adapter, summaries):
    """Each layer's adjustment of one row, from its summary [width]."""
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], adapter) for i in range(len(summaries))]
    made = [layer.condition(summary) for layer, summary in zip(layers, summaries, strict=True)]
    return [jax.tree.map(lambda a: a[None], one) for one in made]


@pytest.mark.parametrize("family", quick(FAMILIES, "llama"))
@pytest.mark.parametrize("config", quick(CONFIGS, CONFIGS[0]), ids=name_of)
def test_forward_is_the_definition(family, config):
    model, adapter = backbone(family), adapter_of(config, family)
    tokens = prompts(model)
    logits, plain = np.asarray(forward(model, adapter, tokens, PROMPT)), np.asarray(forward(model, None, tokens, 1))
    for row, length in enumerate(PROMPT):
        begin = max(length - config.scope_window, 0)
        np.testing.assert_allclose(logits[row, :begin], plain[row, :begin], atol=2e-4)
        expected = by_definition(model, adapter, tokens[row], int(length))
        np.testing.assert_allclose(logits[row, begin:], expected, atol=2e-4)
        assert np.abs(logits[row, begin:] - plain[row, begin:]).max() > 0.05


@pytest.mark.long
def test_mixed_scopes_equal_each_alone():
    model, tokens = backbone("llama"), np.repeat(prompts(backbone("llama"))[:1], 7, axis=0)
    configs = [
        ParaConfig(r=4), ParaConfig(r=4, scope="response"), Ia3Config(scope="response", scope_window=4),
        ParaConfig(r=4, scope="prompt"), LoraConfig(r=4, scope="response", scope_window=2),
        LoraConfig(r=4),
    ]  # fmt: skip
    adapters = [adapter_of(config, "llama", seed) for seed, config in enumerate(configs)]
    stacks = tuple(stack_adapters([adapter]) for adapter in adapters)
    index = np.full((6, 7), -1, np.int32)
    index[np.arange(6), np.arange(6)] = 0

    rows, lengths = Rows(stacks, jnp.asarray(index)), np.array([7] * 7)
    mixed = forward(model, rows, tokens, lengths)
    last, state = prefill(model, rows, tokens, lengths, max_length=12)
    after, _ = decode(model, state, tokens[:, 7])
    made = forward(model, adjustments_for(model, rows, tokens, lengths), tokens, lengths)
    np.testing.assert_allclose(mixed, multi_tenant_forward(model, rows, tokens, lengths), atol=2e-4)
    for row, adapter in enumerate([*adapters, None]):
        alone = forward(model, adapter, tokens[row : row + 1], 7)[0]
        np.testing.assert_allclose(mixed[row], alone, atol=2e-4)
        np.testing.assert_allclose(made[row], alone, atol=2e-4)
        np.testing.assert_allclose(last[row], alone[6], atol=2e-4)
        np.testing.assert_allclose(after[row], alone[7], atol=2e-4)


def test_adjustments_of_groups_are_those_of_their_rows():
    model, tokens = backbone("llama"), prompts(backbone("llama"), 4)
    stack = stack_adapters([adapter_of(LoraConfig(r=4), "llama", seed) for seed in (0, 1)])
    made = [
        adjustments_for(model, rows, tokens, 7)
        for rows in (Rows((stack,), jnp.array([[1, 0]]), rows_each=2), Rows((stack,), jnp.array([[1, 1, 0, 0]])))
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.parametrize("config", [*CONFIGS, ParaConfig(scope="prompt"), LoraConfig(scope="prompt")], ids=str)
def test_a_fresh_adapter_is_the_backbone(config):
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    fresh = init_adapter(config, model.config)
    np.testing.assert_allclose(forward(model, fresh, tokens, PROMPT), forward(model, None, tokens, 1), atol=1e-5)
    last, _ = prefill(model, fresh, tokens, PROMPT, max_length=16)
    plain, _ = prefill(model, None, tokens, PROMPT, max_length=16)
    np.testing.assert_allclose(last, plain, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [ParaConfig(r=4, scope="prompt"), long(Ia3Config(scope="prompt")), LoraConfig(r=4, scope="prompt")],
    ids=str,
)
def test_scope_prompt_adapts_the_prompt_alone_and_decoding_carries_nothing(config):
    model, adapter = backbone("llama"), adapter_of(config, "llama")
    tokens = prompts(model)
    expected = np.asarray(forward(model, adapter, tokens, PROMPT))
    last, state = prefill(model, adapter, tokens, PROMPT, max_length=16)
    assert state.adjustments == ()
    np.testing.assert_allclose(last, expected[np.arange(3), PROMPT - 1], atol=2e-4)
    after, _ = decode(model, state, tokens[np.arange(3), PROMPT])
    np.testing.assert_allclose(after, expected[np.arange(3), PROMPT], atol=2e-4)
    everywhere = adapter_of(replace(config, scope="all"), "llama")
    np.testing.assert_allclose(last, prefill(model, everywhere, tokens, PROMPT, max_length=16)[0], atol=1e-5)
    assert np.abs(expected[0, 7] - forward(model, everywhere, tokens, PROMPT)[0, 7]).max() > 0.01
