"""Scope `response`: the plain prompt, then its last tokens and what follows with the adapter."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts
from long_cases import quick
from scoped import CONFIGS, PROMPT, adapter_of, name_of

from para_jax import Ia3Config, LoraConfig, decode, forward, prefill
from para_jax.adapters.segments import Segments
from para_jax.backbone import kernel_choice
from para_jax.backbone.cache import attend_both
from para_jax.backbone.kernel_choice import AttentionChoice, attention_kernel
from para_jax.model import tail
from para_jax.model.tail import Tokens


@pytest.mark.parametrize("layout", quick(["layers", "stacked"], "layers"))
@pytest.mark.parametrize("config", quick(CONFIGS, CONFIGS[1]), ids=name_of)
def test_prefill_and_decode_equal_the_whole_pass(config, layout):
    model, adapter = backbone("gemma3_text", layout), adapter_of(config, "gemma3_text")
    tokens = prompts(model)
    expected = np.asarray(forward(model, adapter, tokens, PROMPT))
    logits, state = prefill(model, adapter, tokens, PROMPT, max_length=tokens.shape[1])
    for step in range(3):
        at = PROMPT + step
        within = at < tokens.shape[1] + 1
        np.testing.assert_allclose(logits[within], expected[np.arange(3), at - 1][within], atol=2e-4)
        logits, state = decode(model, state, tokens[np.arange(3), np.minimum(at, tokens.shape[1] - 1)])
    continued, _ = prefill(model, adapter, tokens, PROMPT, PROMPT + 2, max_length=tokens.shape[1])
    np.testing.assert_allclose(continued, expected[np.arange(3), PROMPT + 1], atol=2e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_the_cache_before_the_window_is_the_backbones_bit_for_bit(config):
    model, adapter = backbone("llama"), adapter_of(config, "llama")
    tokens = prompts(model)
    _, state = prefill(model, adapter, tokens, PROMPT, max_length=16)
    _, plain = prefill(model, None, tokens, PROMPT, max_length=16)
    for row, length in enumerate(PROMPT):
        before = max(length - config.scope_window, 0)
        for ours, theirs in zip(jax.tree.leaves(state.cache), jax.tree.leaves(plain.cache), strict=True):
            np.testing.assert_array_equal(ours[row, :, :before], theirs[row, :, :before])
    last = state.cache[-1][1]
    assert np.abs(last[0, :, 6] - plain.cache[-1][1][0, :, 6]).max() > 0.01


@pytest.mark.long
@pytest.mark.parametrize("make", [LoraConfig, Ia3Config])
def test_a_window_of_the_whole_prompt_with_constant_adjustments_equals_scope_all(make):
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    found = []
    for scope in ({}, dict(scope="response", scope_window=10)):
        adapter = adapter_of(make(**scope), "llama")
        last, state = prefill(model, adapter, tokens, PROMPT, max_length=16)
        found.append((forward(model, adapter, tokens, PROMPT), last, decode(model, state, tokens[:, 0])[0]))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("length", [8, 9])
def test_packed_tails_may_have_any_length_where_whole_rows_attend_by_cudnn(length, monkeypatch):
    """cuDNN takes packed rows of even length alone, and tails never attend by it."""
    monkeypatch.setattr(tail, "platform", lambda: "gpu")
    monkeypatch.setattr(kernel_choice, "own_capability", lambda: (9, 0))
    model = SimpleNamespace(config=backbone("llama").config, dtype=jnp.bfloat16, attention=AttentionChoice("cudnn"))
    assert attention_kernel(model.config, 8, model.dtype, "gpu", model.attention, packed=True)[0] == "cudnn"
    prompts, tails = (
        Tokens(*(jnp.zeros((1, n), int) for _ in range(2)), Segments(jnp.zeros((1, n), int), jnp.zeros((1, 1), int)))
        for n in (16, length)
    )
    attend = tail.tail_attention(model, prompts, tails, jnp.ones((1, 1), int), None)
    assert attend.func is attend_both and attend.keywords["mask"].shape == (1, length, 16 + length)
