"""One layer of the Transformer."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from golden_models import FIXTURES

from para_jax import load_model_config
from para_jax.backbone.transformer import Layer


def test_a_residual_multiplier_is_not_rounded_in_bfloat16():
    """As in PyTorch. bfloat16 has 0.2197 for 0.22, which would make the whole stream smaller in every layer."""
    config = replace(load_model_config(FIXTURES / "granite"), residual_multiplier=0.22)
    layer = Layer(config, config.kinds[0], rngs=nnx.Rngs(0))
    branch = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, config.width)), jnp.bfloat16)

    def adjust(site, x, y):
        return {"o_proj": branch, "down_proj": jnp.zeros_like(branch)}.get(site, y)

    cos = jnp.ones((64, config.head_dim // 2))
    out, _ = layer(jnp.zeros_like(branch), adjust, (cos, 0 * cos), lambda q, k, v, scale, cap: (q, None))
    sums = np.abs(np.asarray(out, np.float64)).sum() / np.abs(np.asarray(branch, np.float64)).sum()
    np.testing.assert_allclose(sums, 0.22, rtol=2e-4)
