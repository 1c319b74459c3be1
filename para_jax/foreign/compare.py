"""Whether a Transformer that is not ours computes the same function as our backbone with the same weights."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..backbone.transformer import Transformer
from ..model.adapted import forward
from .family import Family, family_of


def compare_backbones(foreign: nnx.Module, ours: Transformer, tokens: Any, *, family: Family | None = None) -> float:
    """The largest difference of any logit, relative to the root mean square of ours. Adapters are left out. In float32
    about 1e-5 means the same function, in bfloat16 a few percent.

    Args:
        tokens: int [batch, T], without padding. Several windows of a model with sliding attention tell more.

    >>> compare_backbones(their_model, model, tokens, family=family) < 1e-4
    True
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    own = forward(ours, None, tokens, None)
    gap = jnp.abs(foreign_logits(foreign, tokens, family or family_of(foreign)) - own).max()
    return float(gap / jnp.sqrt(jnp.mean(own**2)))


def foreign_logits(model: nnx.Module, tokens: jax.Array, family: Family) -> jax.Array:
    """Logits float32 [batch, T, vocab] of whole rows, without adapters."""
    rows, length = tokens.shape
    call = getattr(type(model), "para_base", type(model)).__call__
    known = {
        family.positions: jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "cache": None,
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length)),
        "decoder_segment_ids": jnp.ones_like(tokens),
        "enable_dropout": False,
    }
    names = inspect.signature(call).parameters
    result = nnx.jit(lambda model: call(model, tokens, **{n: known[n] for n in known if n in names}))(model)
    return (result[0] if isinstance(result, tuple) else result).astype(jnp.float32)
