"""How much factors differ over prompts is what one computes by hand from `vectors`."""

import numpy as np
import pytest
from golden_models import backbone, strong
from tiny_run import tokenizer, words

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, vectors
from para_jax.data.examples import encode_prompt
from para_jax.evaluation.factors import factor_spread, factors_of

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


@pytest.mark.parametrize("rows", [2, 8])
def test_size_and_spread_are_those_of_the_prompts_vectors(rows):
    found = factor_spread(backbone("llama"), adapter(), PROMPTS, tokenizer(), rows=rows)
    each = [by_hand(prompt) for prompt in PROMPTS]
    assert found.prompts == 7 and list(found.size) == ["q_proj", "v_proj", "up_proj"]
    for site in found.size:
        distance = np.stack([factors[site] for factors in each]).astype(np.float64) - 1  # [prompts, layers, width]
        np.testing.assert_allclose(found.size[site], np.sqrt((distance.mean(0) ** 2).mean(-1)), rtol=1e-4)
        np.testing.assert_allclose(found.spread[site], np.sqrt(distance.var(0).mean(-1)), rtol=1e-4)
        np.testing.assert_allclose(found.ratio[site], found.spread[site] / found.size[site])
        assert found.ratio[site].min() > 0.1
        overall = np.sqrt((found.spread[site] ** 2).sum() / (found.size[site] ** 2).sum())
        assert found.overall()[site] == pytest.approx(overall)


@pytest.mark.parametrize("config", [Ia3Config(target_modules=("k_proj", "v_proj")), ParaConfig(r=4, pooler="constant")])
def test_factors_that_do_not_read_the_prompt_have_no_spread(config):
    found = factor_spread(backbone("llama"), adapter(config), PROMPTS[:3], tokenizer())
    for site, ratio in found.ratio.items():
        assert found.size[site].min() > 0.01 and ratio.max() < 1e-6


def test_the_table_has_a_row_a_layer_and_a_column_a_site():
    lines = str(factor_spread(backbone("llama"), adapter(), PROMPTS[:2], tokenizer())).splitlines()
    assert lines[0].split() == ["layer", "q_proj", "v_proj", "up_proj"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2", "all"]
    assert all(len(line.split()) == 4 and float(line.split()[1]) > 0 for line in lines[1:])


def test_one_prompt_and_an_adapter_without_factors_are_errors():
    with pytest.raises(ValueError, match="^prompts: 1 given"):
        factor_spread(backbone("llama"), adapter(), PROMPTS[:1], tokenizer())
    with pytest.raises(ValueError, match="vectors.*Shared.*no factors.*PARA"):
        factors_of(backbone("llama"), adapter(LoraConfig()), PROMPTS[0], tokenizer())


@pytest.mark.filterwarnings("error")
def test_factors_that_are_all_one_have_no_ratio_and_no_warning():
    fresh = init_adapter(ParaConfig(r=4), backbone("llama").config)
    assert np.isnan(list(factor_spread(backbone("llama"), fresh, PROMPTS[:2], tokenizer()).overall().values())).all()
