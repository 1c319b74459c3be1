"""PARA's layout of the two files of an adapter folder: its own keys and tensors, named as Hugging Face PEFT would."""

from __future__ import annotations

import importlib.metadata
import re
from contextlib import suppress
from pathlib import Path
from types import NoneType

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig, ParaConfig, shorten
from ..untrusted import shown, some
from .adapter import describe, init, layers_of, with_leaves
from .folder import read_tensors
from .para import GELU_DENOMINATOR, GELU_NUMERATOR, Para

MAX_RANK = 2**16

REQUIRED = ("peft_type", "r", "target_modules", "pooler", "summary", "activation", "backbone")
OPTIONAL = ("base_model_name_or_path", "task_type", "inference_mode", "para_jax_version", "layers_to_transform")
BACKBONE_REQUIRED = ("model_type", "num_layers", "width", "site_widths")
BACKBONE_OPTIONAL = ("fingerprint",)

#: Arrays that only some configs have, and their names in the file.
EXTRAS = {
    "constant": "para_constant",
    "mean": "para_summary_mean",
    "scale": "para_summary_scale",
    "numerator": "para_numerator",
    "denominator": "para_denominator",
}


def para_json(adapter: Para, base_model: str, fingerprint: str | None) -> dict:
    """adapter_config.json."""
    config, backbone = adapter.config, adapter.backbone._asdict()
    widths = dict(adapter.backbone.site_widths)
    backbone["site_widths"] = {site: widths[site] for site in config.target_modules}
    optional = {}
    if config.layers_to_transform is not None:
        optional["layers_to_transform"] = list(config.layers_to_transform)
    with suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout that is not installed
        optional["para_jax_version"] = importlib.metadata.version("para_jax")
    return {
        "peft_type": "PARA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "target_modules": list(config.target_modules),
        "pooler": config.pooler,
        "summary": config.summary,
        "activation": config.activation,
        "backbone": backbone | ({"fingerprint": fingerprint} if fingerprint else {}),
    } | optional


def para_tensors(adapter: Para) -> dict[str, jax.Array | np.ndarray]:
    """The tensors by name: [out, in], the sites' up-projections as one, in the order of the sites."""
    tensors = {}
    for place, i in enumerate(layers_of(adapter.config, adapter.backbone.num_layers)):
        tensors[layer_name(i, "para_down.weight")] = adapter.down[place].T
        ups = [adapter.up[site][place].T for site in adapter.config.target_modules]
        tensors[layer_name(i, "para_up.weight")] = jnp.concatenate(ups)
        tensors |= {layer_name(i, name): getattr(adapter, key)[place] for key, name in extras(adapter).items()}
    return tensors


def load_para(folder: Path, config: ParaConfig, model: ModelConfig) -> Para:
    """The adapter of a folder whose config is checked."""
    adapter = jax.eval_shape(lambda: init(Para, config, model, 0))
    expected = {name: leaf.shape for name, leaf in jax.eval_shape(para_tensors, adapter).items()}
    tensors = read_tensors(folder, expected)

    def stack(name: str) -> np.ndarray:
        return np.stack([tensors[layer_name(i, name)] for i in layers_of(config, model.num_layers)])

    widths = [model.site_width(site) for site in config.target_modules]
    ups = np.split(stack("para_up.weight").swapaxes(1, 2), np.cumsum(widths)[:-1], axis=2)
    values = {f"up.{site}": up for site, up in zip(config.target_modules, ups, strict=True)}
    values["down"] = stack("para_down.weight").swapaxes(1, 2)
    values |= {key: stack(name) for key, name in extras(adapter).items()}
    return with_leaves(adapter, {name: jnp.array(value) for name, value in values.items()})


def extras(adapter: Para) -> dict[str, str]:
    return {key: name for key, name in EXTRAS.items() if hasattr(adapter, key)}


def layer_name(i: int, name: str) -> str:
    return f"base_model.model.model.layers.{i}.{name}"


# ---------------------------------------------------------------------------------------------------------- the config


