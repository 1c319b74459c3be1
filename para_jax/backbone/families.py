"""The supported model families, and `model_config`, which reads a config.json as published or saved by transformers 5.

A family is a row of a table: the defaults of missing keys, the ModelConfig values it sets, and which layers have a
window. Whatever the backbone cannot compute is refused by name. Each value is checked once, by KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

from ..config import LayerKind, ModelConfig, RotaryConfig
from ..config.bounds import Bounds, check_value, in_python_types
from ..io.checks import require, require_one_of, shorten
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

Count = Annotated[int, Bounds(at_least=1, below=2**31)]
Number = Annotated[float, Bounds(at_least=1e-30, at_most=1e30)]  # float32 can hold it and its inverse
TokenIds = tuple[Annotated[int, Bounds(below=2**31)], ...]
#: The kinds of the values that are read, here and in rotary_config.py. Published models have at most 126 layers, and
#: heads of at most 512 values.
KINDS: dict[str, Any] = {
    key: kind
    for kind, keys in (
        (Count, "vocab_size hidden_size intermediate_size shared_intermediate_size max_position_embeddings"),
        (Count, "num_attention_heads num_key_value_heads sliding_window sliding_window_pattern no_rope_layer_interval"),
        (Annotated[int, Bounds(at_least=1, at_most=1000)], "num_hidden_layers"),
        (Annotated[int, Bounds(at_least=1, at_most=4096)], "head_dim"),
        (Annotated[int, Bounds(at_least=2, below=2**31)], "original_max_position_embeddings"),
        (Annotated[int, Bounds(at_least=0)], "max_window_layers num_local_experts"),
        (Number, "rms_norm_eps query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping"),
        (Number, "attention_multiplier embedding_multiplier residual_multiplier logits_scaling"),
        (Number, "partial_rotary_factor factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor"),
        (Annotated[float, Bounds(at_least=0, at_most=1e30)], "mscale mscale_all_dim"),
        (Annotated[float, Bounds(above=1, at_most=1e30)], "rope_theta rope_local_base_freq"),
        (tuple[Number, ...], "short_factor"),
        (tuple[Literal[0, 1], ...], "no_rope_layers"),
        (bool, "attention_bias mlp_bias tie_word_embeddings use_sliding_window truncate"),
        (dict, "rope_parameters rope_scaling full_attention sliding_attention"),
    )
    for key in keys.split()
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

#: What a config of a supported model_type may ask for, and the tensors do not show.
UNSUPPORTED = {
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "attention that is not causal",
    "no_rope_layers": "layers without rotary embedding",
    "quantization_config": "a quantised checkpoint",
    "num_local_experts": "a mixture of experts",
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
    return {"norm_offset": 1.0, "embedding_multiplier": c["hidden_size"] ** 0.5} | tanh


def gemma2(c: dict) -> dict:
    return gemma(c) | {
        "activation": activation(c, "hidden_activation"),
        "post_norm": True,
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": c["attn_logit_softcapping"],
        "final_softcap": c["final_logit_softcapping"],
    }


def gemma3(c: dict) -> dict:
    # transformers reads attn_logit_softcapping of Gemma 3, and does not apply it.
    return gemma2(c) | {"qk_norm": "head", "attention_softcap": None}


def olmo(c: dict) -> dict:
    return {"pre_norm": False, "post_norm": True, "qk_norm": "projection"}


def granite(c: dict) -> dict:
    return {
        "attention_scale": c["attention_multiplier"],
        "embedding_multiplier": c["embedding_multiplier"],
        "residual_multiplier": c["residual_multiplier"],
        "logits_divisor": c["logits_scaling"],
    }


def granite_hybrid(c: dict) -> dict:
    """Dense Granite 4, which has neither experts nor Mamba layers."""
    return granite(c) | {"hidden_width": c["shared_intermediate_size"]}


def ministral3(c: dict) -> dict:
    """Beyond the original length Ministral 3 scales queries by their position (llama_4_scaling_beta). Here that length
    is the model's longest, as in longrope."""
    rope = c.get("rope_scaling", {}) | c.get("rope_parameters", {})
    return {"max_positions": min(c["max_position_embeddings"], rope["original_max_position_embeddings"])}


def windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None


def qwen_windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None and layer >= c["max_window_layers"]


def smollm3_windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None and not smollm3_rotary(c, layer)


def smollm3_rotary(c: dict, layer: int) -> bool:
    """no_rope_layers has a 0 for each layer without a rotary embedding. transformers lets it be longer."""
    flags = c["no_rope_layers"]
    if flags is None:
        return (layer + 1) % c["no_rope_layer_interval"] != 0
    require(layer < len(flags), "config.json: no_rope_layers", list(flags), "a list with a 0 or 1 for each layer")
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
    "num_local_experts": 8, "shared_intermediate_size": 1024, "position_embedding_type": None, "layer_types": "mamba",
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
    "gemma3_text": Family(GEMMA3, gemma3, lambda c, layer: (layer + 1) % c["sliding_window_pattern"] != 0),
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
    try:
        return config_of_text(text_config(config), config["model_type"])
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing.args[0]}") from None


