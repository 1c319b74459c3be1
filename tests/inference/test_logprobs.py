"""Log-probabilities are those of log_softmax, and the alternatives come in their order."""

import jax
import jax.numpy as jnp
import numpy as np

from para_jax.inference.logprobs import TokenLogprob, logprobs_of


def test_they_are_log_softmax_in_float32_whatever_the_dtype():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(0, 5, (2, 3, 40)), jnp.bfloat16)
    tokens = jnp.asarray(draw.integers(0, 40, (2, 3)))
    reference = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
    found = logprobs_of(logits, tokens, 5)
    own = np.take_along_axis(reference, np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.of_token, own, atol=1e-5)
    np.testing.assert_allclose(found.of_top, np.sort(reference)[..., ::-1][..., :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(reference, np.asarray(found.top_ids), -1), found.of_top, atol=1e-5)


def test_records_have_as_many_alternatives_as_asked_and_equal_ones_come_by_id():
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found = jax.tree.map(np.asarray, logprobs_of(logits, jnp.array([2, 2]), 3))
    two, none = found.records([2, 2], 2), found.records([2, 2], 0)
    assert [[id for id, _ in record.top] for record in two] == [[1, 0], [2, 0]]
    np.testing.assert_allclose([record.logprob for record in two], np.log([0.25, 0.8]), rtol=1e-6)
    np.testing.assert_allclose([value for _, value in two[1].top], np.log([0.8, 0.1]), rtol=1e-6)
    assert none == [TokenLogprob(2, record.logprob, []) for record in two]
    assert all(type(id) is int and type(value) is float for record in two for id, value in record.top)