def read_para_config(found: dict) -> tuple[ParaConfig, dict]:
    """The config in adapter_config.json and the backbone that it names, both checked."""
    require_keys("", found, REQUIRED, OPTIONAL)
    sites = found["target_modules"]
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise ValueError(f"target_modules: {shorten(sites)}; expected a list of names")
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"not supported: task_type {shorten(found['task_type'])}; expected CAUSAL_LM")
    for key, kind, expected in (("inference_mode", bool, "true or false"), ("para_jax_version", str, "text")):
        if not isinstance(found.get(key), (kind, NoneType)):
            raise ValueError(f"{key}: {shorten(found[key])}; expected {expected}")
    rest = {key: found[key] for key in ("pooler", "summary", "activation")}
    layers = found.get("layers_to_transform")
    if layers is not None:
        if not isinstance(layers, list):
            raise ValueError(f"layers_to_transform: {shorten(layers)}; expected a list of whole numbers")
        rest["layers_to_transform"] = tuple(layers)
    config = ParaConfig(r=checked_rank(found["r"]), target_modules=tuple(sites), **rest)
    backbone = checked_backbone(found["backbone"], config.target_modules)
    layers_of(config, backbone["num_layers"])  # raises for others, and here the file is named
    return config, backbone


def checked_rank(r: object) -> int:
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ValueError(f"r: {shorten(r)}; expected a whole number from 1 to {MAX_RANK}")
    return r


def checked_backbone(backbone: object, sites: tuple[str, ...]) -> dict:
    if not isinstance(backbone, dict):
        raise ValueError(f"backbone: {shorten(backbone)}; expected a mapping")
    require_keys("backbone.", backbone, BACKBONE_REQUIRED, BACKBONE_OPTIONAL)
    widths = backbone["site_widths"]
    if not isinstance(widths, dict) or set(widths) != set(sites):
        raise ValueError(f"backbone.site_widths: {shorten(widths)}; expected a width for each of {', '.join(sites)}")
    numbers = {key: backbone[key] for key in ("num_layers", "width")} | widths
    for key, value in numbers.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"backbone: {key} {shorten(value)}; expected a whole number of at least 1")
    name = backbone["model_type"]
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100:
        raise ValueError(f"backbone.model_type: {shorten(name)}; expected text, such as llama")
    fingerprint = backbone.get("fingerprint", "0" * 64)
    if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError(f"backbone.fingerprint: {shorten(fingerprint)}; expected text: a sha256 of 64 digits")
    return backbone


def require_same_backbone(backbone: dict, model: ModelConfig) -> None:
    """Raises ValueError with what differs between the backbone that a config names and this one."""
    expected = describe(model)._asdict()
    expected["site_widths"] = {site: model.site_width(site) for site in backbone["site_widths"]}
    differing = [
        f"{key} {shown(str(backbone[key]))}, not {expected[key]}" for key in expected if backbone[key] != expected[key]
    ]
    if differing:
        raise ValueError(f"the adapter is for another backbone: it has {'; '.join(differing)[:500]}")


def require_keys(where: str, found: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [where + key for key in required if key not in found]
    unknown = [where + key for key in found if key not in required + optional]
    if missing or unknown:
        listed = {"missing": missing, "unknown": unknown}
        raise ValueError("; ".join(f"{what} keys: {some(keys)}" for what, keys in listed.items() if keys))


def para_values(config: ParaConfig, backbone: dict) -> tuple[int, int, int]:
    """The values of one tenant's matrices and of its vectors, and those that decode carries a row."""
    count, width, carried = backbone["num_layers"], backbone["width"], sum(backbone["site_widths"].values())
    layers = len(layers_of(config, count))
    vectors = width * (config.pooler == "constant") + (width + 1) * (config.summary == "standardised")
    vectors += (len(GELU_NUMERATOR) + len(GELU_DENOMINATOR)) * (config.activation == "rational")
    return layers * config.r * (width + carried), layers * vectors, count * carried
