import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.backbone.sequences import checked_sequences

TOKENS = np.arange(12, dtype=np.int64).reshape(3, 4)
LIMITS = {"vocab_size": 12, "positions": 4}


def test_lengths_become_one_int32_per_row():
    tokens, prompt_length, length = checked_sequences(TOKENS, 2, None, **LIMITS)
    assert tokens.dtype == prompt_length.dtype == length.dtype == np.int32
    assert prompt_length.tolist() == [2, 2, 2] and length.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "length", "named"),
    [
        (TOKENS[0], 2, None, r"tokens of shape \(4,\)"),
        (TOKENS, 3, [4, 2, 4], r"length \[4, 2, 4\]"),
        (np.zeros((3, 6), int), 2, [4, 5, 4], r"length \[4, 5, 4\]: .* <= 4, .* the model's positions"),
        (TOKENS + 1, 2, None, "token ids 1 to 12"),
    ],
)
def test_wrong_sequences_are_named(tokens, prompt_length, length, named):
    with pytest.raises(ValueError, match=named):
        checked_sequences(tokens, prompt_length, length, **LIMITS)


def test_tokens_may_be_a_list_or_an_array_of_any_kind():
    for given in (TOKENS.tolist(), jnp.asarray(TOKENS), TOKENS.astype(np.uint16)):
        np.testing.assert_array_equal(checked_sequences(given, 2, None, **LIMITS)[0], TOKENS)


def test_padding_may_go_beyond_the_positions():
    assert checked_sequences(np.zeros((3, 6), int), 2, 4, **LIMITS)[0].shape == (3, 6)


def test_traced_lengths_are_not_checked():
    checked = jax.jit(lambda n: checked_sequences(TOKENS, n, None, **LIMITS)[1])(9)
    assert checked.tolist() == [9, 9, 9]
