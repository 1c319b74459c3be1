"""The frozen backbone: one decoder-only Transformer for all families, which differ only in ModelConfig values."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import LayerKind, ModelConfig
from ..runtime.sharding import constrain, gather_fsdp
from .attention import Attention
from .feedforward import FeedForward
from .kernel_choice import AttentionChoice
from .layers import Identity, RMSNorm, normal, scaled, softcap
from .layout import stacked_layers, unstacked_layers


class Layer(nnx.Module):
    """One Transformer layer. Norms that a family lacks are the identity."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.input_norm = norm(config, config.pre_norm)
        self.attention = Attention(config, rngs=rngs)
        self.post_attention_norm = norm(config, config.post_norm)
        self.pre_feedforward_norm = norm(config, config.pre_norm)
        self.feedforward = FeedForward(config, rngs=rngs)
        self.post_feedforward_norm = norm(config, config.post_norm)
        self.residual_multiplier = config.residual_multiplier
        self.kind = kind

    def __call__(
        self, x: Float[Array, "batch length width"], adjust: Callable, rotary: tuple[Array, Array], attend: Callable
    ):
        """The residual stream x [batch, length, width] after this layer, and what `attend` kept."""
        out, kept = self.attention(self.input_norm(x), adjust, rotary, attend)
        x = x + scaled(self.post_attention_norm(out), self.residual_multiplier)
        out = self.feedforward(self.pre_feedforward_norm(x), adjust)
        x = x + scaled(self.post_feedforward_norm(out), self.residual_multiplier)
        return constrain(x, ("batch", None, None)), kept


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head. model/adapted.py runs it: forward, prefill, decode.

    In the layout "layers", `layers` has one Layer per layer. In the layout "stacked" it has stacks of them; see
    layout.py.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs, (config.vocab_size, config.width), 1.0), axes=("vocab", "width"))
        self.layers = nnx.List([Layer(config, kind, rngs=rngs) for kind in config.kinds])
        self.final_norm = norm(config, True)
        head_axes = ("width", "vocab")
        self.head = (
            None
            if config.tied_embeddings
            else nnx.Param(normal(rngs, (config.width, config.vocab_size), config.width**-0.5), axes=head_axes)
        )
        self.config = config
        self.layout = "layers"
        self.attention = AttentionChoice()
        self.fingerprint: str | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return self.embedding.dtype

    def embed(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """Tokens int32 [batch, length] to the residual stream [batch, length, width]."""
        # Gemma's multiplier is rounded to the dtype first, as in transformers.
        x = self.embedding[...][tokens] * jnp.asarray(self.config.embedding_multiplier, self.dtype)
        return constrain(x, ("batch", None, None))

    def gathered_head(self) -> Float[Array, "a b"]:
        """The head's weights, gathered over the mesh once, so that a loop over `logits` need not gather them again."""
        head = self.embedding if self.head is None else self.head
        return gather_fsdp(head[...], head.axes)

    def logits(self, x: Float[Array, "*rows width"], head: Array | None = None) -> Float[Array, "*rows vocab"]:
        """Logits float32 [..., vocab] of the residual stream after the final norm, x [..., width].

        Args:
            head: from gathered_head; default: the weights as they are sharded.
        """
        own, product = (self.embedding, "...d,vd->...v") if self.head is None else (self.head, "...d,dv->...v")
        logits = jnp.einsum(product, x, own[...] if head is None else head, preferred_element_type=jnp.float32)
        return softcap(logits / self.config.logits_divisor, self.config.final_softcap)

    def with_layout(self, layout: str) -> Transformer:
        """This model in another layout. This module and its adapted views are unusable afterwards.

        The arrays move one by one, so the peak is the model and one stacked array.
        """
        if layout == self.layout:
            return self
        model = jax.tree.map(lambda x: x, self)
        change = {"stacked": stacked_layers, "layers": unstacked_layers}[layout]
        model.layers = nnx.List(change(self.layers, self.config.kinds))
        model.layout = layout
        return model


def norm(config: ModelConfig, present: bool) -> nnx.Module:
    return RMSNorm(config.width, eps=config.norm_eps, offset=config.norm_offset) if present else Identity()
