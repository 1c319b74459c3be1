"""Tokens are drawn from the stated distribution, and each row independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.inference.draw import NO_TOKEN, likeliest, row_keys, sample

VOCAB = 10
KEPT = jax.jit(likeliest)
LOGITS = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32) * 2


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seeds=None, position=0):
    batch = len(logits)
    seeds = jnp.arange(batch, dtype=jnp.uint32) if seeds is None else jnp.asarray(seeds, jnp.uint32)
    how = (
        np.broadcast_to(np.asarray(v, d), batch)
        for v, d in ((temperature, np.float32), (top_k, np.int32), (top_p, np.float32))
    )
    tokens = jax.jit(sample)(jnp.asarray(logits), jax.jit(row_keys)(seeds, position), *how)
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


def frequencies(logits, **settings):
    """How often each token is drawn in 20000 rows of the same logits."""
    tokens = draw(np.tile(logits, (20_000, 1)), **settings)
    return np.bincount(tokens, minlength=VOCAB) / len(tokens)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_temperature_zero_is_argmax_and_the_first_of_equals():
    equal = np.zeros((1, VOCAB), np.float32)
    equal[0, [3, 7]] = 1.0
    np.testing.assert_array_equal(draw(LOGITS, temperature=0.0), LOGITS.argmax(-1))
    assert draw(equal, temperature=0.0, top_k=1, top_p=0.1) == [3]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_row_without_a_largest_finite_logit_has_no_token_and_the_others_have_theirs(broken, settings):
    logits = LOGITS.copy()
    logits[2, slice(None) if broken < 0 else 4] = broken
    expected = np.where(np.arange(4) == 2, NO_TOKEN, draw(LOGITS, **settings))
    np.testing.assert_array_equal(draw(logits, **settings), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_at_the_temperature(temperature):
    found = frequencies(LOGITS[0], temperature=temperature)
    np.testing.assert_allclose(found, softmax(LOGITS[0] / temperature), atol=0.015)


def test_top_k_leaves_the_k_likeliest():
    expected = np.where(np.isin(np.arange(VOCAB), np.argsort(-LOGITS[0])[:3]), softmax(LOGITS[0]), 0)
    np.testing.assert_allclose(frequencies(LOGITS[0], top_k=3), expected / expected.sum(), atol=0.015)


def test_top_p_leaves_the_fewest_that_reach_the_probability():
    probabilities = np.array([0.4, 0.05, 0.3, 0.05, 0.2])
    logits = np.log(probabilities).astype(np.float32)
    for top_p, kept in ((1e-50, [0]), (0.35, [0]), (0.65, [0, 2]), (0.75, [0, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        found = np.bincount(draw(np.tile(logits, (2000, 1)), top_p=top_p), minlength=5)
        assert np.flatnonzero(found).tolist() == kept


def test_top_p_counts_the_probabilities_among_the_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)  # among the top two: 4/7, 3/7
    found = np.bincount(draw(np.tile(logits, (500, 1)), top_k=2, top_p=0.5), minlength=4)
    assert found.tolist() == [500, 0, 0, 0]


def test_a_row_draws_the_same_with_any_other_rows():
    settings = {"temperature": [1.5, 0.0, 0.7, 3.0], "top_k": [0, 3, 5, 0], "top_p": [1.0, 0.5, 0.9, 0.8]}
    for position in range(20):
        together = draw(LOGITS, seeds=[5, 6, 7, 8], position=position, **settings)
        for row in range(4):
            own = {name: values[row] for name, values in settings.items()}
            assert draw(LOGITS[row : row + 1], seeds=[5 + row], position=position, **own) == together[row]


def test_seed_and_position_decide_the_draw():
    flat = np.zeros((64, VOCAB), np.float32)
    first = draw(flat)
    np.testing.assert_array_equal(first, draw(flat))
    assert (first != draw(flat, position=1)).mean() > 0.5
    assert (first != draw(flat, seeds=np.arange(64) + 1000)).mean() > 0.5
    assert len(set(first)) == VOCAB


def test_a_tiny_temperature_and_huge_logits_are_greedy():
    np.testing.assert_array_equal(draw(LOGITS * 1e4, temperature=1e-30), LOGITS.argmax(-1))


def by_sorting(distance, top_k, top_p):
    """The definition, in float64: of tokens ranked by likelihood, then by id, those within the k first that begin below
    the probability p."""
    keep = np.zeros(distance.shape, bool)
    for row, (d, k, p) in enumerate(zip(distance.astype(np.float64), top_k, top_p, strict=True)):
        ranked = np.argsort(d, kind="stable")[: k or None]
        probabilities = np.exp(-d[ranked]) / np.exp(-d[ranked]).sum()
        before = np.cumsum(probabilities) - probabilities
        keep[row, ranked[(before < p - 1e-12) | (p >= 1)]] = True
        keep[row, ranked[0]] = True
    return keep


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 2.0]))
def test_top_k_and_top_p_keep_what_sorting_would(seed, step):
    """With a `step`, logits are rounded to its multiples, so that many are equal."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (8, 300)).astype(np.float32)
    logits = np.round(logits / step) * step if step else logits
    distance = (logits.max(-1, keepdims=True) - logits) / rng.choice([0.3, 1.0, 2.0], (8, 1))
    distance = distance.astype(np.float32)
    top_k = rng.choice([0, 1, 2, 40, 299, 300, 10**9], 8).astype(np.int32)
    top_p = rng.choice([1e-7, 0.1, 0.503, 0.9, 0.999, 1.0], 8).astype(np.float32)
    found = np.asarray(KEPT(distance, top_k, top_p))
    np.testing.assert_array_equal(found, by_sorting(distance, top_k, top_p.astype(np.float64)))


def test_what_top_p_keeps_does_not_depend_on_a_top_k_row_nearby():
    """At probabilities that some tokens reach exactly, where the last bit of a sum decides."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        distance = np.abs(np.round(rng.normal(0, 2, (8, 300)), 1)).astype(np.float32)
        distance -= distance.min(axis=-1, keepdims=True)
        shares = np.cumsum(np.sort(np.exp(-distance))[:, ::-1], axis=-1)
        top_p = (shares[:, 100] / shares[:, -1]).astype(np.float32)
        alone, nearby = (np.asarray(KEPT(distance, np.array([0] * 7 + [k], np.int32), top_p)) for k in (0, 5))
        np.testing.assert_array_equal(alone[:7], nearby[:7])
