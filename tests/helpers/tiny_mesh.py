"""A backbone whose every axis can be divided by eight devices, and the sizes of the batches given to it."""

from functools import cache

from flax import nnx

from para_jax import LayerKind, ModelConfig, RotaryConfig, Transformer

ROWS, LENGTH, COMPLETION = 8, 16, 6
SIZES = {"width": 64, "hidden_width": 128, "num_heads": 8, "num_kv_heads": 8, "head_dim": 8, "vocab_size": 256}
CONFIG = ModelConfig(model_type="llama", kinds=(LayerKind(rotary=RotaryConfig(dims=8)),) * 2, **SIZES)


@cache
def model(layout):
    """The same random weights in both layouts."""
    return Transformer(CONFIG, rngs=nnx.Rngs(0)).with_layout(layout)
