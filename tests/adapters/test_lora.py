"""LoRA: PEFT's own numbers, and the laws that hold whatever the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts, strong

from para_jax import (
    AdapterBank,
    LoraConfig,
    decode,
    forward,
    init_adapter,
    load_adapter,
    prefill,
)
from para_jax.adapters.adapter import Shared
from para_jax.config import SITES
from para_jax.data.batches import Batch
from para_jax.training.loss import completion_nll

PEFT = FIXTURES / "peft"
LAYER = "base_model.model.model.layers."


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def expected():
    with np.load(PEFT / "peft_golden.npz") as arrays:
        return dict(arrays)


def golden_adapter(name):
    return load_adapter(PEFT / name, backbone("llama").config)


def mean_loss(adapter, model, expected):
    batch = Batch(*(jnp.asarray(expected[name]) for name in ("input_ids", "prompt_lengths", "lengths")))
    nll, count = completion_nll(model, adapter, batch, int((expected["lengths"] - expected["prompt_lengths"]).max()))
    return nll.sum() / count.sum()


def strong_lora(model, seed=1, sites=("q_proj", "v_proj", "down_proj"), **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sites, **options)
    return strong(init_adapter(config, model.config, seed=seed), seed, 0.3)


def greedy(model, adapters, tokens, prompt_length, steps=12):
    logits, state = prefill(model, adapters, tokens, prompt_length, max_length=48)
    written = []
    for _ in range(steps):
        written.append(np.asarray(logits.argmax(-1)))
        logits, state = decode(model, state, written[-1])
    return np.stack(written, axis=1)


# ------------------------------------------------------------------------------------------------------- PEFT's numbers


@pytest.mark.parametrize("name", ["lora_qv", "lora_all"])
def test_lora_computes_what_peft_computes(model, expected, name):
    real, tokens = expected["attention_mask"] == 1, expected["input_ids"]
    logits = np.asarray(forward(model, golden_adapter(name), tokens, expected["prompt_lengths"]))
    np.testing.assert_allclose(logits[real], expected[f"{name}.logits"][real], atol=2e-4)
    assert abs(expected[f"{name}.logits"][0, 23] - expected["base_logits_last"][0]).max() > 0.1
    np.testing.assert_allclose(mean_loss(golden_adapter(name), model, expected), expected[f"{name}.loss"], atol=1e-5)


def test_rslora_computes_what_peft_computes(model, expected):
    adapter = golden_adapter("lora_qv_rs")
    logits, _ = prefill(
        model, adapter, expected["input_ids"], expected["prompt_lengths"], expected["lengths"], max_length=24
    )
    assert adapter.config.scale == 4.0
    np.testing.assert_allclose(logits, expected["lora_qv_rs.logits_last"], atol=2e-4)


def test_gradients_of_the_matrices_are_those_of_peft(model, expected):
    gradients = jax.grad(mean_loss)(golden_adapter("lora_qv"), model, expected)
    prefix, seen = "lora_qv.grad." + LAYER, 0
    for name in (name for name in expected if name.startswith(prefix)):
        layer, _, site, half, _ = name.removeprefix(prefix).split(".")
        matrices = gradients.a if half == "lora_A" else gradients.b
        np.testing.assert_allclose(matrices[site][int(layer)].T, expected[name], atol=5e-5, err_msg=name)
        seen += abs(expected[name]).max() > 1e-3
    assert seen == 12


@pytest.mark.long
def test_a_mixed_batch_computes_what_peft_computes(model, expected):
    bank = AdapterBank(model.config, methods=("para", "ia3", "lora"), sites=SITES, max_r=4)
    names = [None if name == "__base__" else str(name) for name in expected["mixed.adapter_names"]]
    for name in set(names) - {None}:
        bank.add(name, golden_adapter(name))
    rows, real, tokens = bank.rows(names), expected["attention_mask"] == 1, expected["input_ids"]
    logits = np.asarray(forward(model, rows, tokens, expected["prompt_lengths"]))
    np.testing.assert_allclose(logits[real], expected["mixed.logits"][real], atol=2e-4)
    written = greedy(model, rows, tokens, expected["prompt_lengths"])
    np.testing.assert_array_equal(written, expected["mixed.greedy_tokens"])


# ----------------------------------------------------------------------------------------------------------------- laws


def test_a_fresh_lora_is_the_backbone(model):
    tokens = prompts(model)
    fresh = init_adapter(LoraConfig(target_modules=SITES), model.config)
    assert abs(fresh.a["q_proj"][...]).max() > 0.1
    np.testing.assert_array_equal(forward(model, fresh, tokens, 7), forward(model, None, tokens, 7))


def test_decoding_with_one_lora_for_all_rows_equals_the_teacher_forced_pass(model):
    tokens, adapter = prompts(model), strong_lora(model)
    logits, state = prefill(model, adapter, tokens[:, :8], 8, max_length=16)
    assert all(isinstance(adjustment, Shared) for adjustment in state.adjustments)
    whole = forward(model, adapter, tokens, 8)
    assert abs(whole - forward(model, None, tokens, 8)).max() > 0.1
    for t in range(8, 12):
        np.testing.assert_allclose(logits, whole[:, t - 1], atol=2e-4)
        logits, state = decode(model, state, tokens[:, t])


def test_the_normal_form_computes_the_same_at_scale_one(model):
    tokens, adapter = prompts(model), strong_lora(model, use_rslora=True)
    normal = adapter.normal(model.config)
    assert normal.config.scale == 1 and adapter.config.scale == 4
    np.testing.assert_allclose(forward(model, normal, tokens, 7), forward(model, adapter, tokens, 7), atol=2e-5)
