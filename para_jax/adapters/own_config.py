"""adapter_config.json in para_jax's own format: the fields of the method's config, and the shape of the backbone."""

from __future__ import annotations

import importlib.metadata
import re
import typing
from contextlib import suppress
from dataclasses import fields
from types import NoneType
from typing import Any

from ..config import ModelConfig, shorten
from ..config.bounds import field_types
from ..untrusted import safe_name, safe_names
from .adapter import Backbone, describe

REQUIRED = ("peft_type", "backbone")
OPTIONAL = ("base_model_name_or_path", "task_type", "inference_mode", "para_jax_version")
BACKBONE_REQUIRED = ("model_type", "num_layers", "width", "site_widths")
BACKBONE_OPTIONAL = ("fingerprint",)

# ------------------------------------------------------------------------------------------------------------- writing


def own_config(peft_type: str, config: Any, backbone: Backbone, base_model: str, fingerprint: str | None) -> dict:
    """The content of adapter_config.json."""
    required, optional = field_names(type(config))
    defaults = {field.name: field.default for field in fields(config)}
    widths = dict(backbone.site_widths)
    shape = backbone._asdict() | {"site_widths": {site: widths[site] for site in config.target_modules}}
    found = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **{name: plain(getattr(config, name)) for name in required},
        "backbone": shape | ({"fingerprint": fingerprint} if fingerprint else {}),
        **{name: plain(getattr(config, name)) for name in optional if getattr(config, name) != defaults[name]},
    }
    with suppress(importlib.metadata.PackageNotFoundError):  # a checkout that is not installed
        found["para_jax_version"] = importlib.metadata.version("para_jax")
    return found


def field_names(kind: type) -> tuple[list[str], list[str]]:
    """The fields of a config class that a file must have, the rank and the sites first, and those that it may leave
    out: their default is None, or they are marked OPTIONAL."""
    optional = [field.name for field in fields(kind) if field.default is None or field.metadata.get("optional")]
    required = [field.name for field in fields(kind) if field.name not in optional]
    return sorted(required, key=lambda name: name not in ("r", "target_modules")), optional


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------------- reading


def read_own_config(kind: type, found: dict) -> tuple[Any, dict]:
    """The config, of class `kind`, and the backbone in adapter_config.json, both checked."""
    required, optional = field_names(kind)
    require_keys("", found, (*REQUIRED, *required), (*OPTIONAL, *optional))
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type {shorten(found['task_type'])} is not supported; use CAUSAL_LM")
    for key, key_kind, expected in (("inference_mode", bool, "true or false"), ("para_jax_version", str, "text")):
        if not isinstance(found.get(key), (key_kind, NoneType)):
            raise ValueError(f"{key} must be {expected}; got {shorten(found[key])}")
    defaults = default_values(kind)
    given = [name for name in (*required, *optional) if name in found]
    config = kind(**{name: checked_value(name, found[name], defaults[name]) for name in given})
    return config, checked_backbone(found["backbone"], config.target_modules)


def default_values(kind: type) -> dict[str, Any]:
    """The defaults of a config class, those of float fields as floats: LoRA's lora_alpha is 8."""
    types, defaults = field_types(kind), vars(kind())
    return {name: float(value) if is_float(types[name]) else value for name, value in defaults.items()}


def is_float(kind: Any) -> bool:
    return kind is float or typing.get_args(kind)[:1] == (float,)


def checked_value(name: str, value: Any, default: Any) -> Any:
    """A field's value from JSON. Its type must be that of the default; a list becomes a tuple.

    A field with the default None may hold anything here. The config's own checks refuse what it does not take.
    """
    if isinstance(value, list) and isinstance(default, (tuple, NoneType)):
        if not all(isinstance(item, (str, int, float)) for item in value):
            raise ValueError(f"{name} must be a list of names or numbers; got {shorten(value)}")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < 1e30:  # also refuses NaN
            raise ValueError(f"{name} must be a finite number; got {shorten(value)}")
        return float(value)
    if default is not None and type(value) is not type(default):
        expected = {tuple: "a list", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ValueError(f"{name} must be {expected[type(default)]}; got {shorten(value)}")
    return value


def checked_backbone(backbone: object, sites: tuple[str, ...]) -> dict:
    if not isinstance(backbone, dict):
        raise ValueError(f"backbone must be a mapping; got {shorten(backbone)}")
    require_keys("backbone.", backbone, BACKBONE_REQUIRED, BACKBONE_OPTIONAL)
    widths = backbone["site_widths"]
    if not isinstance(widths, dict) or set(widths) != set(sites):
        raise ValueError(
            f"backbone.site_widths must have a width for each of {', '.join(sites)}; got {shorten(widths)}"
        )
    numbers = {key: backbone[key] for key in ("num_layers", "width")} | widths
    for key, value in numbers.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"backbone: {key} must be a whole number of at least 1; got {shorten(value)}")
    name = backbone["model_type"]
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100:
        raise ValueError(f"backbone.model_type must be text, such as llama; got {shorten(name)}")
    fingerprint = backbone.get("fingerprint", "0" * 64)
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError(f"backbone.fingerprint must be a sha256, which has 64 digits; got {shorten(fingerprint)}")
    return backbone


def require_same_backbone(backbone: dict, model: ModelConfig, base_model: object) -> None:
    """Raises ValueError with the differences between the backbone in a config and this one.

    Args:
        base_model: the name of the backbone in the config.
    """
    expected = describe(model)._asdict()
    expected["site_widths"] = {site: model.site_width(site) for site in backbone["site_widths"]}
    differing = [
        f"{key} {safe_name(str(backbone[key]))}, not {expected[key]}"
        for key in expected
        if backbone[key] != expected[key]
    ]
    if differing:
        named = f", {shorten(base_model, 200)}" if base_model else ""
        raise ValueError(f"the adapter is for another backbone{named}: it has {'; '.join(differing)[:500]}")


def require_keys(where: str, found: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [where + key for key in required if key not in found]
    unknown = [where + key for key in found if key not in required + optional]
    if missing or unknown:
        named = {"missing": missing, "unknown": unknown}
        raise ValueError("; ".join(f"{what} keys: {safe_names(keys)}" for what, keys in named.items() if keys))
