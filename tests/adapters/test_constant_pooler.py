"""The control: with the pooler `constant` PARA is the same generator, but no longer knows its prompt."""

import numpy as np
import pytest
from golden_models import backbone, prompts, strong
from long_cases import quick

from para_jax import ParaConfig, forward, hidden_states, init_adapter, vectors
from para_jax.adapters.adapter import count_parameters
from para_jax.adapters.ia3 import from_factors
from para_jax.config import allowed_values

SUMMARIES = pytest.mark.parametrize("summary", quick(allowed_values(ParaConfig, "summary"), "rms"))


def control(seed=1, **options):
    return strong(init_adapter(ParaConfig(r=4, pooler="constant", **options), backbone("llama").config), seed)


@SUMMARIES
def test_its_factors_are_the_same_for_every_prompt_bit_for_bit(summary):
    model, tokens = backbone("llama"), prompts(backbone("llama"), 4)
    made = vectors(model, control(summary=summary), tokens, np.array([3, 12, 7, 1]))
    for factors in made.values():
        assert abs(factors - 1).max() > 0.05
        np.testing.assert_array_equal(factors, np.broadcast_to(factors[:, :1], factors.shape))
    aware = vectors(model, strong(init_adapter(ParaConfig(r=4), model.config)), tokens, np.array([3, 12, 7, 1]))
    assert all(abs(factors - factors[:, :1]).max() > 1e-3 for factors in aware.values())


@SUMMARIES
def test_with_a_prompt_s_own_states_for_constants_it_is_the_generator_that_reads_this_prompt(summary):
    model, tokens, length = backbone("llama"), prompts(backbone("llama"), 1), 7
    constant = control(summary=summary)
    reads = init_adapter(ParaConfig(r=4, summary=summary), model.config)
    reads.down[...] = constant.down[...]
    for site in reads.up:
        reads.up[site][...] = constant.up[site][...]
    entered = hidden_states(model, reads, tokens, length, all_layers=True)
    constant.constant[...] = entered[:-1, 0, length - 1]
    expected = vectors(model, reads, tokens, length)
    for site, factors in vectors(model, constant, tokens, length).items():
        np.testing.assert_allclose(factors, expected[site], rtol=1e-5, atol=1e-5)


def test_it_has_one_vector_a_layer_more_to_train_and_starts_it_from_a_normal_draw():
    config = backbone("llama").config
    fresh, reads = (init_adapter(ParaConfig(r=4, pooler=pooler), config) for pooler in ("constant", "last"))
    assert count_parameters(fresh) == count_parameters(reads) + config.num_layers * config.width
    drawn = np.asarray(fresh.constant[...])
    assert drawn.shape == (config.num_layers, config.width)
    assert abs(drawn.mean()) < 0.2 and 0.85 < drawn.std() < 1.15
    assert len({row.tobytes() for row in drawn}) == config.num_layers


@pytest.mark.parametrize("up_bias", [False, True])
def test_it_folds_into_an_ia3_adapter_for_all_prompts(up_bias):
    model, tokens = backbone("llama"), prompts(backbone("llama"), 3)
    adapter = control(up_bias=up_bias)
    made = vectors(model, adapter, tokens[:1], 2)
    folded = from_factors({site: factors[:, 0] for site, factors in made.items()}, model.config)
    found, expected = (forward(model, adapter, tokens, np.array([3, 8, 5])) for adapter in (folded, adapter))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert abs(expected - forward(model, None, tokens, None)).max() > 0.1
