"""The states of prompts in the plain backbone, one prompt after another as bytes: what train.cache_prompts keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter, token_at
from ..backbone.layout import stack_trees
from ..config import ModelConfig
from ..data.batches import full_batches, plan_buckets
from ..data.example_arrays import ExampleArrays
from ..model import init_adapter
from ..residual import residual_stream
from ..sharding import shard_rows
from ..tail import PromptStates

#: The maximum number of padded lengths that are compiled.
BUCKETS = 4
#: The prompts that tell poolers apart, in tokens. Some poolers may differ for long prompts alone.
PROBES = (*range(1, 9), *(2**i for i in range(4, 11)))


class StatesFormat(NamedTuple):
    """The form of one prompt's states as bytes: keys and values [layers, kv_heads, tokens, head_dim], then summaries
    [layers, width]."""

    layers: int
    kv_heads: int
    head_dim: int
    width: int
    dtype: str
    summary_dtype: str
    """that of what the adapter's `pool` gives"""

    def size(self, tokens: Any) -> Any:
        """Bytes of a prompt with this number of tokens, which may be an array."""
        of_token = 2 * self.layers * self.kv_heads * self.head_dim * np.dtype(self.dtype).itemsize
        return of_token * tokens + self.summary_size

    @property
    def summary_size(self) -> int:
        return self.layers * self.width * np.dtype(self.summary_dtype).itemsize

    def read(self, data: np.ndarray, tokens: int) -> PromptStates:
        """The states in these bytes, without a copy."""
        shape, half = (self.layers, self.kv_heads, tokens, self.head_dim), (len(data) - self.summary_size) // 2
        keys, values = (part.view(self.dtype).reshape(shape) for part in (data[:half], data[half : 2 * half]))
        summaries = data[2 * half :].view(self.summary_dtype).reshape(self.layers, self.width)
        return PromptStates(keys, values, summaries)  # pyright: ignore[reportArgumentType]


def states_format_of(model, pooler: Adapter) -> StatesFormat:
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    keys, _, summaries, _ = jax.eval_shape(prompt_states, model, pooler, int32(1, 1), int32(1))
    layers, _, kv_heads, _, head_dim = keys.shape
    return StatesFormat(layers, kv_heads, head_dim, summaries.shape[2], str(keys.dtype), str(summaries.dtype))


def computed(model, pooler: Adapter, prompts: ExampleArrays, rows: int) -> Iterator[tuple[int, bytes]]:
    """The records of the prompts, in order: those of a batch, and how many. The bits of a prompt may depend on the
    others in its batch, so they are a function of all prompts, `rows` and the current mesh.

    Args:
        prompts: sorted by length.
        rows: of a batch, over all devices.
    """
    assert (np.diff(prompts.lengths) >= 0).all()
    for chosen, batch in full_batches(prompts, rows, plan_buckets(prompts, BUCKETS)):
        tokens, lengths = (shard_rows(a, ("batch",)) for a in (batch.tokens, batch.prompt_length))
        keys, values, summaries, _ = jax.device_get(prompt_states(model, pooler, tokens, lengths))
        parts = []
        for i, length in enumerate(prompts.lengths[chosen].tolist()):
            parts += [keys[:, i, :, :length], values[:, i, :, :length], summaries[:, i]]
        yield len(chosen), b"".join(part.tobytes() for part in parts)


@jax.jit
def prompt_states(model, pooler: Adapter | None, tokens, prompt_length) -> PromptStates:
    """The states of the prompts in tokens int32 [rows, T], padded on the right, with the summaries that the pooler's
    `pool` gives; None: the last token's stream."""
    pool = jax.vmap(lambda x, length: token_at(x, length - 1) if pooler is None else pooler.pool(x, length))
    keep = lambda x, kept, adjustment: PromptStates(kept[0], kept[1], pool(x, prompt_length))  # noqa: E731
    return stack_trees(residual_stream(model, None, tokens, prompt_length, keep=keep)[1])


# ------------------------------------------------------------------------------------------------------------- poolers


def pooler_of(config: Any, model_config: ModelConfig) -> Adapter:
    """One layer of an adapter, for its `pool` alone: NaN takes the place of its weights.

    Raises ValueError for a method whose summaries can't be kept: they depend on its weights, or pooling one again, as
    `tails_after` does, changes it.
    """
    fresh = init_adapter(config, model_config)
    pooler = jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], jnp.nan, leaf.dtype), fresh)
    pooled = probed(pooler)
    again = jax.vmap(lambda summary: pooler.pool(summary[None], jnp.int32(1)))(pooled)
    if not np.array_equal(pooled, again):  # NaN equals nothing
        raise ValueError(
            f"train.cache_prompts: the summaries of {type(fresh).__name__} can't be kept, because its pool reads "
            "weights, or changes the state of a prompt of one token; use train.cache_prompts=off"
        )
    return pooler


def probed(pooler: Adapter) -> jax.Array:
    """What `pool` makes of a fixed stream, for prompts of PROBES tokens."""
    stream = np.random.default_rng(0).normal(size=(max(PROBES), pooler.backbone.width)).astype(np.float32)
    return jax.lax.map(lambda length: pooler.pool(jnp.asarray(stream), length), jnp.array(PROBES))


def pooler_digest(pooler: Adapter) -> str:
    """Equal for adapters that pool prompts to the same summaries, whatever their method."""
    return hashlib.sha256(np.asarray(probed(pooler)).tobytes()).hexdigest()
