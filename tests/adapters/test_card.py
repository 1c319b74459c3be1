"""The model card: what it says about training and scores, and the base model that hubs and PEFT find."""

import json

import pytest
import yaml
from golden_models import backbone

from para_jax import LoraConfig, ParaConfig, init_adapter, save_adapter
from para_jax.adapters.card import given_lines, score_line, training_lines, with_test_score
from para_jax.adapters.files import add_test_score

LINES = training_lines(
    method="PARA", data="mine", examples=200, steps=60, rows=16, learning_rate=0.001, version="0.1.0"
)
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def card(tmp_path, config, **options):
    save_adapter(init_adapter(config, backbone("llama").config), tmp_path / "adapter", **options)
    text = (tmp_path / "adapter" / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_built_in_backbone_is_named_by_its_hub_id(tmp_path):
    front, text = card(tmp_path, LoraConfig(r=2), base_model="smollm2-135m", card=LINES)
    assert front["base_model"] == HUB_ID and "Q4_1" in text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == HUB_ID
    assert f'AutoTokenizer.from_pretrained("{HUB_ID}")' in text and 'base = "smollm2-135m"' in text
    assert "AutoPeft" not in card(tmp_path, ParaConfig(r=2), base_model="smollm2-135m")[1]


@pytest.mark.parametrize(
    ("base", "front"),
    [
        ("me/m@v1", "me/m"),
        ("gpt2", "gpt2"),
        ("../m", None),
        ("models@v2/m", None),
        ("", None),
    ],
)
def test_only_hub_ids_are_in_the_front_matter(tmp_path, base, front):
    found, text = card(tmp_path, LoraConfig(r=2), base_model=base)
    assert found.get("base_model") == front and f"Base model: {base or 'not stated'}." in text
    assert ("AutoPeft" in text) == bool(base)


@pytest.mark.parametrize("base", ["models/tiny", "tiny.gguf", "elsewhere/tiny.gguf"])
def test_a_folder_and_a_file_with_the_form_of_a_hub_id_are_none(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert "base_model" not in card(tmp_path / "a", LoraConfig(r=2), base_model=base)[0]


def test_training_and_scores_are_said(tmp_path):
    found = [*LINES, score_line("Validation", "loss", 0.2078, 0.01, 100, 0.2078)]
    text = card(tmp_path, ParaConfig(r=2), card=found)[1]
    for said in ("60 steps on mine (200 examples)", "Learning rate 0.001, 16 rows per step", "para_jax 0.1.0",
                 "Validation loss: 0.2078 ± 0.0100 (standard error) on 100 examples."):  # fmt: skip
        assert said in text
    assert given_lines(text) == found
    tested = score_line("Test", "accuracy", 0.9, 0.0, 60, 0.116, 0.25)  # an error of 0 says nothing
    assert tested == "- Test accuracy: 0.9000 on 60 examples, loss 0.1160; 0.2500 without the adapter."
    once = with_test_score(text, tested)
    assert given_lines(once) == [*found, tested] == given_lines(with_test_score(once, tested))
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    add_test_score(tmp_path / "adapter", tested)
    assert (tmp_path / "adapter" / "README.md").read_text() == once
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == weights
