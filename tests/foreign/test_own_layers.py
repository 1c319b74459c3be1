"""attach on Transformers made of our own layers: the hooks compute what our driver computes, also inside a scan over
layers that are one module, as MaxText has them."""

import jax
import numpy as np
import pytest
from flax import nnx
from foreign_model import LISTED, SCANNED, Foreign, by_site
from golden_models import strong

from para_jax import (
    Ia3Config,
    LayerKind,
    LoraConfig,
    ModelConfig,
    ParaConfig,
    RotaryConfig,
    Transformer,
    forward,
    init_adapter,
    pick,
    stack_adapters,
)
from para_jax.config import SITES
from para_jax.foreign import Family, Linear, adapter_of, attach, set_adapter

CONFIG = ModelConfig(
    model_type="llama", vocab_size=64, width=16, hidden_width=24, num_heads=2, num_kv_heads=1, head_dim=8,
    attention_scale=8**-0.5,
    kinds=(LayerKind(rotary=RotaryConfig(dims=8)),) * 3,
)  # fmt: skip
METHODS = {
    "para": ParaConfig(r=4, target_modules=SITES, up_bias=True),
    "response": ParaConfig(r=4, scope="response"),
    "lora": LoraConfig(r=4),
    "ia3": Ia3Config(scope="response"),
}
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 10)).astype(np.int32)
PROMPTS = np.array([4, 7, 1])


def backbone() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def own():
    return backbone()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [LISTED, SCANNED], ids=["listed", "scanned"])
def test_values_and_gradients_are_those_of_our_own_driver(own, family, method):
    model = Foreign(backbone(), family is SCANNED)
    adapter = strong(init_adapter(METHODS[method], CONFIG))
    attach(model, METHODS[method], config=CONFIG, family=family)
    set_adapter(model, adapter)

    def loss(model):
        logits = model(TOKENS, prompt_end=PROMPTS - 1)
        return (logits**2).mean(), logits

    diff = nnx.DiffState(0, nnx.LoRAParam)
    (_, logits), grads = nnx.jit(nnx.value_and_grad(loss, argnums=diff, has_aux=True))(model)
    np.testing.assert_allclose(logits, forward(own, adapter, TOKENS, PROMPTS), atol=2e-5)
    assert abs(np.asarray(logits - forward(own, None, TOKENS, None))).max() > 0.05
    wanted = jax.grad(lambda adapter: (forward(own, adapter, TOKENS, PROMPTS) ** 2).mean())(adapter)
    nnx.update(model, grads)  # as weights, so that adapter_of brings them into our form
    for found, other in zip(jax.tree.leaves(adapter_of(model)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("family", [LISTED, SCANNED], ids=["listed", "scanned"])
def test_a_stack_serves_the_tenants_of_each_call(own, family):
    stack = stack_adapters([strong(init_adapter(METHODS["para"], CONFIG), seed=i) for i in range(2)])
    model = attach(Foreign(backbone(), family is SCANNED), stack, config=CONFIG, family=family)
    rows = pick(stack, [1, -1, 0])
    found = model(TOKENS, prompt_end=PROMPTS - 1, tenants=np.array([1, -1, 0]))
    np.testing.assert_allclose(found, forward(own, rows, TOKENS, PROMPTS), atol=2e-5)
    held = adapter_of(model)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), held, stack)))
    with pytest.raises(ValueError, match="tenants"):
        model(TOKENS, prompt_end=PROMPTS - 1)
    unknown = model(TOKENS, prompt_end=np.array([3, 10, 2]), tenants=np.array([2, 0, 1]))
    assert np.isnan(unknown[:2]).all() and np.isfinite(unknown[2]).all()  # no such tenant, no such token


def test_sites_and_layers_that_the_model_lacks_are_named():
    attention = Family(by_site()[:4], layers="decoder.layers", cache=None)
    with pytest.raises(ValueError, match="up_proj.*q_proj"):
        attach(Foreign(backbone()), ParaConfig(r=4), config=CONFIG, family=attention)
    with pytest.raises(ValueError, match="layers_to_transform"):
        attach(
            Foreign(backbone(), scanned=True), ParaConfig(r=4, layers_to_transform=(1,)), config=CONFIG, family=SCANNED
        )


class ByHead(nnx.Module):
    """A query projection with the attention's scale in its weights, as MaxText has it."""

    def __init__(self, linear):
        self.inner = Inner(linear)

    def __call__(self, x):
        return self.inner(x).reshape(*x.shape[:-1], -1)


class Inner(nnx.Module):
    def __init__(self, linear):
        self.kernel = nnx.Param(linear.kernel[...] * 8**-0.5)

    def __call__(self, x):
        return (x @ self.kernel[...]).reshape(*x.shape[:-1], 2, 8)


@pytest.mark.parametrize("method", ["para", "lora"])
def test_queries_with_the_attention_scale_in_their_weights_take_the_same_adapter(own, method):
    model = Foreign(backbone())
    for layer in model.decoder.layers:
        layer.attention.q_proj, layer.attention.scale = ByHead(layer.attention.q_proj), 1.0
    linears = Linear("attention.q_proj.inner", ("q_proj",), out_axes=2, folded=True), *by_site()[1:]
    adapter = strong(init_adapter(METHODS[method], CONFIG))
    attach(model, adapter, config=CONFIG, family=Family(linears, layers="decoder.layers", cache=None))
    wanted = forward(own, adapter, TOKENS, PROMPTS)
    np.testing.assert_allclose(model(TOKENS, prompt_end=PROMPTS - 1), wanted, atol=2e-5)


def test_adapters_from_before_and_after_tunix_is_imported_are_alike(own):
    """A model of Tunix changes Flax's setting when it is imported."""
    trees = []
    for eager in (True, False):
        with nnx.use_eager_sharding(eager):
            trees.append(init_adapter(ParaConfig(r=2, summary="rms", up_bias=True), CONFIG))
    jax.tree.map(np.testing.assert_array_equal, *trees)
