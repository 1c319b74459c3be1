"""A Transformer that is not ours, as far as attach can tell: our layers, called by another driver."""

import jax
import jax.numpy as jnp
from flax import nnx

from para_jax import Transformer
from para_jax.adapters.acting import plain
from para_jax.backbone.kernels import self_attention
from para_jax.backbone.rotary import rotary_tables
from para_jax.config import SITES
from para_jax.foreign import Family, Linear


def by_site() -> tuple[Linear, ...]:
    return tuple(Linear(f"{'attention' if site[0] in 'qkvo' else 'feedforward'}.{site}", (site,)) for site in SITES)


LISTED = Family(by_site(), layers="decoder.layers", cache=None)
SCANNED = Family(by_site(), layers="decoder.layers", stacked=1, cache=None)


class Decoder(nnx.Module):
    def __init__(self, own: Transformer, scanned: bool):
        self.scanned, self.layers = scanned, nnx.List(own.layers)
        if scanned:
            graph, _ = nnx.split(own.layers[0])
            states = [nnx.split(layer)[1] for layer in own.layers]
            self.layers = nnx.merge(graph, jax.tree.map(lambda *a: jnp.stack(a, 1), *states))

    def __call__(self, x, *inputs):
        if not self.scanned:
            for layer in self.layers:
                x = layer(x, *inputs)[0]
            return x
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)  # as MaxText 0.2.5's nnx_decoders.py does it

        def step(x, params):
            return nnx.merge(graph, params, rest)(x, *inputs)[0], None

        return jax.lax.scan(jax.checkpoint(step), x, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), params))[0]


class Foreign(nnx.Module):
    def __init__(self, own: Transformer, scanned: bool = False):
        self.own = own
        self.decoder = Decoder(self.own, scanned)

    def __call__(self, tokens, positions=None):
        config = self.own.config
        tables = rotary_tables(config.kinds[0].rotary, jnp.arange(tokens.shape[1]))
        attend = self_attention(config, self.own.dtype, tokens.shape[1], None, self.own.attention)[None]
        return self.own.logits(
            self.own.final_norm(self.decoder(self.own.embed(jnp.asarray(tokens)), plain, tables, attend))
        )
