"""export_ia3: an (IA)^3 folder in PEFT's format that computes what PARA computes after one prompt."""

import json
from functools import cache

import numpy as np
import pytest
from golden_models import backbone, golden_tenants, prompts, strong
from long_cases import quick
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax import (
    Ia3Config,
    LoraConfig,
    ParaConfig,
    export_ia3,
    forward,
    init_adapter,
    load_adapter,
    vectors,
)

PROMPT = "w11 w200 w37 w5 w90"


@cache
def tokenizer():
    """w3 to w255, a token each, and a chat template that adds w3 for the assistant."""
    words = {f"w{i}": i for i in range(3, 256)}
    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 2} | words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", chat_template=template)


def continued(ids, model):
    """The prompt, and eight tokens more."""
    return np.concatenate([np.array([ids]), prompts(model, 1, 8)], axis=1).astype(np.int32)


@pytest.mark.long
@pytest.mark.parametrize("family", quick(["llama", "qwen2", "phi3"], "llama"))
def test_the_export_computes_what_para_computes_after_that_prompt(tmp_path, family):
    model, para = backbone(family), golden_tenants(family)[0]
    export_ia3(para, model, PROMPT, tmp_path / "ia3", tokenizer=tokenizer(), base_model=family)
    exported = load_adapter(tmp_path / "ia3", model.config)
    assert exported.config == Ia3Config(target_modules=para.config.target_modules, feedforward_modules=())
    ids = [11, 200, 37, 5, 90]
    tokens = continued(ids, model)
    expected = forward(model, para, tokens, len(ids))
    assert abs(expected - forward(model, None, tokens, len(ids))).max() > 0.1
    np.testing.assert_allclose(forward(model, exported, tokens, 1), expected, atol=2e-4)
    other = tokens[:, 1:]  # another prompt
    assert abs(forward(model, exported, other, 3) - forward(model, para, other, 3)).max() > 0.01


def test_the_folder_is_one_that_peft_loads(tmp_path):
    model, para = backbone("llama"), golden_tenants("llama")[1]
    export_ia3(para, model, PROMPT, tmp_path / "ia3", tokenizer=tokenizer(), base_model="me/llama")
    config = json.loads((tmp_path / "ia3" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3" and config["feedforward_modules"] == []
    assert config["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    tensors = load_file(tmp_path / "ia3" / "adapter_model.safetensors")
    made = vectors(model, para, np.array([[11, 200, 37, 5, 90]], np.int32), 5)
    name = "base_model.model.model.layers.2.mlp.up_proj.ia3_l"
    np.testing.assert_array_equal(tensors[name], np.asarray(made["up_proj"])[2, 0][:, None])
    card = (tmp_path / "ia3" / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: me/llama" in card and "one prompt of 5 tokens" in card


def test_a_constant_pooler_with_a_bias_is_the_same_ia3_for_every_prompt(tmp_path):
    model, tokens = backbone("llama"), prompts(backbone("llama"))
    para = strong(init_adapter(ParaConfig(r=4, pooler="constant", up_bias=True), model.config), 1)
    export_ia3(para, model, PROMPT, tmp_path / "ia3", tokenizer=tokenizer())
    exported = load_adapter(tmp_path / "ia3", model.config)
    expected = forward(model, para, tokens, 4)
    assert abs(expected - forward(model, None, tokens, 4)).max() > 0.1
    np.testing.assert_allclose(forward(model, exported, tokens, 4), expected, atol=2e-4)


def test_a_chat_is_rendered_by_the_template(tmp_path):
    model, para = backbone("llama"), golden_tenants("llama")[0]
    export_ia3(para, model, [{"role": "user", "content": "w7 w8"}], tmp_path / "chat", tokenizer=tokenizer())
    export_ia3(para, model, "w7 w8 w3", tmp_path / "text", tokenizer=tokenizer())
    chat, text = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("chat", "text"))
    for name in text:
        np.testing.assert_array_equal(chat[name], text[name])


def test_what_makes_no_factors_is_refused_by_name(tmp_path):
    model = backbone("llama")
    lora = init_adapter(LoraConfig(), model.config)
    with pytest.raises(ValueError, match="export_ia3: .*LoRA.*matrices"):
        export_ia3(lora, model, PROMPT, tmp_path / "ia3", tokenizer=tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [
    ParaConfig(r=2, scope="response"), Ia3Config(scope="prompt"),
])  # fmt: skip
def test_a_scope_that_pefts_ia3_does_not_have_is_refused_by_name(tmp_path, config):
    model = backbone("llama")
    adapter = strong(init_adapter(config, model.config))
    with pytest.raises(ValueError, match=f"export_ia3: .*scope {config.scope}(?s:.*)adapter.scope=all"):
        export_ia3(adapter, model, PROMPT, tmp_path / "ia3", tokenizer=tokenizer())
    assert not list(tmp_path.iterdir())
