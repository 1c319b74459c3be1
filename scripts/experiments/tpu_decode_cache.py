"""Counts what a decode step reads on a TPU, by the TPU's compiler, without a TPU: two layers of LLaMA-2 7B, 8 rows, a
cache of 4096 tokens on one v5e.

    pip install '.[aot]'
    python scripts/experiments/tpu_decode_cache.py
    python scripts/experiments/tpu_decode_cache.py --layouts [--chips 4]

The compiler counts the body of a loop once, that is, one block of the cache in each layer. The script adds the bytes of
the further blocks that longer rows need, and counts the cache's part by the shapes in the compiled text.

--layouts prints what the step of each layout reads, writes and needs in addition to its arguments, for 2 and for 4
layers, on one chip or with fsdp over 4. "stacked" is the step of evaluation, whose caches stay stacked; its loop over
layers is counted once too. "stacked, a cache per layer" is that of the public decode.
"""

import argparse
import os
from dataclasses import replace

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from program_counts import describe_program

from para_jax import load_model_config, make_mesh, prefill
from para_jax.backbone.cache_blocks import block_size
from para_jax.backbone.load import abstract_backbone
from para_jax.estimate.topology import topology_devices
from para_jax.model.adapted import decode_step, stacked_state

SOURCE = "meta-llama/Llama-2-7b-hf"
ROWS, LENGTH, LAYERS = 8, 4096, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--chips", type=int, default=1, choices=(1, 4))
    args = parser.parse_args()
    if args.layouts:
        return compare_layouts(args.chips)
    config = load_model_config(SOURCE)
    compiled = compile_step("layers", LAYERS)
    size = block_size(LENGTH)
    shape = f"bf16[{ROWS},{config.num_kv_heads},{size},{config.head_dim}]"
    blocks = sum(f"= {shape}" in line and " dynamic-slice(" in line for line in compiled.as_text().splitlines())
    a_block = ROWS * config.num_kv_heads * size * config.head_dim * 2
    print(f"bytes accessed, one block per layer: {compiled.cost_analysis()['bytes accessed'] / 1e9:.3f} GB")
    for tokens in (512, 1024, 2048, 4096):
        print(f"longest row {tokens} tokens: {blocks * a_block * (tokens // size) / 1e9:.3f} GB of the cache")


def compare_layouts(chips: int):
    for layers in (2, 4):
        for name, of in (("layers", ()), ("stacked, a cache per layer", ()), ("stacked", (stacked_state,))):
            program = describe_program(compile_step(name.split(",")[0], layers, *of, chips=chips))
            sizes = f"{program.bytes_accessed / 1e9:.3f} GB accessed, {program.temporaries / 1e9:.3f} GB of temporaries"
            print(f"{layers} layers, {name}: {sizes}")


def compile_step(layout: str, layers: int, *of, chips: int = 1):
    """The compiled decode step of a prefill's state, or of of(state)."""
    config = load_model_config(SOURCE)
    config = replace(config, kinds=config.kinds[:layers])
    mesh = make_mesh(fsdp=chips, devices=topology_devices({1: "v5e:1x1", 4: "v5e:2x2"}[chips], chips))
    model = abstract_backbone(config, jnp.bfloat16, mesh, layout=layout)
    prompt = jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
    state = jax.eval_shape(lambda model, prompt: prefill(model, None, prompt, 16, max_length=LENGTH)[1], model, prompt)
    for change in of:
        state = jax.eval_shape(change, state)

    def by_rows(leaf):  # a stack leads with the layers
        spec = (None, "fsdp") if leaf.ndim == 5 else ("fsdp",)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    tokens = by_rows(jax.ShapeDtypeStruct((ROWS,), jnp.int32))
    with jax.set_mesh(mesh):
        return jax.jit(decode_step, donate_argnums=1).lower(model, jax.tree.map(by_rows, state), tokens).compile()


if __name__ == "__main__":
    main()
