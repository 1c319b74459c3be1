"""An engine that gives log-probabilities, for tenants of all methods and scopes, and what `forward` says they are."""

import jax
import numpy as np
from golden_models import backbone, strong
from tiny_engine import SITES, engine_of

from para_jax import AdapterBank, Ia3Config, LoraConfig, ParaConfig, forward, init_adapter

TOP, LENGTH = 4, 32
CONFIGS = {
    "para": ParaConfig(r=4),
    "constant": ParaConfig(r=4, pooler="constant"),
    "response": ParaConfig(r=4, scope="response"),
    "lora": LoraConfig(r=4),
    "lora response": LoraConfig(r=4, scope="response"),
    "ia3": Ia3Config(target_modules=("v_proj", "down_proj")),
}
NAMES = [None, *CONFIGS]


def made_bank():
    model = backbone("llama")
    bank = AdapterBank(model.config, max_r=4, methods=("para", "ia3", "lora"), sites=("down_proj", *SITES))
    for i, (name, config) in enumerate(CONFIGS.items()):
        bank.add(name, strong(init_adapter(config, model.config), i, 0.1))
    return bank


def made_engine(bank, **options):
    return engine_of(backbone("llama"), bank, **({"max_logprobs": TOP, "max_length": LENGTH} | options))


def expected(bank, tenant, ids, prompt_length):
    """log_softmax of the teacher-forced pass, [T, vocab]: row t is of the token after t."""
    padded = np.array([[*ids, *[0] * (LENGTH - len(ids))]])
    logits = forward(backbone("llama"), bank.rows([tenant]), padded, prompt_length, len(ids))[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(logits))


def assert_records(records, tokens, reference, top):
    """Records of tokens, each under its row of the reference."""
    assert [record.token for record in records] == list(tokens)
    for record, row in zip(records, reference, strict=True):
        np.testing.assert_allclose(record.logprob, row[record.token], atol=1e-4)
        ids, values = [id for id, _ in record.top], [value for _, value in record.top]
        assert len(set(ids)) == top and values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, row[ids], atol=1e-4)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:top], atol=1e-4)
