"""The mean and spread of prompt summaries, which a standardised adapter (adapter.summary=standardised) subtracts and
divides by. They are measured once, before training."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter, layers_of
from ..data.batches import Batch, Bucket, collate, epoch_bits, permutation
from ..data.examples import Example
from ..model import residual_stream

STATISTICS_EXAMPLES = 64


def standardise(model, adapter: Adapter, batches: list[Batch], count: int) -> Adapter:
    """The adapter with the mean of some training prompts' summaries, and the spread around it [our choice]. The first
    `count` rows of the batches count; the others only fill the last batch.

    One mean [width] and one scale [1] per layer, measured on the backbone before training and never trained. A layer
    whose summaries differ by rounding alone (prompts that end in the same token have one embedding) has scale 1.
    """
    summaries = jnp.concatenate([prompt_summaries(model, batch, adapter) for batch in batches], axis=1)[:, :count]
    mean = summaries.mean(axis=1)
    spread = jnp.sqrt(jnp.mean((summaries - mean[:, None]) ** 2, axis=(1, 2)))[:, None]
    filled = jax.tree.map(lambda leaf: leaf, adapter)
    size = jnp.sqrt(jnp.mean(mean**2, axis=1))[:, None]
    layers = np.array(layers_of(adapter.config, len(mean)))
    filled.mean[...] = mean[layers]
    filled.scale[...] = jnp.where(spread > 1e-5 * size, spread, 1.0)[layers]
    return filled


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
