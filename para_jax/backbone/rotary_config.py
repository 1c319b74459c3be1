"""The rotary embeddings of a config.json, in the form of published models (rope_scaling) and in that of transformers 5
(rope_parameters). families.py has checked the values."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from ..config import DividedRotaryConfig, RotaryConfig
from ..io.checks import require, require_one_of
from .rotary import yarn_divisors

LAYER_TYPES = ("full_attention", "sliding_attention")
#: The families whose layers with a window have a rotary embedding of their own.
TWO_ROTARIES = ("gemma3_text", "olmo3")


def rotaries(c: dict, own: Collection[str], head_dim: int) -> tuple[RotaryConfig, RotaryConfig]:
    """The rotary embeddings of layers with full attention and with a window. They differ only in TWO_ROTARIES.

    Args:
        own: the keys that the family has and Llama lacks.
    """
    parameters, scaling = c.get("rope_parameters", {}), c.get("rope_scaling", {})
    base = {key: c[key] for key in ("rope_theta", "partial_rotary_factor") if key in c}
    two = c["model_type"] in TWO_ROTARIES
    expected = f"a mapping {'with' if two else 'without'} {' and '.join(LAYER_TYPES)}"
    fits = all((name in LAYER_TYPES) == two for name in parameters)
    require(fits, "config.json: rope_parameters", sorted(parameters), expected)
    if not two:
        length = {key: c[key] for key in {"original_max_position_embeddings"} & c.keys()}  # in transformers it wins
        one = rotary(base | (scaling or parameters) | length, c, own, head_dim)  # as transformers chooses
        return one, one
    full = rotary(base | parameters.get("full_attention", {}) | scaling, c, own, head_dim)
    if "rope_local_base_freq" in own:
        base["rope_theta"] = c["rope_local_base_freq"]
    return full, rotary(base | parameters.get("sliding_attention", {}), c, own, head_dim)


def rotary(rope: dict, c: dict, own: Collection[str], head_dim: int) -> RotaryConfig:
    """A rotary embedding from its parameters in a config, `rope`."""
    share = rope.get("partial_rotary_factor", 1.0)
    dims = int(head_dim * share)
    fits = dims % 2 == 0 and 2 <= dims <= head_dim and (share == 1 or "partial_rotary_factor" in own)
    expected = f"1, or in some families a share of the head_dim {head_dim}, and rotate an even number of its values"
    require(fits, "config.json: partial_rotary_factor", share, expected)
    plain = RotaryConfig(dims=dims, theta=float(rope["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("su", "yarn") and "original_max_position_embeddings" in own:
        kind = "longrope"  # its names in Phi-3's first configs
    require_one_of(SCALINGS, "config.json: rope_type", kind)
    return SCALINGS[kind](plain, rope, c)


def default(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    return plain


def dynamic(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    """Dynamic NTK scaling, which changes the frequencies once a text is longer than max_position_embeddings. As in
    `longrope`, that is the model's longest, so they never change."""
    return plain


def linear(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    return replace(plain, scaling="linear", factor=float(rope["factor"]))


def llama3(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    original = {"original_max_position_embeddings": c["max_position_embeddings"]} | rope
    return replace(
        linear(plain, rope, c),
        scaling="llama3",
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=original["original_max_position_embeddings"],
    )


def yarn(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    given = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope
    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]
    fast, slow = float(given["beta_fast"]), float(given["beta_slow"])
    divisors = yarn_divisors(plain, factor, original, fast, slow, given["truncate"])
    return divided(replace(plain, factor=factor), "yarn", original, divisors, rope, yarn_attention(rope, factor))


def yarn_attention(rope: dict, factor: float) -> float:
    """YaRN's factor on queries and keys, sqrt(1/t) in equation 22 of arXiv:2309.00071. mscale is DeepSeek's."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope["mscale"]) / of(rope["mscale_all_dim"])
    return of(1.0)


def longrope(plain: RotaryConfig, rope: dict, c: dict) -> RotaryConfig:
    """LongRoPE (arXiv:2402.13753) with the factors of short texts. transformers takes long_factor for all positions
    once a text is longer than the original length, so keys in a cache would change while a text grows. Here the
    original length is the model's longest."""
    original, divisors = rope["original_max_position_embeddings"], tuple(map(float, rope["short_factor"]))
    factor = float(rope["factor"]) if "factor" in rope else c["max_position_embeddings"] / original
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
        attention = float(rope["attention_factor"])
    return DividedRotaryConfig(
        dims=plain.dims,
        theta=plain.theta,
        scaling=scaling,
        factor=plain.factor,
        original_max_positions=original,
        divisors=divisors,
        attention_factor=attention,
    )


SCALINGS = {
    "default": default,
    "dynamic": dynamic,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
