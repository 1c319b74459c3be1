"""Where an adapter acts: all, response, prompt, and the window of response."""

import jax.numpy as jnp
import numpy as np
import pytest

from para_jax import Ia3Config, LoraConfig, ParaConfig
from para_jax.adapters.scope import reach_of_config, reach_of_configs
from para_jax.adapters.segments import Segments

METHODS = [ParaConfig, LoraConfig, Ia3Config]


def acting(config, prompt_length, tokens=8):
    """The positions where an adapter acts in one row."""
    found = reach_of_config(config, 1).acts(jnp.array([prompt_length]), jnp.arange(tokens), None)
    return np.flatnonzero(found[0]).tolist()


@pytest.mark.parametrize("config", METHODS)
def test_each_scope_acts_where_it_says(config):
    assert acting(config(), 3) == list(range(8))
    assert acting(config(scope="prompt"), 3) == [0, 1, 2]
    assert acting(config(scope="response"), 3) == [2, 3, 4, 5, 6, 7]
    if config is not ParaConfig:
        assert acting(config(scope="response", scope_window=2), 3) == [1, 2, 3, 4, 5, 6, 7]
        assert acting(config(scope="response", scope_window=9), 3) == list(range(8))


def test_each_row_of_a_batch_has_the_scope_of_its_own_adapter():
    configs = [ParaConfig(), LoraConfig(scope="response", scope_window=2), Ia3Config(scope="prompt")]
    index = jnp.array([[0, -1, -1, -1], [-1, 3, -1, -1], [-1, -1, 0, -1]])
    reach = reach_of_configs(configs, index)
    found = reach.acts(jnp.array([3, 3, 3, 3]), jnp.arange(5), None)
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2], []]
    assert (reach.window, reach.only_window, reach.everywhere, reach.decodes) == (2, None, False, True)


def test_packed_rows_count_from_each_segments_own_prompt():
    segments = Segments(jnp.array([[0, 0, 0, 1, 1, 1, 1, -1]]), jnp.array([[0, 3]]))
    reach = reach_of_config(ParaConfig(scope="response"), 1)
    found = reach.acts(jnp.array([[2, 3]]), segments.position, segments)
    assert np.flatnonzero(found[0, :7]).tolist() == [1, 2, 5, 6]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(scope_window=2), ["scope_window", "2"]),
        (dict(pooler="mean"), ["pooler", "mean", "last", "constant"]),
    ],
)
def test_para_reads_the_last_token_alone_with_scope_response(fields, named):
    with pytest.raises(ValueError) as error:
        ParaConfig(scope="response", **fields)
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(scope="answer"), ["scope", "answer", "response"]),
        (dict(scope="prompt", scope_window=4), ["scope_window", "4", "response"]),
    ],
)
def test_a_wrong_scope_is_refused_by_name(config, fields, named):
    with pytest.raises(ValueError) as error:
        config(**fields)
    assert all(text in str(error.value) for text in named)
