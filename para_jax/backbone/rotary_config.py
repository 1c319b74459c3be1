"""The rotary embeddings of a config.json, in the form of published models (rope_scaling) and in that of transformers 5
(rope_parameters)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from ..config import DividedRotaryConfig, RotaryConfig
from ..io.checks import shorten
from .config_values import check, config_bool, config_int, config_mapping, config_number
from .rotary import yarn_divisors

LAYER_TYPES = ("full_attention", "sliding_attention")
#: The families whose layers with a window have a rotary embedding of their own.
TWO_ROTARIES = ("gemma3_text", "olmo3")


def rotaries(c: dict, own: Collection[str], head_dim: int) -> tuple[RotaryConfig, RotaryConfig]:
    """The rotary embeddings of layers with full attention and with a window. They differ only in TWO_ROTARIES.

    Args:
        own: the keys that the family has and Llama lacks.
    """
    parameters, scaling = config_mapping(c, "rope_parameters"), config_mapping(c, "rope_scaling")
    base = {key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}
    if c["model_type"] not in TWO_ROTARIES:
        if nested := [name for name in LAYER_TYPES if name in parameters]:
            raise ValueError(f"config.json: {c['model_type']} supports no rope_parameters for {nested[0]}")
        length = {key: c[key] for key in {"original_max_position_embeddings"} & c.keys()}  # in transformers it wins
        one = rotary(base | without_null(scaling or parameters) | length, c, own, head_dim)  # as transformers chooses
        return one, one
    known = set(parameters) <= set(LAYER_TYPES)
    check(known, "rope_parameters", sorted(parameters), "a mapping with " + " and ".join(LAYER_TYPES))
    own_of = {name: without_null(config_mapping(parameters, name)) for name in LAYER_TYPES}
    full = rotary(base | own_of["full_attention"] | without_null(scaling), c, own, head_dim)
    if "rope_local_base_freq" in own and c["rope_local_base_freq"] is not None:
        base["rope_theta"] = config_number(c, "rope_local_base_freq")
    return full, rotary(base | own_of["sliding_attention"], c, own, head_dim)


def without_null(rope: dict) -> dict:
    """Null means that the key is missing, as in the config itself."""
    return {key: value for key, value in rope.items() if value is not None}


def rotary(rope: dict, c: dict, own: Collection[str], head_dim: int) -> RotaryConfig:
    """A rotary embedding from its parameters in a config, `rope`."""
    share = config_number(rope, "partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    if share != 1.0 and "partial_rotary_factor" not in own:
        raise ValueError(f"config.json: {c['model_type']} does not support partial_rotary_factor {share}")
    dims = int(head_dim * share)
    fits = dims % 2 == 0 and 2 <= dims <= head_dim
    check(fits, "the number of rotary dimensions", dims, f"even, and at most head_dim {head_dim}")
    plain = RotaryConfig(dims=dims, theta=float(config_number(rope, "rope_theta")))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain
    if kind in ("su", "yarn") and "original_max_position_embeddings" in own:
        kind = "longrope"  # its names in Phi-3's first configs
    if kind not in tuple(SCALINGS):
        raise ValueError(f"config.json: rope_type {shorten(kind)} is not supported; only {', '.join(SCALINGS)} are")
    return SCALINGS[kind](plain, rope, c)


def dynamic(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    """Dynamic NTK scaling, which changes the frequencies once a text is longer than max_position_embeddings. As in
    `longrope`, that is the model's longest, so they never change."""
    return plain


def linear(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    return replace(plain, scaling="linear", factor=float(config_number(rope, "factor")))


def llama3(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    low, high = float(config_number(rope, "low_freq_factor")), float(config_number(rope, "high_freq_factor"))
    check(low < high, "low_freq_factor", low, f"less than high_freq_factor {high}")
    original = {"original_max_position_embeddings": c["max_position_embeddings"]} | rope
    return replace(
        linear(plain, rope, c),
        scaling="llama3",
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=config_int(original, "original_max_position_embeddings"),
    )


def yarn(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    given = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope
    factor, original = float(config_number(rope, "factor")), config_int(rope, "original_max_position_embeddings")
    fast, slow = float(config_number(given, "beta_fast")), float(config_number(given, "beta_slow"))
    check(plain.theta > 1, "rope_theta", plain.theta, "more than 1 with rope_type 'yarn'")
    check(original * factor < 2**31, "factor", factor, f"less than 2**31 / {original} with rope_type 'yarn'")
    divisors = yarn_divisors(plain, factor, original, fast, slow, config_bool(given, "truncate"))
    return divided(replace(plain, factor=factor), "yarn", original, divisors, rope, yarn_attention(rope, factor))


def yarn_attention(rope: dict, factor: float) -> float:
    """YaRN's factor on queries and keys, sqrt(1/t) in equation 22 of arXiv:2309.00071. mscale is DeepSeek's."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(config_number(rope, "mscale")) / of(config_number(rope, "mscale_all_dim"))
    return of(1.0)


def longrope(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    """LongRoPE (arXiv:2402.13753) with the factors of short texts. transformers takes long_factor for all positions
    once a text is longer than the original length, so keys in a cache would change while a text grows. Here the
    original length is the model's longest."""
    original = config_int(rope, "original_max_position_embeddings", least=2)
    divisors: Any = rope.get("short_factor")
    count = plain.dims // 2
    fits = isinstance(divisors, list) and len(divisors) == count
    check(fits, "short_factor", divisors, f"a list of {count} numbers, one per frequency")
    divisors = tuple(float(config_number({"short_factor": each}, "short_factor")) for each in divisors)
    longest = config_int(c, "max_position_embeddings")
    factor = float(config_number(rope, "factor")) if "factor" in rope else longest / original
    attention = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    return divided(plain, "longrope", original, divisors, rope, attention)


def divided(
    plain: RotaryConfig,
    scaling: Literal["yarn", "longrope"],
    original: int,
    divisors: tuple[float, ...],
    rope: dict,
    attention: float,
) -> RotaryConfig:
    """The embedding with these divisors, and the config's attention_factor or, if it has none, `attention`."""
    if "attention_factor" in rope:
        attention = float(config_number(rope, "attention_factor"))
    return DividedRotaryConfig(
        dims=plain.dims,
        theta=plain.theta,
        scaling=scaling,
        factor=plain.factor,
        original_max_positions=original,
        divisors=divisors,
        attention_factor=attention,
    )


SCALINGS = {"dynamic": dynamic, "linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope}
