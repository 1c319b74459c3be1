"""The adapter folder, in the layout of Hugging Face PEFT: adapter_config.json, adapter_model.safetensors, a model card.

What comes from a folder is not trusted: only the two files are opened, their sizes and shapes are checked before their
content is used, and no pickle is read.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ..config import ModelConfig, ParaConfig
from .adapter import Adapter, init, with_leaves
from .folder import own_file, read_json, replace_folder, shorten, some
from .para import Para
from .rows import check_fits

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
MAX_RANK = 2**16

REQUIRED = ("peft_type", "r", "target_modules", "pooler", "summary", "activation", "backbone")
OPTIONAL = ("base_model_name_or_path", "task_type", "inference_mode", "para_jax_version")
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


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base_model: str = "", model=None, card: Iterable[str] = ()
) -> None:
    """Writes an adapter folder. It appears whole, in the place of an older one, or not at all.

    Args:
        base_model: where the backbone comes from, for the model card and adapter_config.json.
        model: the backbone itself; its fingerprint is written, so that loading on another one warns.
        card: further Markdown lines of the model card: data, scores, licences.

    Raises ValueError for weights that are not finite and for a folder that holds other files, OSError where it can't be
    written (a full disk).
    """
    if not isinstance(adapter, Para):
        raise ValueError(f"save_adapter: {type(adapter).__name__} is not possible; expected a PARA adapter")
    if model is not None:
        check_fits(adapter, model.config)
    tensors = {name: np.asarray(array, np.float32) for name, array in file_tensors(adapter).items()}
    require_finite("save_adapter", tensors)
    base_model = " ".join("".join(c if c.isprintable() else " " for c in base_model).split())
    config = config_json(adapter, base_model, getattr(model, "fingerprint", None))
    files = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: safetensors_bytes(tensors),
        CARD: model_card(adapter.config, base_model, card).encode(),
    }
    replace_folder(Path(folder).expanduser().resolve(), files)


def load_adapter(source: str | Path, model_config: ModelConfig, *, model=None) -> Adapter:
    """The adapter of a folder or a hub id (user/name or user/name@revision), for the backbone of `model_config`.

    Args:
        model: the backbone itself; a fingerprint that differs from the adapter's gives a warning.

    Raises ValueError, naming what is wrong, for an adapter that is not whole, not supported or for another backbone.
    """
    from ..hub import resolve_adapter

    folder = resolve_adapter(source)
    config, backbone, _ = read_adapter_config(folder)
    expected = backbone_json(model_config, config.target_modules)
    differing = [f"{key} {backbone[key]}, not {expected[key]}" for key in expected if backbone[key] != expected[key]]
    if differing:
        raise ValueError(f"{source}: the adapter is for another backbone: it has {'; '.join(differing)[:500]}")
    theirs, ours = backbone.get("fingerprint"), getattr(model, "fingerprint", None)
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"{source}: the adapter was trained on other weights of this shape (fingerprint {shorten(theirs, 16)}, "
            f"this backbone's {shorten(ours, 16)})",
            stacklevel=2,
        )
    adapter = jax.eval_shape(lambda: init(Para, config, model_config, 0))
    return filled(adapter, read_tensors(folder, jax.eval_shape(file_tensors, adapter)))


def read_adapter_config(folder: str | Path) -> tuple[ParaConfig, dict, dict]:
    """The method's config, the backbone that it names, and the optional rest of adapter_config.json, all checked."""
    file = own_file(Path(folder), CONFIG)
    found = read_json(file)
    kind = found.get("peft_type")
    if kind != "PARA":
        later = " yet" if kind in ("LORA", "IA3") else "; expected PARA"
        raise ValueError(f"{file}: peft_type {shorten(kind)} is not supported{later}")
    try:
        require_keys("", found, REQUIRED, OPTIONAL)
        sites, r = found["target_modules"], found["r"]
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise ValueError(f"target_modules: {shorten(sites)}; expected a list of names")
        if type(r) is not int or not 1 <= r <= MAX_RANK:
            raise ValueError(f"r: {shorten(r)}; expected a whole number from 1 to {MAX_RANK}")
        rest = {key: found[key] for key in ("pooler", "summary", "activation")}
        config = ParaConfig(r=r, target_modules=tuple(sites), **rest)
        backbone = checked_backbone(found["backbone"], config.target_modules)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error)[:500]}") from None
    return config, backbone, {key: found[key] for key in OPTIONAL if key in found}


# ---------------------------------------------------------------------------------------------------------- the config


def config_json(adapter: Para, base_model: str, fingerprint: str | None) -> dict:
    config, backbone = adapter.config, adapter.backbone._asdict()
    widths = dict(adapter.backbone.site_widths)
    backbone["site_widths"] = {site: widths[site] for site in config.target_modules}
    version = {}
    with suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout that is not installed
        version = {"para_jax_version": importlib.metadata.version("para_jax")}
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
    } | version


