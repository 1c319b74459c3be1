"""A checkpoint with an image part loads as its text model, and its adapters have the names that PEFT gives them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import backbone, prompts, strong
from safetensors.numpy import load_file, save_file

from para_jax import ParaConfig, forward, init_adapter, load_adapter, load_backbone, save_adapter
from para_jax.backbone.families import model_config
from para_jax.config import Ia3Config, LoraConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
#: How published checkpoints, and transformers 5 in memory, name a text model's tensors.
NAMINGS = {
    "published": lambda name: f"language_model.{name}",
    "model.": lambda name: name.replace("model.", "model.language_model.", 1),
}
IMAGE = {
    "published": {"vision_tower.embeddings.weight": np.ones((2, 3), np.float32)},
    "model.": {"model.multi_modal_projector.weight": np.ones((2, 3), np.float32)},
}


def whole(folder: Path, family: str = "gemma3_text", model_type: str = "gemma3", naming: str = "published", **more):
    """The golden model of a family, as the text model of a checkpoint that has an image part."""
    folder.mkdir()
    config = {"model_type": model_type, "text_config": json.loads((FIXTURES / family / "config.json").read_text())}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 3}} | more))
    tensors = load_file(FIXTURES / family / "model.safetensors")
    named = {NAMINGS[naming](name): tensor for name, tensor in tensors.items()}
    save_file(named | IMAGE[naming], folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    ("family", "model_type"), [("gemma3_text", "gemma3"), ("mistral", "mistral3"), ("ministral3", "mistral3")]
)
def test_it_computes_what_the_text_model_computes(tmp_path, family, model_type, naming):
    text, model = backbone(family), load_backbone(whole(tmp_path / "whole", family, model_type, naming))
    assert model.fingerprint == text.fingerprint
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(text), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tokens = prompts(text)
    logits = [forward(each, None, tokens, np.full(len(tokens), tokens.shape[1])) for each in (model, text)]
    np.testing.assert_array_equal(*logits)


def test_a_published_config_has_the_values_that_it_leaves_out():
    """Gemma 3 4B's, as far as its text model is concerned."""
    config = model_config(
        {
            "model_type": "gemma3", "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
        }
    )  # fmt: skip
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.eos_token_ids == (1, 106) and config.tied_embeddings and config.max_positions == 131072
    local, full = config.kinds[0], config.kinds[5]
    assert (local.window, local.rotary.theta, local.rotary.scaling) == (1024, 1e4, "none")
    assert (full.window, full.rotary.theta, full.rotary.scaling, full.rotary.factor) == (None, 1e6, "linear", 8.0)


def test_whether_the_head_is_tied_is_said_for_the_whole(tmp_path):
    folder = whole(tmp_path / "whole", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_backbone(folder)
    tensors = load_file(folder / "model.safetensors")
    head = 2 * tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": head}, folder / "model.safetensors")
    np.testing.assert_array_equal(np.asarray(load_backbone(folder).head[...]), head.T)


@pytest.mark.parametrize("config", [LoraConfig(r=3), Ia3Config(), ParaConfig(r=3)], ids=lambda one: type(one).__name__)
def test_its_adapters_are_saved_and_loaded(tmp_path, config):
    """LoRA and (IA)^3 under PEFT's names, and for the text model's linears alone."""
    model = load_backbone(whole(tmp_path / "whole"))
    adapter = strong(init_adapter(config, model.config))
    save_adapter(adapter, tmp_path / "adapter", model=model)
    again = load_adapter(tmp_path / "adapter", model.config, model=model)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if isinstance(config, ParaConfig):
        return
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    linear = {"q_proj": "self_attn", "v_proj": "self_attn", "k_proj": "self_attn", "down_proj": "mlp"}
    for site in config.target_modules:  # PEFT matches a pattern with the whole name
        assert re.fullmatch(targets, f"model.language_model.layers.2.{linear[site]}.{site}")
        assert not re.fullmatch(targets, f"model.vision_tower.vision_model.encoder.layers.2.{linear[site]}.{site}")


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "base_model.model.language_model.model."])
def test_an_adapter_of_peft_for_the_whole_fits_the_text_model(tmp_path, prefix):
    model = backbone("gemma3_text")
    save_adapter(strong(init_adapter(LoraConfig(r=3), model.config)), tmp_path / "adapter")
    expected = load_adapter(tmp_path / "adapter", model.config)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.model.", prefix): array for name, array in load_file(file).items()}, file)
    found = load_adapter(tmp_path / "adapter", model.config)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "fc1", "out_proj"]])
def test_an_adapter_of_peft_for_both_parts_acts_on_the_text_model(tmp_path, targets):
    """With the usual names, and with "all-linear", PEFT trains the image part too."""
    model = load_backbone(whole(tmp_path / "whole"))
    adapter = strong(init_adapter(LoraConfig(r=3, target_modules=("q_proj", "v_proj")), model.config))
    save_adapter(adapter, tmp_path / "adapter")
    file, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    image = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(file) | {image: np.ones((3, 4), np.float32)}, file)
    changed = {"target_modules": targets, "exclude_modules": ".*projector.*"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    found = load_adapter(tmp_path / "adapter", model.config)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": [1]}, "model_type 'gemma3' is not supported"),
        ({"text_config": {"model_type": "t5gemma"}}, "model_type 't5gemma'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(whole(tmp_path / "whole", **changes))
