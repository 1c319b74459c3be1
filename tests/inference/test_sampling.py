"""Sampling settings: checked once, and one set of arrays for a batch."""

import numpy as np
import pytest

from para_jax.inference.draw import row_sampling
from para_jax.inference.sampling import Sampling, derived_seed


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("max_new_tokens", value) for value in (0, 1.5, True, "9", None)),
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), 10**400, "hot", None, True)),
        *(("top_k", value) for value in (-1, 2**31, 0.5, None)),
        *(("top_p", value) for value in (0, 1.1, float("nan"), "all", True)),
        *(("seed", value) for value in (-1, 2**32, 0.5, None)),
        *(("stop", value) for value in ("", 9, None, ["a", ""], [b"a"])),
    ],
)
def test_a_wrong_setting_is_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Sampling(**{name: wrong})


def test_numpy_numbers_are_settings_too():
    sampling = Sampling(np.int64(3), np.float32(0.5), np.int32(2), np.float64(0.9), np.uint32(7))
    assert sampling.for_index(1).seed == 8 and type(sampling.seed) is type(sampling.max_new_tokens) is int
    assert Sampling(seed=np.int32(2**31 - 1)).for_index(1).seed == 2**31
    assert 500 + Sampling(np.uint8(250)).max_new_tokens == 750


def test_a_temperature_that_is_zero_in_float32_is_greedy():
    smallest = float(np.finfo(np.float32).tiny)
    assert [Sampling(temperature=one).temperature for one in (1e-300, smallest / 2, smallest)] == [0, 0, smallest]


def test_stop_texts_become_a_tuple():
    assert Sampling(stop="a").stop == Sampling(stop=["a"]).stop == ("a",)


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
