"""The gated feed-forward layer: down(activation(gate(x)) * up(x)) (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from ..config import ModelConfig
from ..runtime.sharding import constrain
from .layers import ACTIVATIONS, Linear


class FeedForward(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        into, out = ("width", "hidden"), ("hidden", "width")
        self.gate_proj = Linear(config.width, config.hidden_width, axes=into, bias=config.mlp_bias, rngs=rngs)
        self.up_proj = Linear(config.width, config.hidden_width, axes=into, bias=config.mlp_bias, rngs=rngs)
        self.down_proj = Linear(config.hidden_width, config.width, axes=out, bias=config.mlp_bias, rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Float[Array, "b t d"], adjust: Callable) -> Float[Array, "b t d"]:
        """x [batch, length, width]; adjust(site, input, output) -> output runs directly after each linear layer."""
        gate = adjust("gate_proj", x, self.gate_proj(x))
        up = adjust("up_proj", x, self.up_proj(x))
        hidden = constrain(self.activation(gate) * up, ("batch", None, "hidden"))
        return adjust("down_proj", hidden, self.down_proj(hidden))
