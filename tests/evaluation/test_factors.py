"""The factors of a prompt are those that `vectors` gives."""

import numpy as np
import pytest
from golden_models import backbone, strong
from tiny_run import tokenizer, words

from para_jax import LoraConfig, ParaConfig, init_adapter, vectors
from para_jax.data.examples import encode_prompt
from para_jax.evaluation.factors import factors_of

PROMPTS = [words(np.random.default_rng(i).integers(20, 256, 2 + i % 5)) for i in range(7)]


def adapter(config=None):
    return strong(init_adapter(config or ParaConfig(r=4), backbone("llama").config))


def by_hand(prompt):
    ids = encode_prompt(tokenizer(), prompt)
    return {
        site: np.asarray(f[:, 0])
        for site, f in vectors(backbone("llama"), adapter(), np.array([ids]), len(ids)).items()
    }


def test_the_factors_of_a_prompt_are_its_vectors():
    made = factors_of(backbone("llama"), adapter(), PROMPTS[0], tokenizer())
    expected = by_hand(PROMPTS[0])
    assert list(made) == ["q_proj", "v_proj", "up_proj"]
    for site, factors in made.items():
        np.testing.assert_array_equal(factors, expected[site])


def test_an_adapter_without_factors_is_an_error():
    with pytest.raises(ValueError, match="vectors.*Shared.*no factors.*PARA"):
        factors_of(backbone("llama"), adapter(LoraConfig()), PROMPTS[0], tokenizer())
