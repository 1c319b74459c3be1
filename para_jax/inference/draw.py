"""The next token of each row from its logits: greedy, or drawn at a temperature from the top-k, top-p tokens.

Every row has its own settings and its own random key, so its draw does not depend on the other rows. Nothing is sorted:
bisection over the 2**31 possible float32 values finds the least likely token that top-k or top-p keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime.sharding import constrain
from .sampling import GREEDY, Sampling

#: Rows that are sampled at once. More of them fill an accelerator; fewer waste less on greedy rows.
TOGETHER = {"cpu": 2}
TOGETHER_ELSEWHERE = 8
#: What a row has in place of a token if its largest logit is NaN or infinite.
NO_TOKEN = -1
#: The error of such a row.
NO_TOKEN_MESSAGE = "the model's logits are not finite: its adapter or its precision overflows"


class RowSampling(NamedTuple):
    """Settings of a batch, one entry per row."""

    seeds: jax.Array | np.ndarray
    """uint32 [batch]"""
    temperature: jax.Array | np.ndarray
    """float32 [batch]"""
    top_k: jax.Array | np.ndarray
    """int32 [batch]"""
    top_p: jax.Array | np.ndarray
    """float32 [batch]"""


def row_sampling(rows: Sequence[Sampling | None]) -> RowSampling:
    """The settings of a batch. A row of None is greedy: an empty row costs no sampling."""
    held = [row or GREEDY for row in rows]
    return RowSampling(
        np.array([row.seed for row in held]).astype(np.uint32),
        np.array([row.temperature for row in held], np.float32),
        np.array([row.top_k for row in held], np.int32),
        np.array([row.top_p for row in held], np.float32),
    )


def row_keys(seeds, position) -> jax.Array:
    """Each row's key for the token at `position` (int or [batch]; 0: the first new one), of seeds uint32 [batch]."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), jnp.broadcast_to(position, seeds.shape))


def sample(logits: jax.Array, keys: jax.Array, temperature, top_k, top_p) -> jax.Array:
    """One token per row, int32 [batch], from logits float32 [batch, vocab]; NO_TOKEN where the largest is not finite.
    Greedy rows cost no sampling.

    Args:
        keys: a random key per row, [batch] (row_keys).
        temperature: [batch]; 0 is greedy: the first of the largest logits.
        top_k: [batch]; only the k likeliest tokens can be drawn; 0: all of them.
        top_p: [batch]; only the likeliest tokens that together reach this probability can be drawn; 1: all of them.
            Its probabilities are those at the temperature, among the top k.
    """
    temperature, top_k, top_p = map(jnp.asarray, (temperature, top_k, top_p))
    together = min(TOGETHER.get(jax.default_backend(), TOGETHER_ELSEWHERE), len(logits))
    sampled = temperature > 0
    first_sampled = jnp.argsort(~sampled, stable=True)

    def block(i, tokens):
        rows = jax.lax.dynamic_slice_in_dim(first_sampled, i * together, together)
        drawn = draw(logits[rows], keys[rows], temperature[rows], top_k[rows], top_p[rows])
        return tokens.at[rows].set(jnp.where(sampled[rows], drawn, tokens[rows]))

    return jax.lax.fori_loop(0, -(-jnp.sum(sampled) // together), block, greedy(logits))


def draw(logits: jax.Array, keys: jax.Array, temperature, top_k, top_p) -> jax.Array:
    """A drawn token per row, int32 [batch]; arguments as in `sample`, every temperature above 0."""
    logits = constrain(logits, ("batch", None))  # once: each bisection below would communicate 31 times
    most = logits.max(axis=-1)
    distance = (most[:, None] - logits) / jnp.where(temperature > 0, temperature, 1)[:, None]
    filtered = jnp.any((top_k > 0) | (top_p < 1))
    keep = jax.lax.cond(filtered, likeliest, lambda distance, *_: jnp.ones_like(distance, bool), distance, top_k, top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, -distance, -jnp.inf)).astype(jnp.int32)
    return jnp.where(jnp.isfinite(most), drawn, NO_TOKEN)


def only_allowed(logits: jax.Array, allowed) -> jax.Array:
    """Logits [batch, vocab], -inf for the tokens whose bit in `allowed`, int32 [batch, words], is 0. None: all of them
    are allowed."""
    if allowed is None:
        return logits
    bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
    return jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def greedy(logits: jax.Array) -> jax.Array:
    """The first of each row's largest logits, int32 [batch], or NO_TOKEN. On a CPU, two plain reductions are several
    times faster than an argmax."""
    vocab, most = logits.shape[-1], logits.max(axis=-1)
    largest = logits == most[:, None]
    first = jnp.min(jnp.where(largest, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)
    return jnp.where(jnp.isfinite(most), first, NO_TOKEN)


def likeliest(distance: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens top_k and top_p keep, bool [batch, vocab]; of equally likely tokens the lower ids come first.

    Args:
        distance: float32 [batch, vocab], how far each scaled logit is below its row's largest, at least 0.
    """
    weight = jnp.exp(-distance)  # the probability, times a constant of the row
    most = jnp.where(top_k > 0, jnp.minimum(top_k, distance.shape[-1]), distance.shape[-1])
    last = jax.lax.cond(
        jnp.any(top_k > 0),
        lambda: least_bound(distance, lambda inside: jnp.sum(inside, axis=-1) >= most),
        lambda: jnp.full_like(distance[:, 0], jnp.inf),
    )
    last = jnp.where(top_k > 0, last, jnp.inf)  # else the sum below would be rounded differently next to a top-k row
    closer = distance < last[:, None]
    above = jnp.sum(jnp.where(closer, weight, 0), axis=-1)
    reached = top_p * jnp.where(jnp.isinf(last), above, above + (most - jnp.sum(closer, axis=-1)) * jnp.exp(-last))
    by_probability = jax.lax.cond(
        jnp.any(top_p < 1),
        lambda: least_bound(distance, lambda inside: jnp.sum(jnp.where(inside, weight, 0), axis=-1) >= reached),
        lambda: jnp.full_like(last, jnp.inf),
    )
    last = jnp.minimum(last, jnp.where(top_p < 1, by_probability, jnp.inf))
    closer, equal = distance < last[:, None], distance == last[:, None]
    missing = (reached - jnp.sum(jnp.where(closer, weight, 0), axis=-1)) / jnp.exp(-last)
    room = most - jnp.sum(closer, axis=-1)
    room = jnp.where(top_p < 1, jnp.minimum(room, jnp.maximum(jnp.ceil(missing), 1)), room)
    tied = jnp.any(jnp.sum(equal, axis=-1) > room)
    within = jax.lax.cond(tied, lambda: jnp.cumsum(equal, axis=-1) <= room[:, None], lambda: jnp.ones_like(equal))
    return closer | (equal & within)


def least_bound(distance: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest distance per row, float32 [batch], such that the tokens up to it are `enough` (bool [batch, vocab]
    to bool [batch]); infinite where they never are. Floats of at least 0 have the order of their bits."""
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)
    infinite = int(np.float32(np.inf).view(np.int32))

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        reached = enough(bits <= middle[:, None])
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    start = jnp.zeros(len(bits), jnp.int32), jnp.full(len(bits), infinite, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, start)[1], jnp.float32)
