"""The laws of the method in docs/adding_a_method.md. test_adding_a_method.py runs this file on a copy of the package
that has the method."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone, prompts, strong
from tiny_run import run_config, run_folder, tokenizer, words

from para_jax import (
    AdapterBank,
    Engine,
    ParaConfig,
    Request,
    decode,
    forward,
    generate,
    init_adapter,
    load_adapter,
    load_config,
    prefill,
    save_adapter,
    train,
)
from para_jax.adapters.methods import METHODS
from para_jax.reports.inspect import folder_report

BIAS = METHODS[-1]
BiasConfig = BIAS.config
SITES = ("q_proj", "k_proj", "up_proj")


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


def strong_bias(model, seed, **options):
    fresh = init_adapter(BiasConfig(**options), model.config)
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32), fresh)


@pytest.fixture(scope="module")
def tenants(model):
    return {
        "bias": strong_bias(model, 1),
        "other sites": strong_bias(model, 2, target_modules=SITES),
        "para": strong(init_adapter(ParaConfig(r=4), model.config), 3),
        None: None,
    }


@pytest.fixture(scope="module")
def bank(model, tenants):
    bank = AdapterBank(model.config, methods=("para", BIAS.name), sites=("q_proj", "k_proj", "v_proj", "up_proj"))
    for name, adapter in tenants.items():
        if name is not None:
            bank.add(name, adapter)
    return bank


def test_where_a_prompt_ends_makes_no_difference(bank):
    assert not bank.depends_on_prompt_end(bank.entry("bias")) and bank.depends_on_prompt_end(bank.entry("para"))


def test_a_fresh_adapter_is_the_backbone(model):
    tokens = prompts(model)
    fresh = init_adapter(BiasConfig(), model.config)
    np.testing.assert_array_equal(forward(model, fresh, tokens, 7), forward(model, None, tokens, 7))


def test_decode_equals_the_teacher_forced_pass(model, tenants):
    tokens = prompts(model, 2)
    expected = forward(model, tenants["bias"], tokens, 8)
    logits, state = prefill(model, tenants["bias"], tokens[:, :8], 8, max_length=12)
    for position in range(8, 12):
        np.testing.assert_allclose(logits, expected[:, position - 1], atol=1e-4)
        logits, state = decode(model, state, tokens[:, position])


def test_saved_and_loaded_is_the_same(model, tenants, tmp_path):
    save_adapter(tenants["other sites"], tmp_path / "adapter", base_model="llama", model=model)
    loaded = load_adapter(tmp_path / "adapter", model.config, model=model)
    assert loaded.config == BiasConfig(target_modules=SITES)
    for saved, found in zip(jax.tree.leaves(tenants["other sites"]), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(saved, found)
    report = folder_report(tmp_path / "adapter")
    assert "Bias, target_modules q_proj, k_proj, up_proj" in report and "its biases" in report
    with pytest.raises(ValueError, match="num_layers 3"):
        load_adapter(tmp_path / "adapter", replace(model.config, kinds=model.config.kinds[:2]))


def test_a_mixed_batch_equals_each_tenant_alone(model, tenants, bank):
    tokens = prompts(model, len(tenants))
    mixed = forward(model, bank.rows(tenants), tokens, 8)
    base = forward(model, None, tokens, 8)
    for i, (name, adapter) in enumerate(tenants.items()):
        alone = forward(model, adapter, tokens[i : i + 1], 8)
        np.testing.assert_allclose(mixed[i], alone[0], atol=1e-4)
        if name is None:
            np.testing.assert_array_equal(mixed[i], base[i])
        else:
            assert abs(mixed[i] - base[i]).max() > 0.3, name


def test_the_engine_serves_it_next_to_para(model, tenants, bank):
    asked = {name: words(np.random.default_rng(i).integers(20, 256, 6)) for i, name in enumerate(tenants)}
    engine = Engine(model, bank, tokenizer(), slots=3, max_length=40)
    ids = {engine.submit(Request(prompt, name, max_new_tokens=7)): name for name, prompt in asked.items()}
    found = {ids[completion.id]: completion.text for completion in engine.run()}
    options = dict(tokenizer=tokenizer(), max_new_tokens=7)
    base = generate(model, list(asked.values()), **options)
    for i, (name, prompt) in enumerate(asked.items()):
        assert [found[name]] == generate(model, [prompt], adapters=tenants[name], **options)
        assert (found[name] == base[i]) == (name is None)


def test_a_run_trains_it_and_its_folder_loads(model, tmp_path):
    assert load_config(None, ["adapter.method=bias", "adapter.target_modules=[v_proj]"]).adapter == BiasConfig(
        target_modules=("v_proj",)
    )
    result = train(replace(run_config(run_folder(tmp_path)), adapter=BiasConfig()))
    trained = load_adapter(result.output_dir / "adapter", model.config)
    assert all(abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(trained))
    assert load_config(result.output_dir / "config.yaml").adapter == BiasConfig()
    assert "bias on" in folder_report(result.output_dir)
    tokens = prompts(model)
    assert abs(forward(model, trained, tokens, 7) - forward(model, None, tokens, 7)).max() > 1e-2
