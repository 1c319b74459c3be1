"""Sampling settings: checked once, and one set of arrays for a batch."""

import numpy as np
import pytest

from para_jax.inference.draw import row_sampling
from para_jax.inference.sampling import Sampling, derived_seed


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("max_new_tokens", value) for value in (0, 1.5, True, None)),
        *(("temperature", value) for value in (-1, float("nan"), "hot")),
        *(("top_p", value) for value in (0, 1.1)),
        *(("seed", value) for value in (-1, 2**32)),
        *(("stop", value) for value in ("", ["a", ""])),
    ],
)
def test_a_wrong_setting_is_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Sampling(**{name: wrong})


def test_a_temperature_that_is_zero_in_float32_is_greedy():
    smallest = float(np.finfo(np.float32).tiny)
    assert [Sampling(temperature=one).temperature for one in (1e-300, smallest / 2, smallest)] == [0, 0, smallest]


def test_each_index_has_its_own_seed():
    sampling = Sampling(temperature=0.5, seed=2**32 - 2)
    assert [sampling.for_index(i).seed for i in range(3)] == [2**32 - 2, 2**32 - 1, 0]
    assert sampling.for_index(2).temperature == 0.5


def test_a_batch_holds_each_row_and_greedy_ones_where_no_row_is():
    rows = row_sampling([Sampling(9, 0.5, 3, 0.8, 7), None])
    assert [values.tolist() for values in rows] == [[7, 0], [0.5, 0], [3, 0], [np.float32(0.8), 1]]
    assert [values.dtype for values in rows] == [np.uint32, np.float32, np.int32, np.float32]


def test_derived_seeds_are_reproducible_and_apart():
    seeds = [derived_seed(0, i) for i in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**32 for seed in seeds)
    assert derived_seed(0, 3) == seeds[3] and derived_seed(1, 3) != seeds[3] and derived_seed(0, "3") != seeds[3]
