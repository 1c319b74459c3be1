"""SmolLM2 as a model of Tunix: its Qwen 2 with biases of zero is the same function as a Llama."""

import jax.numpy as jnp
from flax import nnx
from tunix.models.qwen2 import model as qwen2


def in_tunix(own) -> nnx.Module:
    """Tunix's Qwen 2 with the weights of a Llama of ours."""
    c = own.config
    config = qwen2.ModelConfig(
        num_layers=c.num_layers, vocab_size=c.vocab_size, embed_dim=c.width, hidden_dim=c.hidden_width,
        num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, norm_eps=c.norm_eps,
        rope_theta=int(c.kinds[0].rotary.theta), use_tied_embedding=True,
    )  # fmt: skip
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))

    def put(variable, value):
        variable.set_value(jnp.asarray(value[...], jnp.float32).reshape(variable.get_value().shape))

    put(model.embedder.input_embedding, own.embedding)
    put(model.final_norm.w, own.final_norm.weight)
    for theirs, ours in zip(model.layers, own.layers, strict=True):
        put(theirs.input_layernorm.w, ours.input_norm.weight)
        put(theirs.post_attention_layernorm.w, ours.pre_feedforward_norm.weight)
        for name in "qkvo":
            put(getattr(theirs.attn, f"{name}_proj").w, getattr(ours.attention, f"{name}_proj").kernel)
        for name in "qkv":
            put(getattr(theirs.attn, f"{name}_bias"), jnp.zeros_like(getattr(theirs.attn, f"{name}_bias")[...]))
        for name in ("gate", "up", "down"):
            put(getattr(theirs.mlp, f"{name}_proj").kernel, getattr(ours.feedforward, f"{name}_proj").kernel)
    return model
