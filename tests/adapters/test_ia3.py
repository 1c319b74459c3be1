"""(IA)^3: PEFT's own numbers, and the laws that hold whatever the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts, strong

from para_jax import (
    Ia3Config,
    forward,
    init_adapter,
    load_adapter,
    pick,
    stack_adapters,
    vectors,
)
from para_jax.adapters.ia3 import from_factors
from para_jax.config import SITES
from para_jax.data.batches import Batch
from para_jax.training.loss import completion_nll

BOTH = ("v_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


def strong_ia3(model, seed=1, sites=BOTH, inputs=("down_proj",)):
    config = Ia3Config(target_modules=sites, feedforward_modules=inputs)
    return strong(init_adapter(config, model.config), seed, 0.5)


@pytest.mark.long
def test_ia3_computes_what_peft_computes(model):
    with np.load(FIXTURES / "peft" / "peft_golden.npz") as arrays:
        expected = dict(arrays)
    adapter = load_adapter(FIXTURES / "peft" / "ia3", model.config)
    assert adapter.config == Ia3Config()
    real, tokens = expected["attention_mask"] == 1, expected["input_ids"]
    logits = np.asarray(forward(model, adapter, tokens, expected["prompt_lengths"]))
    np.testing.assert_allclose(logits[real], expected["ia3.logits"][real], atol=2e-4)
    assert abs(expected["ia3.logits"][0, 23] - expected["base_logits_last"][0]).max() > 0.1
    batch = Batch(*(jnp.asarray(expected[name]) for name in ("input_ids", "prompt_lengths", "lengths")))
    nll, count = completion_nll(model, adapter, batch, 10)
    np.testing.assert_allclose(nll.sum() / count.sum(), expected["ia3.loss"], atol=1e-5)


@pytest.mark.parametrize("inputs", [(), ("down_proj",)])
def test_a_fresh_ia3_is_the_backbone(model, inputs):
    tokens = prompts(model)
    fresh = init_adapter(Ia3Config(target_modules=SITES, feedforward_modules=inputs), model.config)
    np.testing.assert_array_equal(forward(model, fresh, tokens, 7), forward(model, None, tokens, 7))


def test_a_factor_on_an_input_is_a_factor_on_its_weights(model):
    """Computed the other way: down_proj's input and up_proj's output scaled in the backbone's own matrices."""
    tokens, adapter = prompts(model), strong_ia3(model)
    merged = jax.tree.map(lambda leaf: leaf, model)
    for i, layer in enumerate(merged.layers):
        up, down = layer.feedforward.up_proj.kernel, layer.feedforward.down_proj.kernel
        up[...] = up[...] * adapter.scale["up_proj"][i]
        down[...] = down[...] * adapter.scale["down_proj"][i][:, None]
        value = layer.attention.v_proj.kernel
        value[...] = value[...] * adapter.scale["v_proj"][i]
    by_weights = forward(merged, None, tokens, 7)
    assert abs(by_weights - forward(model, None, tokens, 7)).max() > 0.1
    np.testing.assert_allclose(forward(model, adapter, tokens, 7), by_weights, atol=2e-4)


def test_an_output_of_down_proj_is_told_from_its_input(model):
    adapter = strong_ia3(model, inputs=())
    assert adapter.scale["down_proj"].shape == (3, 64) and strong_ia3(model).scale["down_proj"].shape == (3, 128)
    assert set(vectors(model, adapter, prompts(model), 7)) == set(BOTH)
    assert set(vectors(model, strong_ia3(model), prompts(model), 7)) == {"v_proj", "up_proj"}


def test_the_normal_form_and_the_factors_themselves_compute_the_same(model):
    tokens, adapter = prompts(model), strong_ia3(model)
    made = vectors(model, adapter, tokens, 7)
    exact = from_factors({site: factors[:, 0] for site, factors in made.items()}, model.config)
    for other in (adapter.normal(model.config), exact):
        assert other.config == Ia3Config(target_modules=("v_proj", "up_proj"), feedforward_modules=())
        np.testing.assert_allclose(forward(model, other, tokens, 7), forward(model, adapter, tokens, 7), atol=2e-5)


def test_gradients_come_back_a_tenant(model):
    tokens = prompts(model)
    stack = stack_adapters([strong_ia3(model, seed) for seed in (1, 2, 3)])

    def loss(stack):
        return jnp.square(forward(model, pick(stack, jnp.array([2, -1, 0])), tokens, 7)).mean()

    gradients = jax.grad(loss)(stack).adapters.scale
    for site in BOTH:
        of_site = gradients[site][...]
        assert abs(of_site[0]).max() > 1e-5 and abs(of_site[2]).max() > 1e-5
        np.testing.assert_array_equal(of_site[1], 0)
