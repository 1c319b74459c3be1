"""An adapter's weights stay float32 on a bfloat16 backbone, so that it answers the same however it is asked."""

import pytest
from golden_models import FIXTURES, prompts, strong
from tiny_run import tokenizer

from para_jax import ParaConfig, forward, init_adapter, load_adapter, load_backbone, save_adapter
from para_jax.adapters.loading_bank import bank_of
from para_jax.adapters.preview import load_previewed, previews
from para_jax.evaluation.harness import lm as para_lm

LLAMA = str(FIXTURES / "llama")


@pytest.fixture(scope="module")
def model():
    with pytest.warns(UserWarning, match="bfloat16 backbone"):
        return load_backbone(LLAMA, dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenant") / "adapter"
    save_adapter(strong(init_adapter(ParaConfig(r=4), model.config), 1, 0.3), folder)
    return folder


@pytest.fixture(scope="module")
def alone(model, folder):
    return forward(model, load_adapter(folder, model.config), prompts(model), 7)


def apart(model, bank, alone):
    return float(abs(forward(model, bank.rows(bank.names * 3), prompts(model), 7) - alone).max())


def test_an_adapter_of_the_command_line_answers_the_same_alone_and_in_a_bank(model, folder, alone):
    (found,) = previews([str(folder)], model.config)
    bank = bank_of({"a": found}, model.config, lambda _: load_previewed(found, model.config, model=model), 10**9)
    assert apart(model, bank, alone) < 0.05  # rounded weights: 0.7


@pytest.mark.filterwarnings("ignore:a bfloat16 backbone")
def test_an_adapter_of_lm_eval_answers_as_it_does_alone(model, folder, alone, monkeypatch):
    monkeypatch.setattr(para_lm, "load_tokenizer", lambda *_: tokenizer())
    options = {"dtype": "bfloat16", "batch_size": 1, "max_length": 32, "allow_cpu": True}
    asked = para_lm.ParaLM.from_source(LLAMA, str(folder), **options)
    assert apart(model, asked.engine.bank, alone) < 0.05
