"""LoRA for many tenants as SkyRL's JAX backend computes it, written as an adapter of para_jax for bench_ragged.py: the
tokens are sorted by adapter, and two ragged products with the stacked matrices of all adapters follow.

Read in github.com/NovaSky-AI/SkyRL: `LoRAMixin.apply_lora` in skyrl/tx/layers/lora.py (commit 84d2cd1929805b55) and
`prepare_routing` in skyrl-tx/tx/layers/util.py (commit 00c4f86258e610cf). The code here is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from para_jax.adapters.adapter import Adjustment, Lazy, Shared
from para_jax.adapters.lora import Lora, LowRank


class RaggedLora(Lora):
    """All adapters of a stack, for a batch in which row i uses adapter index[i]. There is no index of the base model.

    Its adjustment is one for the whole batch, as that of a single LoRA adapter is."""

    def __init__(self, adapters: Any, index: Any):
        """
        Args:
            adapters: a Lora whose arrays lead with (layers, adapters).
        """
        self.a, self.b, self.config, self.backbone = adapters.a, adapters.b, adapters.config, adapters.backbone
        layers = self.backbone.num_layers
        self.index = Lazy(jnp.broadcast_to(jnp.asarray(index, jnp.int32), (layers, len(index))))

    def condition(self, summary: jax.Array) -> Ragged:
        made: LowRank = super().condition(summary)
        return Ragged(made.a, made.b, self.index[...])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged(Adjustment):
    """Adds (x a) b to the outputs of sites, with the a and b of each row's adapter."""

    a: dict[str, Any]
    """[adapters, in, r] by site"""
    b: dict[str, Any]
    """[adapters, r, out] by site"""
    index: Any
    """int32 [rows]: each row's adapter"""

    def adjust(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """y [rows, length, out], adjusted, for x [rows, length, in]."""
        if site not in self.a:
            return y
        a, b = (matrices[site].astype(x.dtype) for matrices in (self.a, self.b))
        adapter = jnp.repeat(self.index, x.shape[1])
        order = jnp.argsort(adapter)
        tokens_each = jnp.bincount(adapter, length=len(a))
        low = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1])[order], a, tokens_each)
        made = jax.lax.ragged_dot(low, b, tokens_each)
        return y + made[jnp.argsort(order)].reshape(y.shape)


def ragged_adjustments(adapters: Any, index: Any, dtype: Any) -> tuple[Shared, ...]:
    """What decode carries: one adjustment per layer for all rows, with the matrices in the compute dtype."""
    ragged = RaggedLora(adapters, index)

    def of_layer(i: int) -> Shared:
        made = jax.tree.map(lambda leaf: leaf[i], ragged).condition(jnp.zeros(1))
        a, b = ({site: m.astype(dtype) for site, m in matrices.items()} for matrices in (made.a, made.b))
        return Shared(Ragged(a, b, made.index))

    return tuple(map(of_layer, range(ragged.backbone.num_layers)))
