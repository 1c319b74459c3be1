import hashlib
from array import array

import numpy as np
import pytest

from para_jax.data.batches import example_lengths
from para_jax.data.example_arrays import arrays_of, examples_digest
from para_jax.data.examples import Example


def made(count=50):
    draw = np.random.default_rng(0)
    ids = lambda: draw.integers(0, 300_000, draw.integers(1, 30)).tolist()  # noqa: E731
    return [Example(ids(), ids()) for _ in range(count)]


def test_arrays_are_a_sequence_of_the_same_examples():
    examples = made()
    arrays = arrays_of(examples)
    assert len(arrays) == 50 and list(arrays) == examples and arrays[-1] == examples[-1] and arrays[7] == examples[7]
    assert arrays[3:40:5] == examples[3:40:5] and arrays[:3] == examples[:3]
    with pytest.raises(IndexError):
        arrays[50]
    assert all(type(token) is int for token in arrays[0].prompt_ids)
    assert example_lengths(arrays) == example_lengths(examples)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_digest_covers_sizes_and_ids_as_int64(count):
    examples, expected = made(count), hashlib.sha256()
    for prompt, completion in examples:
        expected.update(array("q", [len(prompt), len(completion), *prompt, *completion]).tobytes())
    assert examples_digest(arrays_of(examples)) == examples_digest(examples) == expected.hexdigest()


def test_a_token_takes_little_more_than_four_bytes():
    arrays = arrays_of([Example([1] * 150, [2] * 50)] * 100)
    held = arrays.ids.nbytes + arrays.sizes.nbytes + arrays.lengths.nbytes + arrays.starts.nbytes
    assert held <= 6 * 200 * 100