def backbone_json(model: ModelConfig, sites: tuple[str, ...]) -> dict:
    widths = {site: model.site_width(site) for site in sites}
    return {"model_type": model.model_type, "num_layers": model.num_layers, "width": model.width, "site_widths": widths}


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
    for key in ("model_type", "fingerprint"):
        if not isinstance(backbone.get(key, ""), str):
            raise ValueError(f"backbone.{key}: {shorten(backbone[key])}; expected text")
    return backbone


def require_keys(where: str, found: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [where + key for key in required if key not in found]
    unknown = [where + key for key in found if key not in required + optional]
    if missing or unknown:
        listed = {"missing": missing, "unknown": unknown}
        raise ValueError("; ".join(f"{what} keys: {some(keys)}" for what, keys in listed.items() if keys))


def model_card(config: ParaConfig, base_model: str, lines: Iterable[str]) -> str:
    base = {"base_model": base_model} if base_model else {}
    front = {"library_name": "para_jax", **base, "tags": ["para", "adapter"]}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            "# A PARA adapter",
            "",
            f"Base model: {base_model or 'not stated'}. Rank {config.r} on {', '.join(config.target_modules)}; "
            f"pooler {config.pooler}, summary {config.summary}, activation {config.activation}.",
            "",
            *lines,
            "",
            "## How to load it",
            "",
            "```python",
            "from para_jax import generate, load_adapter, load_backbone, load_tokenizer",
            "",
            f"base = {json.dumps(base_model or 'the base model')}",
            "model, tokenizer = load_backbone(base), load_tokenizer(base)",
            'adapter = load_adapter("this folder, or its hub id", model.config, model=model)',
            'print(generate(model, ["a prompt"], tokenizer=tokenizer, adapters=adapter)[0])',
            "```",
            "",
        ]
    )


# --------------------------------------------------------------------------------------------------------- the tensors


def file_tensors(adapter: Para) -> dict[str, jax.Array]:
    """The tensors of the file, by name: [out, in], the sites' up-projections as one, in the order of the sites."""
    tensors = {}
    for i in range(adapter.backbone.num_layers):
        tensors[layer_name(i, "para_down.weight")] = adapter.down[i].T
        ups = [adapter.up[site][i].T for site in adapter.config.target_modules]
        tensors[layer_name(i, "para_up.weight")] = jnp.concatenate(ups)
        tensors |= {layer_name(i, name): getattr(adapter, key)[i] for key, name in extras(adapter).items()}
    return tensors


def filled(adapter: Para, tensors: dict[str, np.ndarray]) -> Para:
    """The abstract adapter with the file's tensors."""

    def stack(name: str) -> np.ndarray:
        return np.stack([tensors[layer_name(i, name)] for i in range(adapter.backbone.num_layers)])

    widths = [adapter.up[site].shape[-1] for site in adapter.config.target_modules]
    ups = np.split(stack("para_up.weight").swapaxes(1, 2), np.cumsum(widths)[:-1], axis=2)
    values = {f"up.{site}": up for site, up in zip(adapter.config.target_modules, ups, strict=True)}
    values["down"] = stack("para_down.weight").swapaxes(1, 2)
    values |= {key: stack(name) for key, name in extras(adapter).items()}
    return with_leaves(adapter, {name: jnp.array(value) for name, value in values.items()})


def extras(adapter: Para) -> dict[str, str]:
    return {key: name for key, name in EXTRAS.items() if hasattr(adapter, key)}


def layer_name(i: int, name: str) -> str:
    return f"base_model.model.model.layers.{i}.{name}"


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata={"format": "pt"})


def read_tensors(folder: Path, expected: dict) -> dict[str, np.ndarray]:
    """The file's tensors as float32, if they are the expected ones (by name, with a shape) and finite."""
    from safetensors import SafetensorError, safe_open

    refuse_pickles(folder)
    file = own_file(folder, WEIGHTS)
    try:
        with safe_open(file, framework="numpy") as opened:
            stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            require_as_expected(file, stored, expected)
            tensors = {name: opened.get_tensor(name).astype(np.float32) for name in stored}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated, or not a safetensors file: {error}") from None
    require_finite(str(file), tensors)
    return tensors


def require_as_expected(file: Path, stored: dict, expected: dict) -> None:
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "misshapen": [
            f"{name} {stored[name].get_shape()} (expected {list(expected[name].shape)})"
            for name in stored
            if name in expected and tuple(stored[name].get_shape()) != expected[name].shape
        ],
        "not of F32, F16 or BF16": [name for name in stored if stored[name].get_dtype() not in ("F32", "F16", "BF16")],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{file}: the tensors do not fit {CONFIG}. {listed}")


def require_finite(where: str, tensors: dict[str, np.ndarray]) -> None:
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{where}: tensors with NaN or infinite values: {some(broken)}")


def refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder}: weights only as a pickle ({some(pickles)}), which could run code and is not read. Convert it:\n"
            f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), {WEIGHTS!r})"
        )
