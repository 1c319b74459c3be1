"""One value of a config.json, checked. ValueError names the key and the value."""

from __future__ import annotations

from typing import Any

from ..io.checks import shorten

#: Published models have a handful of ids that end a text.
MAX_TOKEN_IDS = 1000

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


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
