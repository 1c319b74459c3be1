"""The supported model families, and `model_config`, which reads a config.json as published or saved by transformers 5.

A family is a row of a table: the defaults of missing keys, the ModelConfig values it sets, and which layers have a
window. Whatever the backbone cannot compute is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import LayerKind, ModelConfig, RotaryConfig, shorten

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

#: Limits on a config. Published models have at most 126 layers and a handful of ids that end a text.
MAX_LAYERS, MAX_TOKEN_IDS = 1000, 1000

LAYER_TYPES = ("full_attention", "sliding_attention")

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

UNSUPPORTED = {
    "text_config": "a multimodal model",
    "vision_config": "a vision model",
    "audio_config": "an audio model",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "attention that is not causal",
    "no_rope_layers": "layers without rotary embedding",
    "clip_qkv": "clipped projections",
    "per_layer_config": "layers of different sizes",
    "quantization_config": "a quantised checkpoint",
}


class Family(NamedTuple):
    """How a model_type differs from Llama."""

    defaults: dict[str, Any] = {}
    values: Callable[[dict], dict] = lambda c: {}
    """ModelConfig fields, computed from the config with its defaults"""
    sliding: Callable[[dict, int], bool] = lambda c, layer: False
    """whether a layer has a window, if `layer_types` is missing"""


def gemma(c: dict) -> dict:
    # The first Gemma checkpoints say "gelu" but use its tanh form (transformers issue 29402).
    tanh = {"activation": "gelu_tanh"} if c["hidden_act"] == "gelu" else {}
    return {"norm_offset": 1.0, "embedding_multiplier": config_int(c, "hidden_size") ** 0.5} | tanh


def gemma2(c: dict) -> dict:
    return {
        "norm_offset": 1.0,
        "embedding_multiplier": config_int(c, "hidden_size") ** 0.5,
        "activation": config_activation(c, "hidden_activation"),
        "post_norm": True,
        "attention_scale": config_number(c, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": config_softcap(c, "attn_logit_softcapping"),
        "final_softcap": config_softcap(c, "final_logit_softcapping"),
    }


def gemma3(c: dict) -> dict:
    return gemma2(c) | {"qk_norm": "head"}


def granite(c: dict) -> dict:
    return {
        "attention_scale": config_number(c, "attention_multiplier"),
        "embedding_multiplier": config_number(c, "embedding_multiplier"),
        "residual_multiplier": config_number(c, "residual_multiplier"),
        "logits_divisor": config_number(c, "logits_scaling"),
    }


def windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None


def qwen_windowed(c: dict, layer: int) -> bool:
    return c["sliding_window"] is not None and layer >= config_int(c, "max_window_layers", least=0)


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
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
PHI3 = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
    "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
OLMO2 = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279, "pad_token_id": 1}
GRANITE: dict[str, Any] = dict.fromkeys(
    ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)

#: The defaults are those of the configuration classes of transformers 5.24.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(MISTRAL, sliding=windowed),
    "qwen2": Family(QWEN, lambda c: {"qkv_bias": True, "output_bias": False}, qwen_windowed),
    "qwen3": Family(QWEN | {"head_dim": 128}, lambda c: {"qk_norm": "head"}, qwen_windowed),
    "gemma": Family(GEMMA | {"num_key_value_heads": 16}, gemma),
    "gemma2": Family(GEMMA2, gemma2, lambda c, layer: layer % 2 == 0),
    "gemma3_text": Family(GEMMA3, gemma3, lambda c, layer: (layer + 1) % config_int(c, "sliding_window_pattern") != 0),
    "phi3": Family(PHI3, sliding=windowed),
    "olmo2": Family(OLMO2, lambda c: {"pre_norm": False, "post_norm": True, "qk_norm": "projection"}),
    "granite": Family(GRANITE, granite),
}


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json. ValueError names what is missing, wrong or not supported."""
    family = supported_family(config)
    given = {key: value for key, value in config.items() if value is not None or key in NULLABLE}
    c = DEFAULTS | family.defaults | given
    # The other families ignore use_sliding_window.
    if "use_sliding_window" in family.defaults and not config_bool(c, "use_sliding_window"):
        c["sliding_window"] = None
    heads = config_int(c, "num_attention_heads")
    kv_heads = heads if c["num_key_value_heads"] is None else config_int(c, "num_key_value_heads")
    check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    head_dim = config_int(c, "hidden_size") // heads if c["head_dim"] is None else config_int(c, "head_dim")
    values = {
        "model_type": c["model_type"],
        "vocab_size": config_int(c, "vocab_size"),
        "width": config_int(c, "hidden_size"),
        "hidden_width": config_int(c, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "kinds": layer_kinds(c, family, head_dim),
        "max_positions": config_int(c, "max_position_embeddings"),
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
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"config.json has no model_type; supported are {', '.join(FAMILIES)}")
    found = [f"{key} ({why})" for key, why in UNSUPPORTED.items() if config.get(key)]
    if config["model_type"] not in FAMILIES:
        also = f", with {', '.join(found)}," if found else ""
        name = shorten(config["model_type"])
        raise ValueError(f"model_type {name}{also} is not supported; supported are {', '.join(FAMILIES)}")
    if found:
        raise ValueError(f"config.json is not supported: it has {', '.join(found)}; choose another backbone")
    return FAMILIES[config["model_type"]]


def layer_kinds(c: dict, family: Family, head_dim: int) -> tuple[LayerKind, ...]:
    """Each layer's rotary embedding and window."""
    layers = config_int(c, "num_hidden_layers", most=MAX_LAYERS)
    derived = ["sliding_attention" if family.sliding(c, i) else "full_attention" for i in range(layers)]
    types = derived if c.get("layer_types") is None else c["layer_types"]
    check(isinstance(types, list), "layer_types", types, "a list")
    check(len(types) == layers, "the length of layer_types", len(types), f"the number of layers, {layers}")
    for name in types:
        check(name in LAYER_TYPES, "layer_types", name, "one of " + ", ".join(LAYER_TYPES))
    if types != derived and "layer_types" not in family.defaults:
        raise ValueError(f"config.json: {c['model_type']} supports no layer_types except {derived[0]}")
    full_only = c["sliding_window"] is None and "sliding_attention" not in types
    window = None if full_only else config_int(c, "sliding_window")
    full, local = rotaries(c, family, head_dim)
    kinds: dict[str, LayerKind] = dict(
        zip(LAYER_TYPES, (LayerKind(rotary=full), LayerKind(rotary=local, window=window)), strict=True)
    )
    return tuple(kinds[name] for name in types)


def rotaries(c: dict, family: Family, head_dim: int) -> tuple[RotaryConfig, RotaryConfig]:
    """The rotary embeddings of layers with full attention and with a window. They differ only in Gemma 3."""
    parameters, scaling = config_mapping(c, "rope_parameters"), config_mapping(c, "rope_scaling")
    base = {key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}
    if "rope_local_base_freq" not in family.defaults:
        nested = [name for name in LAYER_TYPES if name in parameters]
        if nested:
            raise ValueError(f"config.json: {c['model_type']} supports no rope_parameters for {nested[0]}")
        length = {key: c[key] for key in {"original_max_position_embeddings"} & c.keys()}  # in transformers it wins
        found = [rotary(base | given | length, c, family, head_dim) for given in (scaling, parameters) if given]
        if len(set(found)) > 1:
            raise ValueError("config.json: rope_scaling and rope_parameters differ; delete the one that is wrong")
        one = found[0] if found else rotary(base, c, family, head_dim)
        return one, one
    known = set(parameters) <= set(LAYER_TYPES)
    check(known, "rope_parameters", sorted(parameters), "a mapping with " + " and ".join(LAYER_TYPES))
    full = rotary(base | config_mapping(parameters, "full_attention") | scaling, c, family, head_dim)
    base["rope_theta"] = config_number(c, "rope_local_base_freq")
    return full, rotary(base | config_mapping(parameters, "sliding_attention"), c, family, head_dim)


def rotary(rope: dict, c: dict, family: Family, head_dim: int) -> RotaryConfig:
    """A rotary embedding from its parameters in a config, `rope`."""
    share = config_number(rope, "partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    if share != 1.0 and "partial_rotary_factor" not in family.defaults:
        raise ValueError(f"config.json: {c['model_type']} does not support partial_rotary_factor {share}")
    dims = int(head_dim * share)
    fits = dims % 2 == 0 and 2 <= dims <= head_dim
    check(fits, "the number of rotary dimensions", dims, f"even, and at most head_dim {head_dim}")
    plain = {"dims": dims, "theta": float(config_number(rope, "rope_theta"))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RotaryConfig(**plain)
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"config.json: rope_type {shorten(kind)} is not supported; only default, linear and llama3 are"
        )
    scaled = plain | {"scaling": kind, "factor": float(config_number(rope, "factor"))}
    if kind == "linear":
        return RotaryConfig(**scaled)
    low, high = float(config_number(rope, "low_freq_factor")), float(config_number(rope, "high_freq_factor"))
    check(low < high, "low_freq_factor", low, f"less than high_freq_factor {high}")
    original = {"original_max_position_embeddings": c["max_position_embeddings"]} | rope
    original_max = config_int(original, "original_max_position_embeddings")
    return RotaryConfig(**scaled, low_freq_factor=low, high_freq_factor=high, original_max_positions=original_max)


# ------------------------------------------------------------------------------------------- one value of a config.json


def config_int(c: dict, key: str, least: int = 1, most: int = 2**31 - 1) -> int:
    value = required(c, key)
    fits = type(value) is int and least <= value <= most
    check(fits, key, value, f"an integer from {least} to {most}")
    return value


def config_number(c: dict, key: str) -> float:
    value = required(c, key)
    fits = type(value) in (int, float) and 1e-30 <= value <= 1e30  # float32 can hold it and its inverse
    check(fits, key, value, "a number from 1e-30 to 1e30")
    return value


def config_softcap(c: dict, key: str) -> float | None:
    """The soft cap of logits; null means none. Zero is refused, because it would make all of them NaN."""
    return None if c[key] is None else config_number(c, key)


def config_bool(c: dict, key: str) -> bool:
    check(type(c[key]) is bool, key, c[key], "true or false")
    return c[key]


def config_mapping(c: dict, key: str) -> dict:
    value = {} if c.get(key) is None else c[key]
    check(isinstance(value, dict), key, value, "a mapping")
    return value


def config_activation(c: dict, key: str) -> str:
    check(c[key] in tuple(ACTIVATIONS), key, c[key], "one of " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[c[key]]


def config_token_ids(c: dict, key: str) -> tuple[int, ...]:
    """Token ids from a number, a list or null. Negative ones are dropped: old configs use them for "none"."""
    values = as_list(c[key])
    fits = len(values) <= MAX_TOKEN_IDS and all(type(i) is int and i < 2**31 for i in values)
    check(fits, key, c[key], f"a token id, or a list of at most {MAX_TOKEN_IDS}")
    return tuple(dict.fromkeys(i for i in values if i >= 0))


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def check(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"config.json: {key} is {shorten(value)}; it must be {rule}")


def required(c: dict, key: str) -> Any:
    if c.get(key) is None:
        raise ValueError(f"config.json has no {key}")
    return c[key]
