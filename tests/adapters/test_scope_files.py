"""An adapter's scope in its folder: kept bit for bit, refused where it is wrong, and never lost in PEFT's format."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from adapter_folder import WEIGHTS, assert_same, change_config, saved_config
from golden_models import FIXTURES, backbone, strong
from safetensors.numpy import load_file

from para_jax import (
    AdapterBank,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    init_adapter,
    load_adapter,
    save_adapter,
)
from para_jax.adapters.files import copy_for_peft, read_adapter_config
from para_jax.adapters.methods import METHODS
from para_jax.config import SITES
from para_jax.reports.inspect import folder_report

ALORA = LoraConfig(scope="response", scope_window=3, alora_invocation_tokens=(7, 9, 7))
#: Each form of a scope, with the peft_type of its folder.
SCOPED = {
    ParaConfig(r=2, scope="response"): "PARA",
    ParaConfig(r=2, scope="prompt", pooler="constant", layers_to_transform=(1,)): "PARA",
    LoraConfig(r=3, lora_alpha=0.1 + 0.2, use_rslora=True, scope="response"): "PARA_JAX_LORA",
    LoraConfig(scope="prompt", target_modules=SITES): "PARA_JAX_LORA",
    ALORA: "LORA",
    Ia3Config(scope="response", scope_window=2): "PARA_JAX_IA3",
    Ia3Config(scope="prompt", target_modules=("q_proj", "up_proj"), feedforward_modules=()): "PARA_JAX_IA3",
}
each_scope = pytest.mark.parametrize("config", SCOPED, ids=str)


def made(config, family="llama"):
    return strong(init_adapter(config, backbone(family).config, seed=1), 1, 0.3)


def load(folder, family="llama"):
    return load_adapter(folder, backbone(family).config)


@each_scope
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(tmp_path, config):
    family = "phi3" if isinstance(config, LoraConfig) else "llama"
    adapter = made(config, family)
    save_adapter(adapter, tmp_path / "adapter", base_model="me/model", model=backbone(family))
    assert saved_config(tmp_path / "adapter")["peft_type"] == SCOPED[config]
    assert_same(load(tmp_path / "adapter", family), adapter)


def test_no_tensor_of_our_own_format_has_a_name_of_pefts(tmp_path):
    """Servers that ignore peft_type then refuse the folder, instead of applying it everywhere."""
    for scoped, plain in ((LoraConfig(scope="prompt"), LoraConfig()), (Ia3Config(scope="prompt"), Ia3Config())):
        names = []
        for config in (scoped, plain):
            save_adapter(made(config), tmp_path / "adapter")
            names.append(set(load_file(tmp_path / "adapter" / WEIGHTS)))
        assert not names[0] & names[1] and len(names[0]) == len(names[1])


def test_pefts_activated_lora_loads_as_scope_response(tmp_path):
    shutil.copytree(FIXTURES / "peft" / "lora_qv", tmp_path / "alora")
    change_config(tmp_path / "alora", alora_invocation_tokens=[7, 9])
    plain, found = load(FIXTURES / "peft" / "lora_qv"), load(tmp_path / "alora")
    scope = {"scope": "response", "scope_window": 2, "alora_invocation_tokens": (7, 9)}
    assert found.config == replace(plain.config, **scope)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    save_adapter(found, tmp_path / "again", base_model="llama")
    mine, theirs = saved_config(tmp_path / "again"), saved_config(tmp_path / "alora")
    assert {**mine, "target_modules": sorted(mine["target_modules"])} == {key: theirs[key] for key in mine}


@each_scope
def test_a_copy_for_peft_is_made_where_pefts_format_says_it_all(tmp_path, config):
    save_adapter(made(config), tmp_path / "adapter", base_model="me/model")
    if config == ALORA:
        copy_for_peft(tmp_path / "adapter", tmp_path / "copy")
        assert saved_config(tmp_path / "copy") == saved_config(tmp_path / "adapter")
        return
    advice = (
        "alora_invocation_tokens"
        if isinstance(config, LoraConfig) and config.scope == "response"
        else "adapter.scope=all"
    )
    with pytest.raises(ValueError, match=rf"scope {config.scope}(?s:.*){advice}"):
        copy_for_peft(tmp_path / "adapter", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# ---------------------------------------------------------------------------------------------------- cards, inspecting


@each_scope
def test_the_card_and_inspect_say_where_it_acts(tmp_path, config):
    save_adapter(made(config), tmp_path / "adapter", base_model="me/model")
    card, report = (tmp_path / "adapter" / "README.md").read_text(), folder_report(tmp_path / "adapter")
    assert f"Scope {config.scope}: " in card and f"scope {config.scope}" in report
    assert ("AutoPeft" in card) == ("format of Hugging Face PEFT" in card) == (config == ALORA)
    if config.scope_window > 1:
        assert f"last {config.scope_window} tokens of the prompt" in card
        assert f"scope_window {config.scope_window}" in report
    assert ("tokens 7, 9, 7" in card) == (config == ALORA)


@pytest.mark.parametrize("config", [LoraConfig(r=2), Ia3Config(), Ia3Config(target_modules=("up_proj", "down_proj"))])
def test_the_sizes_of_a_folder_do_not_depend_on_its_format(tmp_path, config):
    sizes = []
    for scope in ("all", "response"):
        save_adapter(made(replace(config, scope=scope)), tmp_path / "adapter")
        found = read_adapter_config(tmp_path / "adapter")
        sizes.append(found.counts[:3])
    assert sizes[0] == sizes[1]
    save_adapter(made(replace(config, scope="prompt")), tmp_path / "adapter")
    assert read_adapter_config(tmp_path / "adapter").counts.carried == 0
    assert "decode     nothing" in folder_report(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------------------ in a bank


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_adapters_of_other_scopes_and_windows_are_other_groups(method):
    model, each = backbone("llama").config, [("all", 1), ("response", 1), ("prompt", 1)]
    each += [] if method.name == "para" else [("response", 2)]
    bank = AdapterBank(model, methods=(method.name,), sites=SITES)
    for i, (scope, window) in enumerate(each * 2):
        bank.add(f"{i}", made(method.config(scope=scope, scope_window=window)))
    groups = [bank.entry(name).group for name in bank.names]
    assert len(set(groups)) == len(each) and groups[: len(each)] == groups[len(each) :]
    assert len({bank.entry(name).content for name in bank.names}) == len(each)


def test_activated_loras_share_a_group_and_keep_their_own_tokens():
    model = backbone("llama").config
    bank = AdapterBank(model, methods=("lora",))
    for name, tokens in (("a", (7, 9)), ("b", (8, 8)), ("none", None)):
        config = LoraConfig(scope="response", scope_window=2, alora_invocation_tokens=tokens)
        bank.add(name, made(config))
        assert bank.entry(name).config == config
    assert len({bank.entry(name).group for name in bank.names}) == 1
    assert len({bank.entry(name).content for name in bank.names}) == 3
