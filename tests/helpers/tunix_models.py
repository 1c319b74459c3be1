"""Tiny random models of Tunix, and our own Transformer with the same weights."""

import importlib
from itertools import cycle, islice

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from para_jax import LayerKind, ModelConfig, RotaryConfig, Transformer

WIDTH, HIDDEN, HEADS, KV, HEAD, VOCAB, LAYERS = 64, 96, 4, 2, 16, 128, 3
#: A name here to Tunix's module and class.
KINDS = {
    "llama3": ("llama3", "Llama3"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "gemma_mqa": ("gemma", "Gemma"),
    "gemma_mha": ("gemma", "Gemma"),
    "gemma2": ("gemma", "Gemma"),
    "gemma3": ("gemma3", "Gemma3"),
    "gemma4": ("gemma4", "Gemma4"),
}


def tunix_model(name: str, remat: str = "NONE", **changes) -> nnx.Module:
    module, kind = KINDS[name]
    m = importlib.import_module(f"tunix.models.{module}.model")
    shape = dict(num_layers=LAYERS, embed_dim=WIDTH, hidden_dim=HIDDEN, num_heads=HEADS, head_dim=HEAD)
    shape |= dict(num_kv_heads={"gemma_mqa": 1, "gemma_mha": HEADS}.get(name, KV), remat_config=m.RematConfig[remat])
    if module in ("llama3", "qwen2", "qwen3"):
        tied = {"weight_tying" if module == "llama3" else "use_tied_embedding": name == "qwen2"}
        own = dict(vocab_size=VOCAB, rope_theta=1_000_000, norm_eps=1e-6, **tied)
    elif module == "gemma":
        local, everywhere = m.AttentionType.LOCAL_SLIDING, m.AttentionType.GLOBAL
        own = dict(num_embed=VOCAB, use_post_attn_norm=False, use_post_ffw_norm=False)
        own |= dict(final_logit_softcap=None, attn_logits_soft_cap=None, attention_types=(everywhere,) * LAYERS)
        own |= dict(sliding_window_size=None)
        if name == "gemma2":
            own |= dict(use_post_attn_norm=True, use_post_ffw_norm=True, sliding_window_size=5)
            own |= dict(final_logit_softcap=30.0, attn_logits_soft_cap=50.0)
            own |= dict(attention_types=tuple(islice(cycle((local, everywhere)), LAYERS)))
    else:
        own = dict(num_embed=VOCAB, sliding_window_size=5, param_dtype=jnp.float32)
        own |= dict(global_key_size=HEAD) if name == "gemma4" else {}
    model = getattr(m, kind)(m.ModelConfig(**shape | own | changes), rngs=nnx.Rngs(0))
    # Its feed-forward kernels start from zero: give every weight a size at which layers matter.
    for i, v in enumerate(variables(nnx.state(model, nnx.Param))):
        draw = np.random.default_rng(i).standard_normal(v.get_value().shape).astype(np.float32)
        v.set_value(jnp.asarray(1 + 0.1 * draw if draw.ndim == 1 else draw * 0.12))
    return model


def variables(tree) -> list[nnx.Variable]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def own_config(model, name: str) -> ModelConfig:
    """All that the model's function depends on."""
    c, module = model.config, KINDS[name][0]
    shape = dict(width=c.embed_dim, hidden_width=c.hidden_dim, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads)
    shape |= dict(head_dim=c.head_dim, attention_scale=c.head_dim**-0.5, norm_eps=1e-6, vocab_size=VOCAB)

    def kinds(thetas, windows):
        each = zip(thetas, windows, strict=True)
        return tuple(LayerKind(rotary=RotaryConfig(dims=c.head_dim, theta=float(t)), window=w) for t, w in each)

    if module in ("llama3", "qwen2", "qwen3"):
        own = dict(model_type={"llama3": "llama"}.get(module, module), kinds=kinds([1e6] * LAYERS, [None] * LAYERS))
        own |= dict(tied_embeddings=name == "qwen2", qkv_bias=name == "qwen2")
        return ModelConfig(**shape | own, qk_norm="head" if name == "qwen3" else "none")
    local = [layer.attn.attn_type.name == "LOCAL_SLIDING" for layer in model.layers]
    windows = [c.sliding_window_size if one else None for one in local]
    own = dict(activation="gelu_tanh", norm_offset=1.0, tied_embeddings=True, embedding_multiplier=c.embed_dim**0.5)
    if module == "gemma":
        own |= dict(model_type="gemma2" if name == "gemma2" else "gemma", post_norm=name == "gemma2")
        own |= dict(attention_softcap=c.attn_logits_soft_cap, final_softcap=c.final_logit_softcap)
        return ModelConfig(**shape | own, kinds=kinds([1e4] * LAYERS, windows))
    thetas = [c.local_base_frequency if one else c.global_base_frequency for one in local]
    return ModelConfig(
        **shape | own, model_type="gemma3_text", post_norm=True, qk_norm="head", kinds=kinds(thetas, windows)
    )


def own_model(model, name: str) -> Transformer:
    """Our Transformer with the weights of a Tunix model."""
    config = own_config(model, name)
    own, d = Transformer(config, rngs=nnx.Rngs(0)), config.width
    gemma = "gemma" in name
    scale = (lambda norm: norm.scale[...]) if gemma else (lambda norm: norm.w[...])
    put(own.embedding, model.embedder.input_embedding[...])
    put(own.final_norm.weight, scale(model.final_norm))
    if own.head is not None:
        put(own.head, model.lm_head.w[...])
    for theirs, ours in zip(model.layers, own.layers, strict=True):
        a, attention = theirs.attn, ours.attention
        if gemma:
            put(ours.input_norm.weight, scale(theirs.pre_attention_norm))
            put(ours.pre_feedforward_norm.weight, scale(theirs.pre_ffw_norm))
            if config.post_norm:
                post = getattr(theirs, "post_attn_norm", None) or theirs.post_attention_norm
                put(ours.post_attention_norm.weight, scale(post))
                put(ours.post_feedforward_norm.weight, scale(theirs.post_ffw_norm))
            if a.use_qkv_einsum:
                q, k, v = (columns(w) for w in a.qkv_einsum.w[...])
            else:
                q, (k, v) = columns(a.q_einsum.w[...]), (columns(w) for w in a.kv_einsum.w[...])
            o, norms = a.attn_vec_einsum.w[...].reshape(-1, d), ("_query_norm", "_key_norm")
        else:
            put(ours.input_norm.weight, scale(theirs.input_layernorm))
            put(ours.pre_feedforward_norm.weight, scale(theirs.post_attention_layernorm))
            q, k, v = (getattr(a, f"{n}_proj").w[...].reshape(d, -1) for n in "qkv")
            o, norms = a.o_proj.w[...].reshape(-1, d), ("q_norm", "k_norm")
            if config.qkv_bias:
                for n in "qkv":
                    put(getattr(attention, f"{n}_proj").bias, getattr(a, f"{n}_bias")[...])
        if config.qk_norm == "head":
            put(attention.q_norm.weight, scale(getattr(a, norms[0])))
            put(attention.k_norm.weight, scale(getattr(a, norms[1])))
        for n, value in zip("qkvo", (q, k, v, o), strict=True):
            put(getattr(attention, f"{n}_proj").kernel, value)
        for n in ("gate", "up", "down"):
            put(getattr(ours.feedforward, f"{n}_proj").kernel, getattr(theirs.mlp, f"{n}_proj").kernel[...])
    return own


def columns(weights):
    """[heads, width, head_dim] as [width, heads * head_dim]."""
    return weights.transpose(1, 0, 2).reshape(weights.shape[1], -1)


def put(variable: nnx.Variable, value) -> None:
    variable.set_value(jnp.asarray(value).reshape(variable.get_value().shape))


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose texts are token ids; 0 to 2 are special."""
    names = ["<pad>", "<bos>", "<eos>", *map(str, range(3, VOCAB))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
