"""`para-jax export`: what PEFT can load of each method."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from adapter_folder import change_config, saved_config
from golden_models import backbone, golden_tenants, strong
from tiny_run import backbone_folder

from para_jax import Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, load_adapter, save_adapter
from para_jax.adapters.card import training_lines
from para_jax.cli import main

TRAINED = training_lines(method="LoRA", data="mine", examples=20, steps=6, rows=8, learning_rate=1e-3, version="0.1.0")


@pytest.fixture
def export(tmp_path, capsys):
    def run(*arguments):
        code = main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *arguments])
        return code, capsys.readouterr().err

    return run


def front_of(folder):
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("config", [LoraConfig(r=2), Ia3Config()], ids=["lora", "ia3"])
def test_a_method_of_peft_is_copied_with_the_hub_id_of_its_base(tmp_path, export, config):
    """A folder of an earlier version names the built-in backbone, which is no hub id."""
    adapter = strong(init_adapter(config, backbone("llama").config), 1, 0.5)
    save_adapter(adapter, tmp_path / "adapter", card=TRAINED)
    change_config(tmp_path / "adapter", base_model_name_or_path="smollm2-135m")
    old = saved_config(tmp_path / "adapter")
    assert export()[0] == 0
    out = tmp_path / "out"
    assert saved_config(out) == old | {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "adapter", out)]
    assert files[0].read_bytes() == files[1].read_bytes()
    front, body = front_of(out)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "Q4_1" in body
    assert "\n".join(TRAINED) in body and "AutoPeftModelForCausalLM" in body
    assert export("--base-model", "me/other@v1")[0] == 0
    assert (saved_config(out)["base_model_name_or_path"], saved_config(out)["revision"]) == ("me/other", "v1")
    assert front_of(out)[0]["base_model"] == "me/other"


def test_para_is_exported_for_its_prompt(tmp_path, export):
    folder, model, para = backbone_folder(tmp_path / "backbone"), backbone("llama"), golden_tenants("llama")[0]
    save_adapter(para, tmp_path / "adapter", base_model=str(folder), model=model)
    code, said = export()
    assert code == 2 and "reads the prompt" in said and "--prompt" in said
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    code, said = export("--prompt", "w11", "--output", str(tmp_path / "x" / ".." / "adapter"))
    assert code == 2 and "is the adapter itself" in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert export("--prompt", "w11 w200\\nw37", "--base-model", "me/llama", "--allow-cpu")[0] == 0
    exported, tokens = load_adapter(tmp_path / "out", model.config), np.array([[11, 200, 37, 9, 10]], np.int32)
    np.testing.assert_allclose(forward(model, exported, tokens, 1), forward(model, para, tokens, 3), atol=2e-4)
    front, body = front_of(tmp_path / "out")
    assert front["base_model"] == "me/llama" and "one prompt of 3 tokens: `'w11 w200\\nw37'`" in body
    assert 'prompt = "w11 w200\\nw37"' in body


def test_activated_lora_is_copied_and_other_scopes_are_refused_by_name(tmp_path, export):
    model = backbone("llama").config
    alora = LoraConfig(r=2, scope="response", scope_window=2, alora_invocation_tokens=(7, 9))
    save_adapter(init_adapter(alora, model), tmp_path / "adapter", base_model="me/llama")
    assert export()[0] == 0
    assert saved_config(tmp_path / "out")["alora_invocation_tokens"] == [7, 9]
    (tmp_path / "out").rename(tmp_path / "before")
    scoped = [ParaConfig(r=2, scope="prompt"), Ia3Config(scope="prompt"), LoraConfig(r=2, scope="prompt")]
    for config in [*scoped, *(replace(one, scope="response") for one in scoped)]:
        save_adapter(init_adapter(config, model), tmp_path / "adapter", base_model="me/llama")
        for arguments in ((), ("--prompt", "w5")):
            code, said = export(*arguments)
            assert code == 2 and f"scope {config.scope}" in said and "train it with adapter.scope=all" in said
            response_of_lora = isinstance(config, LoraConfig) and config.scope == "response"
            assert ("adapter.alora_invocation_tokens" in said) == response_of_lora
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_base_model_needs_one(tmp_path, export):
    model = backbone("llama")
    save_adapter(init_adapter(LoraConfig(r=2), model.config), tmp_path / "adapter")
    code, said = export()
    assert code == 2 and "names no base model" in said
    save_adapter(golden_tenants("llama")[0], tmp_path / "adapter")
    code, said = export("--prompt", "w5")
    assert code == 2 and "give --backbone" in said and not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_refused(tmp_path, export):
    folder, model = backbone_folder(tmp_path / "backbone"), backbone("llama")
    save_adapter(golden_tenants("llama")[0], tmp_path / "adapter", base_model=str(folder), model=model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("a")
    code, said = export("--prompt", "w5")
    assert code == 2 and "out holds other files (thesis.txt)" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
