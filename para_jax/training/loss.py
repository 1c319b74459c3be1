"""The loss: negative log-likelihood of the completion's tokens, from logits at those positions only."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..adapters.rows import reach_of
from ..adapters.segments import Segments
from ..data.batches import Batch
from ..data.packing import Packed
from ..model.residual import residual_stream
from ..model.tail import PromptStates, tail_stream
from ..runtime.sharding import constrain, shard_sizes
from .tails import cut_batch, cut_packed

# Logits of one chunk on one device, in float32 values: 256 MiB. Larger batches are cut, and each chunk is recomputed in
# the backward pass.
CHUNK = 1 << 26


def completion_nll(
    model,
    adapters,
    batch: Batch | Packed,
    completion: int,
    *,
    prompt: int | None = None,
    states: PromptStates | None = None,
    remat: str = "dots",
) -> tuple[jax.Array, jax.Array]:
    """Each row's summed negative log-likelihood (nats) of its completion and the number of its tokens, float32 [rows].

    A token at t is predicted from t - 1, so the first comes from the last prompt token. Sum and count are separate, so
    that the mean over devices or passes is the total of the sums over the total of the counts.

    Args:
        completion, prompt: the maximum completion tokens and prompt tokens of a row; static. None: a whole row.
        states: of the prompts, padded to `prompt` tokens, where every row's scope is `response`. None: they are
            computed.
        remat: a name of residual.REMAT.
    """
    hidden, targets, real = completion_states(model, adapters, batch, completion, prompt, states, remat)
    nll = token_nll(model, hidden, targets)
    return jnp.where(real, nll, 0).sum(axis=1), real.sum(axis=1).astype(jnp.float32)


def completion_states(
    model,
    adapters,
    batch: Batch | Packed,
    completion: int,
    prompt: int | None,
    states: PromptStates | None,
    remat: str = "dots",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The hidden states after the final norm [rows, C, width] that predict each completion token, these tokens, int32
    [rows, C], and which of them are real, bool [rows, C]. Arguments as in completion_nll.

    Where the scope of all adapters is `response` with one window, the prompts have no backward pass.
    """
    if isinstance(batch, Packed):
        places = Segments(jnp.asarray(batch.segment), jnp.asarray(batch.start))
        predicted, real = batch.predicted, batch.predicted > 0
    else:
        places, predicted = None, batch.prompt_length[:, None] + jnp.arange(completion)
        real = predicted < batch.length[:, None]
    reach = None if adapters is None else reach_of(adapters, len(batch.tokens))
    window = reach and (reach.only_window if states is None else reach.window)
    assert states is None or window, "only scope `response` reads prompts' states"
    if window is None:
        x, _ = residual_stream(model, adapters, batch.tokens, batch.prompt_length, segments=places, remat=remat)
        # At padding the place is arbitrary: `real` leaves it out.
        predicting = jnp.clip(predicted - 1, 0, x.shape[1] - 1)
    else:
        shape = window, prompt or batch.tokens.shape[1], completion
        cut = cut_packed(batch, *shape) if isinstance(batch, Packed) else cut_batch(batch, *shape)
        given = cut.prompts, jnp.asarray(batch.prompt_length), cut.tails
        x, _ = tail_stream(model, adapters, *given, states=states, remat=remat)
        predicting = cut.predicting
    hidden = jnp.take_along_axis(x, predicting[..., None], axis=1)
    targets = jnp.take_along_axis(batch.tokens, jnp.minimum(predicted, batch.tokens.shape[1] - 1), axis=1)
    return model.final_norm(hidden), targets, jnp.asarray(real)


def token_nll(model, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), float32 [rows, C], from hidden states after the final norm [rows, C, width]."""
    return of_logits(negative_log_likelihood, model, hidden, targets)


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p of targets [...] under logits [..., vocab], nats."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def token_scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """negative_log_likelihood, and whether the targets are the most likely tokens, bool [...]; False for NaN."""
    nats = negative_log_likelihood(logits, targets)
    return nats, (jnp.argmax(logits, axis=-1) == targets) & jnp.isfinite(nats)


def of_logits(of: Callable, model, hidden: jax.Array, targets: jax.Array):
    """of(logits, targets), arrays [rows, C, ...], from hidden states after the final norm [rows, C, width], made in
    chunks of CHUNK logits per device."""

    head = model.gathered_head()

    def at(hidden_and_targets):
        hidden, targets = hidden_and_targets
        hidden = constrain(hidden, ("batch", None, None))
        return of(constrain(model.logits(hidden, head), ("batch", None, "vocab")), targets)

    rows, positions = targets.shape
    rows_held, vocab_held = shard_sizes(("batch", "vocab"), (rows, model.config.vocab_size))
    chunk = max(1, CHUNK // (rows_held * vocab_held))
    if positions <= chunk:
        return at((hidden, targets))
    cut = [jnp.pad(a, ((0, 0), (0, -positions % chunk), *[(0, 0)] * (a.ndim - 2))) for a in (hidden, targets)]
    cut = [a.reshape(rows, -1, chunk, *a.shape[2:]).swapaxes(0, 1) for a in cut]
    found = jax.lax.map(jax.checkpoint(at), tuple(cut))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(rows, -1, *a.shape[3:])[:, :positions], found)
