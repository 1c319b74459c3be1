"""The laws of backbone and adapter together, and parity with the golden numbers (tolerances:
tests/fixtures/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FAMILIES, FIXTURES, backbone, golden, golden_tenants, prompts, strong
from long_cases import quick

from para_jax import (
    ParaConfig,
    adapt,
    decode,
    forward,
    hidden_states,
    init_adapter,
    multi_tenant_forward,
    pick,
    prefill,
    right_pad,
    stack_adapters,
    vectors,
)
from para_jax.model.adapted import DecodeState, decode_step, stacked_state

PARA_FAMILIES = ("llama", "gemma", "qwen3", "phi3", "qwen2")
VARIANTS = [(file.parent.parent.name, file.stem) for file in sorted(FIXTURES.glob("*/variants/*.json"))]


def real(arrays):
    return arrays["attention_mask"] == 1


def greedy(model, adapters, tokens, prompt_length, length=None, steps=12):
    logits, state = prefill(model, adapters, tokens, prompt_length, length, max_length=48)
    written = []
    for _ in range(steps):
        written.append(np.asarray(logits.argmax(-1)))
        logits, state = decode(model, state, written[-1])
    return np.stack(written, axis=1)


def two_tenants(model, **options):
    """Two strong adapters that move the logits, and differ, by more than 0.1."""
    fresh = init_adapter(ParaConfig(r=4, **options), model.config)
    tenants = [strong(fresh, seed) for seed in (1, 2)]
    tokens = prompts(model)
    base, first, second = (forward(model, a, tokens, 7) for a in (None, *tenants))
    assert abs(first - base).max() > 0.1 and abs(second - base).max() > 0.1 and abs(first - second).max() > 0.1
    return tenants


# ------------------------------------------------------------------------------------------------------------ backbone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_computes(family):
    model, expected = backbone(family), golden(family)
    mask, tokens = real(expected), expected["input_ids"]
    streams = hidden_states(model, None, tokens, None, all_layers=True)
    np.testing.assert_allclose(np.asarray(streams)[:, mask], expected["hidden_states"][:, mask], atol=1e-3)
    final = hidden_states(model, None, tokens, None)
    np.testing.assert_allclose(np.asarray(final)[mask], expected["final_hidden"][mask], atol=1e-3)
    np.testing.assert_allclose(
        np.asarray(forward(model, None, tokens, None))[mask], expected["logits"][mask], atol=2e-4
    )


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gemma3_text", "phi3"))
def test_greedy_tokens_with_the_cache_are_those_of_transformers(family):
    expected = golden(family)
    written = greedy(backbone(family), None, expected["input_ids"], expected["lengths"])
    np.testing.assert_array_equal(written, expected["greedy_tokens"])


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_a_variant_of_a_config_computes_what_transformers_computes(family, variant):
    expected = golden(family)[f"variant.{variant}.logits_row0"]
    tokens = golden(family)["input_ids"][:1, : len(expected)]
    logits = forward(backbone(family, config=variant), None, tokens, None)
    np.testing.assert_allclose(logits[0], expected, atol=2e-4)


@pytest.mark.parametrize("family", quick(("llama", "gemma3_text", "gemma2"), slow=("llama", "gemma2")))
def test_the_stacked_layout_equals_the_layers(family):
    layers, scanned = backbone(family), backbone(family, "stacked")
    tenant = two_tenants(layers)[0]
    tokens = prompts(layers)
    np.testing.assert_allclose(forward(scanned, tenant, tokens, 7), forward(layers, tenant, tokens, 7), atol=2e-5)
    np.testing.assert_array_equal(greedy(scanned, tenant, tokens, 7, 9), greedy(layers, tenant, tokens, 7, 9))


@pytest.mark.parametrize("family", quick(["llama", "gemma3_text"], "llama"))
def test_a_stacked_state_decodes_as_the_caches_of_each_layer(family):
    """In the stacked layout, with a row that is full at the second step."""
    model = backbone(family, "stacked")
    tenants = pick(stack_adapters(two_tenants(backbone(family))), [0, 1])
    tokens = prompts(model)[:2]
    total = tokens.shape[1]
    _, state = prefill(model, tenants, tokens, 7, np.array([total, total - 3]), max_length=total + 1)
    held, of_layers = stacked_state(state), jax.tree.map(jnp.copy, state)
    step = jax.jit(decode_step)
    for token in (3, 4, 5):
        mine, held = step(model, held, jnp.full(2, token))
        theirs, of_layers = decode(model, of_layers, np.full(2, token))
        np.testing.assert_array_equal(mine, theirs)
    assert np.isnan(mine[0]).all() and np.isfinite(mine[1]).all()
    for i, cache in enumerate(of_layers.cache):
        for whole, one in zip(held.cache, cache, strict=True):
            np.testing.assert_array_equal(whole[i], one)


def test_a_step_of_a_stacked_state_copies_no_cache():
    """On a CPU it holds a copy of the one layer that it reads."""
    model = backbone("llama", "stacked")
    _, state = prefill(model, None, prompts(model), None, max_length=4096)
    state = stacked_state(state)
    step = jax.jit(decode_step, donate_argnums=1).lower(model, state, jnp.zeros(len(state.length), jnp.int32))
    cache = sum(leaf.nbytes for leaf in state.cache)
    assert step.compile().memory_analysis().temp_size_in_bytes < 1.2 * cache / model.config.num_layers + 2**20


def test_both_layouts_hold_the_same_arrays():
    from para_jax import load_backbone

    there_and_back = load_backbone(FIXTURES / "gemma3_text", layout="stacked").with_layout("layers")
    for mine, theirs in zip(jax.tree.leaves(there_and_back), jax.tree.leaves(backbone("gemma3_text")), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_left_padding_agrees_with_right_padding():
    expected = golden("llama")
    shifts = expected["input_ids"].shape[1] - expected["lengths"]
    left = [
        np.stack([np.roll(row, s) for row, s in zip(expected[name], shifts, strict=True)])
        for name in ("input_ids", "attention_mask")
    ]
    tokens, length = right_pad(*left)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(length, expected["lengths"])


# ---------------------------------------------------------------------------------------------------------------- PARA


@pytest.mark.parametrize("family", quick(PARA_FAMILIES, "gemma"))
def test_para_computes_what_the_independent_implementation_computes(family):
    model, expected = backbone(family), golden(family, "para")
    rows = pick(stack_adapters(golden_tenants(family)), expected["tenant"])
    tokens, prompt_length, mask = expected["input_ids"], expected["prompt_lengths"], real(expected)
    made = vectors(model, rows, tokens, prompt_length)
    np.testing.assert_allclose(np.concatenate([*made.values()], axis=-1), expected["vectors"], atol=3e-5)
    streams = np.asarray(hidden_states(model, rows, tokens, prompt_length, all_layers=True))
    np.testing.assert_allclose(streams[:, mask], expected["hidden_states"][:, mask], atol=1e-3)
    logits = np.asarray(forward(model, rows, tokens, prompt_length, expected["lengths"]))
    np.testing.assert_allclose(logits[mask], expected["logits"][mask], atol=2e-4)
    np.testing.assert_array_equal(greedy(model, rows, tokens, prompt_length), expected["greedy_tokens"])


@pytest.mark.parametrize("family", ("llama", "phi3"))
def test_the_tanh_gelu_is_another_function(family):
    model, expected = backbone(family), golden(family, "para")
    rows = pick(stack_adapters(golden_tenants(family, "gelu_tanh")), expected["tenant"])
    made = np.concatenate([*vectors(model, rows, expected["input_ids"], expected["prompt_lengths"]).values()], axis=-1)
    np.testing.assert_allclose(made, expected["vectors_tanh"], atol=3e-5)
    assert abs(made - expected["vectors"]).max() > 6e-5


def test_a_fresh_adapter_is_the_backbone_bit_for_bit():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    base = forward(model, None, tokens, None)
    for config in (
        ParaConfig(),
        ParaConfig(activation="silu", summary="rms"),
        ParaConfig(pooler="constant"),
        ParaConfig(up_bias=True),
    ):
        np.testing.assert_array_equal(adapt(model, config)(tokens, 5), base)


def test_a_bias_of_w_up_is_added_to_what_the_prompt_makes():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    plain, biased = (two_tenants(model, up_bias=up_bias)[0] for up_bias in (False, True))
    expected = vectors(model, plain, tokens[:, :1], 1)  # one token: the first layer's summary is its embedding
    for site, factors in vectors(model, biased, tokens[:, :1], 1).items():
        bias = biased.up_bias[site][...]
        assert bias.shape == (model.config.num_layers, model.config.site_width(site)) and abs(bias).max() > 0.1
        np.testing.assert_allclose(factors[0], expected[site][0] + bias[0], atol=1e-6)


def test_the_parameter_count_equals_the_papers():
    from para_jax.adapters.adapter import count_parameters
    from para_jax.backbone.families import model_config
    from para_jax.backbone.known_configs import KNOWN_CONFIGS

    counts = {
        "meta-llama/Llama-2-7b-hf": 8_945_664,
        "meta-llama/Llama-2-13b-hf": 14_008_320,
        "google/gemma-2b": 4_478_976,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 1_036_800,
    }
    for source, count in counts.items():
        config = model_config(KNOWN_CONFIGS[source])
        assert count_parameters(jax.eval_shape(lambda config=config: init_adapter(ParaConfig(r=12), config))) == count


def test_adapt_shares_the_arrays_of_the_backbone():
    model = backbone("llama")
    adapter = init_adapter(ParaConfig(), model.config)
    before = len(jax.live_arrays())
    adapted = adapt(model, adapter)
    assert len(jax.live_arrays()) == before
    shared = {id(leaf) for leaf in jax.tree.leaves((model, adapter))}
    assert {id(leaf) for leaf in jax.tree.leaves(adapted)} == shared


OPTIONS = (
    {},
    {"pooler": "mean", "activation": "silu"},
    {"pooler": "constant"},
    {"summary": "rms", "up_bias": True},
    {"target_modules": ("k_proj", "o_proj", "gate_proj", "down_proj"), "activation": "identity", "summary": "rms"},
)


@pytest.mark.parametrize("options", quick(OPTIONS, OPTIONS[3]), ids=str)
def test_decoding_with_the_cache_equals_the_teacher_forced_pass(options):
    model = backbone("gemma3_text" if not options else "llama")  # Gemma's window of 5 tokens is left behind on the way
    rows = pick(stack_adapters(two_tenants(model, **options)), [0, 1, -1])
    tokens, prompt_length = prompts(model), np.array([7, 4, 5])
    full = np.asarray(forward(model, rows, tokens, prompt_length))
    logits, state = prefill(model, rows, tokens[:, :7], prompt_length, max_length=16)
    for row in range(3):
        np.testing.assert_allclose(logits[row], full[row, prompt_length[row] - 1], atol=2e-5)
    for step in range(5):
        logits, state = decode(model, state, tokens[np.arange(3), prompt_length + step])
        np.testing.assert_allclose(logits, full[np.arange(3), prompt_length + step], atol=2e-5)
    np.testing.assert_array_equal(state.length, prompt_length + 5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_and_completion_do_not_change_a_prompts_factors(options):
    model = backbone("llama")
    tenant, tokens = two_tenants(model, **options)[0], prompts(model)
    whole = vectors(model, tenant, tokens, 7)
    alone = vectors(model, tenant, tokens[:, :7], 7)
    for site in whole:
        np.testing.assert_allclose(whole[site], alone[site], rtol=1e-5, atol=3e-5)


def test_a_longer_length_continues_with_the_factors_of_the_prompt():
    model = backbone("llama")
    tenant, tokens = two_tenants(model)[0], prompts(model)
    full = forward(model, tenant, tokens, 5)
    logits, state = prefill(model, tenant, tokens, 5, 9, max_length=16)
    np.testing.assert_allclose(logits, full[:, 8], atol=2e-5)
    np.testing.assert_allclose(decode(model, state, tokens[:, 9])[0], full[:, 9], atol=2e-5)


# -------------------------------------------------------------------------------------------------------- many tenants


def test_a_mixed_batch_equals_each_tenant_alone():
    model = backbone("llama")
    stack, tokens = stack_adapters(two_tenants(model)), prompts(model, 4)
    index, prompt_length = [1, 0, -1, 1], np.array([7, 5, 9, 3])
    mixed = np.asarray(forward(model, pick(stack, index), tokens, prompt_length))
    for row in range(4):
        alone = forward(model, pick(stack, index[row : row + 1]), tokens[row : row + 1], prompt_length[row])
        np.testing.assert_allclose(mixed[row], alone[0], atol=2e-5)


def test_the_batched_path_equals_vmap_over_single_examples():
    model = backbone("gemma3_text")
    rows, tokens = pick(stack_adapters(two_tenants(model)), [1, -1, 0]), prompts(model)
    prompt_length, length = np.array([7, 5, 9]), np.array([12, 8, 10])
    reference = multi_tenant_forward(model, rows, tokens, prompt_length, length)
    np.testing.assert_allclose(forward(model, rows, tokens, prompt_length, length), reference, atol=2e-5)


def test_rows_of_the_base_model_equal_the_backbone_bit_for_bit():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    stack = stack_adapters(two_tenants(model))
    mixed = forward(model, pick(stack, [-1, 0, -1]), tokens, 7)
    base = forward(model, None, tokens, None)
    np.testing.assert_array_equal(mixed[0], base[0])
    np.testing.assert_array_equal(mixed[2], base[2])
    assert abs(mixed[1] - base[1]).max() > 0.1


def test_permuting_the_rows_permutes_the_outputs_bit_for_bit():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    stack, index, prompt_length = stack_adapters(two_tenants(model)), np.array([0, -1, 1]), np.array([7, 5, 9])
    outputs, order = forward(model, pick(stack, index), tokens, prompt_length), np.array([2, 0, 1])
    permuted = forward(model, pick(stack, index[order]), tokens[order], prompt_length[order])
    np.testing.assert_array_equal(permuted, np.asarray(outputs)[order])


def test_a_tenant_with_infinite_weights_affects_no_other():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    good, bad = two_tenants(model)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), bad)
    mixed = forward(model, pick(stack_adapters([good, broken]), [0, 1, -1]), tokens, 7)
    same = forward(model, pick(stack_adapters([good, bad]), [0, 1, -1]), tokens, 7)
    assert not jnp.isfinite(mixed[1]).all()
    np.testing.assert_array_equal(mixed[jnp.array([0, 2])], same[jnp.array([0, 2])])


@pytest.mark.long
def test_gradients_are_per_tenant_and_zero_for_absent_ones():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    stack = stack_adapters(two_tenants(model) + two_tenants(model)[:1])
    gradient = jax.grad(lambda stack: forward(model, pick(stack, [2, -1, 0]), tokens, 7).var())(stack)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.shape[0] == 3 and abs(leaf[0]).max() > 0 and abs(leaf[2]).max() > 0
        np.testing.assert_array_equal(leaf[1], 0)


@pytest.mark.long
def test_a_base_row_brings_no_nan_into_gradients():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    stack = stack_adapters(two_tenants(model, summary="rms"))
    gradient = jax.grad(lambda stack: forward(model, pick(stack, [-1, -1, 1]), tokens, 7).var())(stack)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# -------------------------------------------------------------------------------------------------------------- decode


def test_a_full_row_writes_nothing_and_gives_nan():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    _, state = prefill(model, None, tokens[:, :8], np.array([8, 6, 8]), max_length=8)
    held = jax.tree.map(np.asarray, state.cache)
    logits, state = decode(model, state, tokens[:, 8])
    assert jnp.isnan(logits[jnp.array([0, 2])]).all() and jnp.isfinite(logits[1]).all()
    np.testing.assert_array_equal(state.length, [8, 7, 8])
    for before, after in zip(jax.tree.leaves(held), jax.tree.leaves(state.cache), strict=True):
        np.testing.assert_array_equal(before[[0, 2]], after[jnp.array([0, 2])])


def test_the_decode_state_holds_factors_and_no_adapter_weight():
    model = backbone("llama")
    config = model.config
    many = pick(stack_adapters(two_tenants(model) * 8), [0, 15, -1])
    _, state = prefill(model, many, prompts(model), 7, max_length=16)
    assert isinstance(state, DecodeState) and len(state.cache) == len(state.adjustments) == config.num_layers
    shapes = {site: factors.shape for site, factors in state.adjustments[0].distance.items()}
    assert shapes == {site: (3, config.site_width(site)) for site in ("q_proj", "v_proj", "up_proj")}
    assert prefill(model, None, prompts(model), 7, max_length=16)[1].adjustments == ()


def test_decode_donates_the_state_it_is_given():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    _, state = prefill(model, None, tokens, 12, max_length=16)
    decode(model, state, tokens[:, 0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


# --------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_arguments_are_named():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    tenant = init_adapter(ParaConfig(r=4), model.config)
    stack = stack_adapters([tenant, tenant])
    for call, message in (
        (lambda: forward(model, tenant, tokens, 0), "prompt_length"),
        (lambda: forward(model, tenant, tokens, None), "prompt_length is missing"),
        (lambda: decode(model, prefill(model, tenant, tokens, 5, max_length=16)[1], [256] * len(tokens)), "ids 256"),
        (lambda: forward(model, tenant, tokens, 5, 13), "prompt_length"),
        (lambda: forward(model, tenant, tokens + 256, 5), "token ids .* 0 to 255"),
        (lambda: prefill(model, tenant, tokens, 5, max_length=8), "max_length 8"),
        (lambda: pick(stack, [0, 2]), r"pick.*\[0, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_without_an_adapter_any_prompt_length_will_do():
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    expected = forward(model, None, tokens, None)
    for unused in (0, 13, [5, 5]):
        np.testing.assert_array_equal(forward(model, None, tokens, unused), expected)


def test_the_seed_of_an_adapter_may_be_traced():
    config = backbone("llama").config
    several = jax.vmap(lambda seed: init_adapter(ParaConfig(r=4), config, seed=seed).down[...])(jnp.arange(2))
    np.testing.assert_array_equal(several[1], init_adapter(ParaConfig(r=4), config, seed=1).down[...])


def test_an_adapter_of_another_backbone_is_refused():
    other = init_adapter(ParaConfig(), backbone("qwen3").config)
    with pytest.raises(ValueError, match="another backbone"):
        forward(backbone("llama"), other, prompts(backbone("llama")), 5)
