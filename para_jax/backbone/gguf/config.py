"""A GGUF file's metadata as a Hugging Face config, and its tensor names as Hugging Face's, for the supported
architectures: llama and gemma3."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ...io.checks import shorten

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LINEAR_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM_NAMES = {
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "attn_norm": "input_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


def check_architecture(metadata: dict[str, Any]) -> str:
    architecture = str(metadata.get("general.architecture"))
    if architecture not in CONFIGS:
        raise ValueError(
            f"architecture {shorten(architecture)} is not supported in GGUF files; only {' and '.join(CONFIGS)} are"
        )
    if metadata.get("split.count", 0) not in (0, 1):  # llama-gguf-split --merge leaves a zero
        raise ValueError(
            f"the file is one of {shorten(metadata['split.count'])} parts; merge them with llama-gguf-split --merge"
        )
    return architecture


def hugging_face_name(name: str, architecture: str) -> str:
    names = LINEAR_NAMES | NORM_NAMES[architecture]
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in names:
        return f"model.layers.{layer[1]}.{names[layer[2]]}.{layer[3]}"
    top, _, kind = name.partition(".")
    if top in TOP_NAMES and kind == "weight":
        return f"{TOP_NAMES[top]}.weight"
    return name  # one that no model has


def common_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config.json fields that both architectures share."""
    embedding = shapes.get("model.embed_tokens.weight", (0,))
    heads, width = of_model(metadata, "attention.head_count"), of_model(metadata, "embedding_length")
    head_dim = of_model(metadata, "attention.key_length", width // heads)
    for key, plain in (("rope.dimension_count", head_dim), ("rope.scaling.attn_factor", 1), ("attention.causal", True)):
        value = of_model(metadata, key, plain)
        if value != plain:
            raise ValueError(f"metadata {key} {shorten(value)} is not supported; only {plain} is")
    eos, turn_end = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return {
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": of_model(metadata, "feed_forward_length"),
        "num_hidden_layers": of_model(metadata, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of_model(metadata, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": of_model(metadata, "context_length"),
        "rms_norm_eps": of_model(metadata, "attention.layer_norm_rms_epsilon"),
        "rope_scaling": rope_scaling(metadata),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": turn_end if eos is None else eos if turn_end in (None, eos) else [eos, turn_end],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def llama_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return common_config(metadata, shapes) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": of_model(metadata, "rope.freq_base", 10000.0),
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in shapes,
    }


def gemma3_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    common = common_config(metadata, shapes)
    head_dim, is_27b = common["head_dim"], common["num_hidden_layers"] == 62  # no key says so; llama.cpp tests this too
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": of_model(metadata, "rope.freq_base", 1e6),
        "rope_local_base_freq": of_model(metadata, "rope.freq_base_swa", 10000.0),
        "sliding_window": of_model(metadata, "attention.sliding_window"),
        "sliding_window_pattern": of_model(metadata, "attention.sliding_window_pattern", 6),
        "query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"] if is_27b else head_dim,
        "final_logit_softcapping": of_model(metadata, "final_logit_softcapping", 0.0) or None,
    }


CONFIGS = {"llama": llama_config, "gemma3": gemma3_config}


def of_model(metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    """The value under the architecture's prefix. Whether it is one that a model has, families.py checks."""
    return metadata.get(f"{metadata['general.architecture']}.{key}", default)


def rope_scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    kind = of_model(metadata, "rope.scaling.type", "linear")  # llama.cpp's default
    factor = float(of_model(metadata, "rope.scaling.factor", of_model(metadata, "rope.scale_linear", 1.0)))
    return None if kind == "none" or factor == 1 else {"rope_type": kind, "factor": factor}


def llama3_scaling(factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The llama3 rope scaling that divides each frequency by the stored `factors` [head_dim / 2].

    Raises ValueError unless its settings are those of Llama 3.1, and for a config that has another scaling.
    """
    low, high, positions, pairs = 1.0, 4.0, 8192, config["head_dim"] // 2
    factor = float(factors.max())
    turns = positions / (2 * np.pi) * config["rope_theta"] ** -(np.arange(pairs) / pairs)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    same = factors.shape == (pairs,) and np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3)
    if config["rope_scaling"] is not None or not same:
        raise ValueError("rope_freqs.weight is not the rope scaling of Llama 3.1, and no other is supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }
