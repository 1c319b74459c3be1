"""The supported model families, and `model_config`, which reads a config.json as published or saved by transformers 5.

A family is a row of a table: the defaults of missing keys, the ModelConfig values it sets, and which layers have a
window. Whatever the backbone cannot compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import LayerKind, ModelConfig, RotaryConfig
from ..io.checks import shorten
from .config_values import (
    check,
    config_activation,
    config_bool,
    config_int,
    config_mapping,
    config_number,
    config_softcap,
    config_token_ids,
    required,
)
from .rotary_config import LAYER_TYPES, rotaries
from .text_part import TEXT_CONFIGS, text_config

#: The values of missing keys in a Llama config. The families list only their differences.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
#: Keys for which null is a value. For all others, null means the key is missing.
NULLABLE = {
    "num_key_value_heads", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip

#: Published models have at most 126 layers, and heads of at most 512 values.
MAX_LAYERS = 1000
MAX_HEAD_DIM = 4096

#: What a config of a supported model_type may ask for, and the tensors do not show.
UNSUPPORTED = {
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "attention that is not causal",
    "no_rope_layers": "layers without rotary embedding",
    "quantization_config": "a quantised checkpoint",
}


class Family(NamedTuple):
    """How a model_type differs from Llama."""

    defaults: dict[str, Any] = {}
    values: Callable[[dict], dict] = lambda c: {}
    """ModelConfig fields, computed from the config with its defaults"""
    sliding: Callable[[dict, int], bool] = lambda c, layer: False
    """whether a layer has a window, if `layer_types` is missing"""
    rotary: Callable[[dict, int], bool] = lambda c, layer: True
    """whether a layer has a rotary embedding"""


def gemma(c: dict) -> dict:
    # The first Gemma checkpoints say "gelu" but use its tanh form (transformers issue 29402).
    tanh = {"activation": "gelu_tanh"} if c["hidden_act"] == "gelu" else {}
    return {"norm_offset": 1.0, "embedding_multiplier": config_int(c, "hidden_size") ** 0.5} | tanh


def gemma2(c: dict) -> dict:
    return gemma(c) | {
        "activation": config_activation(c, "hidden_activation"),
        "post_norm": True,
        "attention_scale": config_number(c, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": config_softcap(c, "attn_logit_softcapping"),
        "final_softcap": config_softcap(c, "final_logit_softcapping"),
    }


def gemma3(c: dict) -> dict:
    # transformers reads attn_logit_softcapping of Gemma 3, and does not apply it.
    return gemma2(c) | {"qk_norm": "head", "attention_softcap": None}


def olmo(c: dict) -> dict:
    return {"pre_norm": False, "post_norm": True, "qk_norm": "projection"}


def granite(c: dict) -> dict:
    return {
        "attention_scale": config_number(c, "attention_multiplier"),
        "embedding_multiplier": config_number(c, "embedding_multiplier"),
        "residual_multiplier": config_number(c, "residual_multiplier"),
        "logits_divisor": config_number(c, "logits_scaling"),
    }


def granite_hybrid(c: dict) -> dict:
    """Dense Granite 4, which has neither experts nor Mamba layers. Without layer_types all layers would be Mamba's."""
    required(c, "layer_types")
    check(c["num_local_experts"] == 0, "num_local_experts", c["num_local_experts"], "0, without a mixture of experts")
    return granite(c) | {"hidden_width": config_int(c, "shared_intermediate_size")}


def ministral3(c: dict) -> dict:
    """Beyond the original length Ministral 3 scales queries by their position (llama_4_scaling_beta). Here that length
    is the model's longest, as in longrope."""
    rope = config_mapping(c, "rope_scaling") | config_mapping(c, "rope_parameters")
    for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        required(rope, key)
    longest = config_int(c, "max_position_embeddings")
    return {"max_positions": min(longest, config_int(rope, "original_max_position_embeddings"))}


def windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None


def qwen_windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None and layer >= config_int(c, "max_window_layers", least=0)


def smollm3_windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None and not smollm3_rotary(c, layer)


def smollm3_rotary(c: dict, layer: int) -> bool:
    """no_rope_layers has a 0 for each layer without a rotary embedding. transformers lets it be longer."""
    flags = c["no_rope_layers"]
    if flags is None:
        return (layer + 1) % config_int(c, "no_rope_layer_interval") != 0
    fits = isinstance(flags, list) and len(flags) > layer and type(flags[layer]) is int and flags[layer] in (0, 1)
    check(fits, "no_rope_layers", flags, "a list with a 0 or 1 for each layer")
    return flags[layer] == 1


QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA2 = GEMMA | {
    "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "layer_types": None, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA3 = GEMMA2 | {
    "max_position_embeddings": 131072, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
}  # fmt: skip
MISTRAL = {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None,
}  # fmt: skip
MINISTRAL3 = {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
    "pad_token_id": 11,
}  # fmt: skip
PHI3 = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 4096,
    "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
OLMO2 = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1}
OLMO3 = OLMO2 | {"sliding_window": 4096, "layer_types": None, "rope_theta": 5e5}
SMOLLM3 = {
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True,
    "use_sliding_window": False, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4,
    "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
}  # fmt: skip
GRANITE: dict[str, Any] = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)

GRANITE_HYBRID = GRANITE | {
    "num_local_experts": 8, "shared_intermediate_size": 1024, "position_embedding_type": None, "layer_types": None,
}  # fmt: skip

