"""The mean and spread of prompt summaries, which a standardised adapter (adapter.summary=standardised) subtracts and
divides by. They are measured once, before training."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..adapters.adapter import Adapter
from ..data.batches import Batch, Bucket, collate, epoch_bits, permutation
from ..data.examples import Example
from ..model.residual import residual_stream

STATISTICS_EXAMPLES = 64


def standardise(model, adapter: Adapter, batches: list[Batch], count: int) -> Adapter:
    """The adapter with the statistics of training prompts: the first `count` rows of the batches. The other rows only
    fill the last batch."""
    summaries = jnp.concatenate([prompt_summaries(model, batch, adapter) for batch in batches], axis=1)[:, :count]
    return adapter.with_statistics(summaries)


@jax.jit
def prompt_summaries(model, batch: Batch, adapter: Adapter) -> jax.Array:
    """The summaries that an adapter's pooler takes from the backbone alone, float32 [layers, rows, width]."""
    pool = jax.vmap(lambda x, length: adapter.pool(x, length))
    _, summaries = residual_stream(
        model, None, batch.tokens, batch.prompt_length, keep=lambda x, kept, adjustment: pool(x, batch.prompt_length)
    )
    return jnp.stack(summaries).astype(jnp.float32)


def statistics_batches(examples: Sequence[Example], bucket: Bucket, rows: int, seed: int) -> tuple[list[Batch], int]:
    """Batches of STATISTICS_EXAMPLES training prompts (or of all, if there are fewer), and how many prompts these are.
    They are drawn by the seed from the whole file, because a file may be sorted. The rows after them are padding."""
    drawn = permutation(epoch_bits(seed), len(examples))[:STATISTICS_EXAMPLES].tolist()
    prompts = [examples[i]._replace(completion_ids=[]) for i in drawn]
    cut = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    return [collate(part, bucket, rows) for part in cut], len(prompts)
