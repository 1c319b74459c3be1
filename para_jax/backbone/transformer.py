"""The frozen backbone: one decoder-only Transformer for all families. Families differ by ModelConfig values only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import LayerKind, ModelConfig
from ..sharding import constrain, gathered
from .attention import Attention
from .feedforward import FeedForward
from .kernel_choice import AttentionChoice
from .layers import Identity, RMSNorm, normal, softcap


class Layer(nnx.Module):
    """One Transformer layer; norms before and after its two halves are the identity where the family has none."""

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
        """The residual stream x [batch, length, width] after this layer, and what `attend` kept of keys and values."""
        out, kept = self.attention(self.input_norm(x), adjust, rotary, attend)
        x = x + self.residual_multiplier * self.post_attention_norm(out)
        out = self.feedforward(self.pre_feedforward_norm(x), adjust)
        x = x + self.residual_multiplier * self.post_feedforward_norm(out)
        return constrain(x, ("batch", None, None)), kept


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head. `model.py` runs it: forward, prefill, decode.

    layout "layers": `layers` holds one Layer a layer (for decoding). layout "stacked": `layers` holds, for each
    cut of `periods(config.kinds)`, one Layer a position of its period, whose arrays lead with the
    repeats (for training, where a scan keeps compile time flat in depth).
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
        x = self.embedding[...][tokens] * jnp.asarray(self.config.embedding_multiplier, self.dtype)
        return constrain(x, ("batch", None, None))

    def gathered_head(self) -> Float[Array, "a b"]:
        """The head's weights as `logits` takes them, gathered, so that a loop need not gather them at every turn."""
        head = self.embedding if self.head is None else self.head
        return gathered(head[...], head.axes)

    def logits(self, x: Float[Array, "*rows width"], head: Array | None = None) -> Float[Array, "*rows vocab"]:
        """Logits float32 [..., vocab] of the residual stream after the final norm, x [..., width].

        Args:
            head: of gathered_head; default: the weights as they lie.
        """
        if self.head is None:
            head = self.embedding[...] if head is None else head
            logits = jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)
        else:
            head = self.head[...] if head is None else head
            logits = jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32)
        return softcap(logits / self.config.logits_divisor, self.config.final_softcap)

    def with_layout(self, layout: str) -> Transformer:
        """This model in the other layout, made leaf by leaf; this module and its adapted views are unusable afterwards.

        The peak is the model and one leaf's stack.
        """
        if layout not in ("layers", "stacked"):
            raise ValueError(f"layout: {layout!r} is not possible; expected layers or stacked")
        if layout == self.layout:
            return self
        model = jax.tree.map(lambda x: x, self)
        model.layers = nnx.List(stacked(self) if layout == "stacked" else unstacked(self))
        model.layout = layout
        return model


def norm(config: ModelConfig, present: bool) -> nnx.Module:
    return RMSNorm(config.width, eps=config.norm_eps, offset=config.norm_offset) if present else Identity()


def periods(kinds: tuple[LayerKind, ...]) -> tuple[tuple[int, int, int], ...]:
    """The layers cut into (start, period, repeats): runs in which the kinds of layers repeat with a period.

    Gemma 3 1B (26 layers, every sixth with full attention) gives (0, 6, 4) and (24, 1, 2).
    """
    cuts, start = [], 0
    while start < len(kinds):
        period, repeats = max(
            ((period, repeats_from(kinds, start, period)) for period in range(1, len(kinds) - start + 1)),
            key=lambda found: (found[0] * found[1] if found[0] == 1 or found[1] > 1 else 0, -found[0]),
        )
        cuts.append((start, period, repeats))
        start += period * repeats
    return tuple(cuts)


def repeats_from(kinds: tuple[LayerKind, ...], start: int, period: int) -> int:
    repeats = 1
    while kinds[start : start + period] == kinds[start + repeats * period : start + (repeats + 1) * period]:
        repeats += 1
    return repeats


def stacked(model: Transformer) -> list:
    def stack(layers: list[Layer]) -> Layer:
        columns = zip(*(jax.tree.leaves(layer) for layer in layers), strict=True)
        return jax.tree.unflatten(jax.tree.structure(layers[0]), [moved(jnp.stack, column) for column in columns])

    return [
        nnx.List([stack([model.layers[start + i * period + j] for i in range(repeats)]) for j in range(period)])
        for start, period, repeats in periods(model.config.kinds)
    ]


def unstacked(model: Transformer) -> list[Layer]:
    layers: list = [None] * model.config.num_layers
    groups: Any = model.layers
    for (start, period, repeats), group in zip(periods(model.config.kinds), groups, strict=True):
        for j, layer in enumerate(group):
            treedef = jax.tree.structure(layer)
            columns = [moved(lambda leaf: list(leaf[0]), [leaf]) for leaf in jax.tree.leaves(layer)]
            for i in range(repeats):
                layers[start + i * period + j] = jax.tree.unflatten(treedef, [column[i] for column in columns])
    return layers


def moved(move: Callable, arrays):
    """What `move` makes of the arrays, whose memory is given back before the next leaf is moved; of a model's shapes,
    the shapes."""
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(move, list(arrays))
    made = jax.block_until_ready(move(list(arrays)))
    for array in arrays:
        array.delete()
    return made