def config_of_text(own: dict[str, Any], model_type: str) -> ModelConfig:
    """
    Args:
        own: the config of the text model.
        model_type: of the whole.
    """
    kind = own.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(f"model_type {shorten(kind)} is not supported; supported are {SUPPORTED}")
    c = DEFAULTS | family.defaults | checked_values(own)
    # A family that reads one of these keys has null as its default.
    found = [f"{key} ({why})" for key, why in UNSUPPORTED.items() if c.get(key) and family.defaults.get(key, key)]
    found += ["is_causal false (attention that is not causal)"] if c.get("is_causal") is False else []
    if found:
        raise ValueError(f"config.json is not supported: it has {', '.join(found)}; choose another backbone")
    # The other families ignore use_sliding_window.
    if "use_sliding_window" in family.defaults and not c["use_sliding_window"]:
        c["sliding_window"] = None
    # Null means a kv head for each head.
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"] or c["num_attention_heads"]
    require(heads % kv_heads == 0, "config.json: num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    kinds = layer_kinds(c, family, head_dim)
    values = {
        "model_type": model_type,
        "vocab_size": c["vocab_size"],
        "width": c["hidden_size"],
        "hidden_width": c["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "kinds": kinds,
        "max_positions": max_positions(c["max_position_embeddings"], kinds),
        "activation": activation(c, "hidden_act"),
        "norm_eps": float(c["rms_norm_eps"]),
        "qkv_bias": c["attention_bias"],
        "output_bias": c["attention_bias"],
        "mlp_bias": c["mlp_bias"],
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": c["tie_word_embeddings"],
        "eos_token_ids": token_ids(c, "eos_token_id"),
        "bos_token_id": next(iter(token_ids(c, "bos_token_id")), None),
        "pad_token_id": next(iter(token_ids(c, "pad_token_id")), None),
    }
    return ModelConfig(**values | family.values(c))


def checked_values(config: dict[str, Any]) -> dict[str, Any]:
    """The config without nulls that mean a missing key, with tuples for lists of numbers. Raises ValueError for a value
    that is not of its kind."""
    found = {key: value for key, value in config.items() if value is not None or key in NULLABLE}
    for key in found.keys() & KINDS.keys():
        value, kind = found[key], KINDS[key]
        if value is not None:
            value = value if kind is dict else in_python_types(value)
            check_value(f"config.json: {key}", value, kind)
            found[key] = checked_values(value) if kind is dict else value
    return found


def activation(c: dict, key: str) -> str:
    require_one_of(ACTIVATIONS, f"config.json: {key}", c[key])
    return ACTIVATIONS[c[key]]


def token_ids(c: dict, key: str) -> tuple[int, ...]:
    """Token ids from a number, a list or null. Negative ones are dropped: old configs use them for "none"."""
    ids = tuple(as_list(c[key]))
    check_value(f"config.json: {key}", ids, TokenIds)
    return tuple(dict.fromkeys(i for i in ids if i >= 0))


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def max_positions(given: int, kinds: tuple[LayerKind, ...]) -> int:
    """The most positions of a model with `max_position_embeddings` given. longrope ends at its original length. yarn
    makes it longer, and Qwen's model cards add yarn without changing max_position_embeddings."""
    rotary = [kind.rotary for kind in kinds]
    cut = [one.original_max_positions for one in rotary if one.scaling == "longrope"]
    longer = [int(one.original_max_positions * one.factor) for one in rotary if one.scaling == "yarn"]
    return min([max([given, *longer]), *cut])


def layer_kinds(c: dict, family: Family, head_dim: int) -> tuple[LayerKind, ...]:
    """Each layer's rotary embedding and window."""
    layers = c["num_hidden_layers"]
    derived = ["sliding_attention" if family.sliding(c, i) else "full_attention" for i in range(layers)]
    types = derived if c.get("layer_types") is None else c["layer_types"]
    if isinstance(types, list):
        types = ["full_attention" if name == "attention" else name for name in types]  # as transformers 5 writes it
    fits = isinstance(types, list) and len(types) == layers and all(name in LAYER_TYPES for name in types)
    fits = fits and (types == derived or "layer_types" in family.defaults)
    expected = f"a list with {' or '.join(LAYER_TYPES)} for each of the {layers} layers, as {c['model_type']} has them"
    require(fits, "config.json: layer_types", types, expected)
    if c["sliding_window"] is None and "sliding_attention" in types:
        raise KeyError("sliding_window")
    full, local = rotaries(c, family.defaults, head_dim)
    kinds: dict[str, LayerKind] = dict(
        zip(LAYER_TYPES, (LayerKind(rotary=full), LayerKind(rotary=local, window=c["sliding_window"])), strict=True)
    )
    turned = [family.rotary(c, layer) for layer in range(layers)]
    return tuple(
        kinds[name] if turn else replace(kinds[name], rotary=RotaryConfig(dims=0))
        for name, turn in zip(types, turned, strict=True)
    )