#: The defaults are those of the configuration classes of transformers 5.24.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(MISTRAL, sliding=windowed),
    "ministral": Family(MISTRAL, sliding=windowed),  # as transformers 5 saves a mistral with layer_types
    "ministral3": Family(MINISTRAL3, ministral3, windowed),
    "qwen2": Family(QWEN, lambda c: {"qkv_bias": True, "output_bias": False}, qwen_windowed),
    "qwen3": Family(QWEN | {"head_dim": 128}, lambda c: {"qk_norm": "head"}, qwen_windowed),
    "gemma": Family(GEMMA | {"num_key_value_heads": 16}, gemma),
    "gemma2": Family(GEMMA2, gemma2, lambda c, layer: layer % 2 == 0),
    "gemma3_text": Family(GEMMA3, gemma3, lambda c, layer: (layer + 1) % config_int(c, "sliding_window_pattern") != 0),
    "phi3": Family(PHI3, sliding=windowed),
    "olmo2": Family(OLMO2, olmo),
    "olmo3": Family(OLMO3, olmo, lambda c, layer: (layer + 1) % 4 != 0),
    "smollm3": Family(SMOLLM3, sliding=smollm3_windowed, rotary=smollm3_rotary),
    "granite": Family(GRANITE, granite),
    "granitemoehybrid": Family(
        GRANITE_HYBRID, granite_hybrid, rotary=lambda c, layer: c["position_embedding_type"] == "rope"
    ),
}
SUPPORTED = ", ".join([*FAMILIES, *(f"{name} with a text_config" for name in TEXT_CONFIGS)])


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json; of its text model, if it has an image part. ValueError names what is missing,
    wrong or not supported."""
    own = text_config(config)
    family = supported_family(own)
    given = {key: value for key, value in own.items() if value is not None or key in NULLABLE}
    c = DEFAULTS | family.defaults | given
    # The other families ignore use_sliding_window.
    if "use_sliding_window" in family.defaults and not config_bool(c, "use_sliding_window"):
        c["sliding_window"] = None
    heads = config_int(c, "num_attention_heads")
    kv_heads = heads if c["num_key_value_heads"] is None else config_int(c, "num_key_value_heads")
    check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_dim = config_int(c, "hidden_size") // heads if c["head_dim"] is None else config_int(c, "head_dim")
    check(1 <= head_dim <= MAX_HEAD_DIM, "head_dim", head_dim, f"at most {MAX_HEAD_DIM}")
    kinds = layer_kinds(c, family, head_dim)
    values = {
        "model_type": config["model_type"],
        "vocab_size": config_int(c, "vocab_size"),
        "width": config_int(c, "hidden_size"),
        "hidden_width": config_int(c, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "kinds": kinds,
        "max_positions": max_positions(config_int(c, "max_position_embeddings"), kinds),
        "activation": config_activation(c, "hidden_act"),
        "norm_eps": float(config_number(c, "rms_norm_eps")),
        "qkv_bias": config_bool(c, "attention_bias"),
        "output_bias": config_bool(c, "attention_bias"),
        "mlp_bias": config_bool(c, "mlp_bias"),
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": config_bool(c, "tie_word_embeddings"),
        "eos_token_ids": config_token_ids(c, "eos_token_id"),
        "bos_token_id": next(iter(config_token_ids(c, "bos_token_id")), None),
        "pad_token_id": next(iter(config_token_ids(c, "pad_token_id")), None),
    }
    return ModelConfig(**values | family.values(c))


def supported_family(config: dict[str, Any]) -> Family:
    """The family of a config's model_type. Raises ValueError if the config uses something that is not supported."""
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(f"model_type {shorten(kind)} is not supported; supported are {SUPPORTED}")
    found = [f"{key} ({why})" for key, why in UNSUPPORTED.items() if config.get(key) and key not in family.defaults]
    found += ["is_causal false (attention that is not causal)"] if config.get("is_causal") is False else []
    if found:
        raise ValueError(f"config.json is not supported: it has {', '.join(found)}; choose another backbone")
    return family


def max_positions(given: int, kinds: tuple[LayerKind, ...]) -> int:
    """The most positions of a model with `max_position_embeddings` given. longrope ends at its original length. yarn
    makes it longer, and Qwen's model cards add yarn without changing max_position_embeddings."""
    rotary = [kind.rotary for kind in kinds]
    cut = [one.original_max_positions for one in rotary if one.scaling == "longrope"]
    longer = [int(one.original_max_positions * one.factor) for one in rotary if one.scaling == "yarn"]
    return min([max([given, *longer]), *cut])


def layer_kinds(c: dict, family: Family, head_dim: int) -> tuple[LayerKind, ...]:
    """Each layer's rotary embedding and window."""
    layers = config_int(c, "num_hidden_layers", most=MAX_LAYERS)
    derived = ["sliding_attention" if family.sliding(c, i) else "full_attention" for i in range(layers)]
    types = derived if c.get("layer_types") is None else c["layer_types"]
    if isinstance(types, list):
        types = ["full_attention" if name == "attention" else name for name in types]  # as transformers 5 writes it
    fits = isinstance(types, list) and len(types) == layers and all(name in LAYER_TYPES for name in types)
    check(fits, "layer_types", types, f"a list with {' or '.join(LAYER_TYPES)} for each of the {layers} layers")
    if types != derived and "layer_types" not in family.defaults:
        raise ValueError(f"config.json: {c['model_type']} supports no layer_types except {derived[0]}")
    full_only = c["sliding_window"] is None and "sliding_attention" not in types
    window = None if full_only else config_int(c, "sliding_window")
    full, local = rotaries(c, family.defaults, head_dim)
    kinds: dict[str, LayerKind] = dict(
        zip(LAYER_TYPES, (LayerKind(rotary=full), LayerKind(rotary=local, window=window)), strict=True)
    )
    turned = [family.rotary(c, layer) for layer in range(layers)]
    return tuple(
        kinds[name] if turn else replace(kinds[name], rotary=RotaryConfig(dims=0))
        for name, turn in zip(types, turned, strict=True)
    )
