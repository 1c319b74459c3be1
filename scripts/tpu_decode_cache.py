"""What a decode step reads on a TPU, by its own compiler, without a TPU: two layers of LLaMA-2 7B, 8 rows, a cache of
4096 tokens on one v5e.

    pip install -e '.[aot]'
    python scripts/tpu_decode_cache.py

The compiler counts the body of a loop once, that is one block of the cache in each layer. The script adds the bytes of
the further blocks that longer rows need, and counts the cache's part by the shapes in the compiled text.
"""

import os
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from para_jax import load_model_config, make_mesh, prefill
from para_jax.backbone.cache_blocks import block_size
from para_jax.backbone.load import abstract_backbone
from para_jax.model import decode_step
from para_jax.topology import topology_devices

ROWS, LENGTH, LAYERS = 8, 4096, 2


def main():
    config = load_model_config("meta-llama/Llama-2-7b-hf")
    config = replace(config, kinds=config.kinds[:LAYERS])
    mesh = make_mesh(devices=topology_devices("v5e:1x1", 1))
    model = abstract_backbone(config, jnp.bfloat16, mesh, layout="layers")
    prompt = jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    state = jax.eval_shape(lambda model, prompt: prefill(model, None, prompt, 16, max_length=LENGTH)[1], model, prompt)
    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state)
    tokens = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        compiled = jax.jit(decode_step, donate_argnums=1).lower(model, state, tokens).compile()
    size = block_size(LENGTH)
    shape = f"bf16[{ROWS},{config.num_kv_heads},{size},{config.head_dim}]"
    blocks = sum(f"= {shape}" in line and " dynamic-slice(" in line for line in compiled.as_text().splitlines())
    a_block = ROWS * config.num_kv_heads * size * config.head_dim * 2
    print(f"bytes accessed, one block a layer: {compiled.cost_analysis()['bytes accessed'] / 1e9:.3f} GB")
    for tokens in (512, 1024, 2048, 4096):
        print(f"longest row {tokens} tokens: {blocks * a_block * (tokens // size) / 1e9:.3f} GB of the cache")


if __name__ == "__main__":
    main()
