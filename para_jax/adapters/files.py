"""The adapter folder, in Hugging Face PEFT's layout: adapter_config.json, adapter_model.safetensors, a model card.

LoRA and (IA)^3 are written and read as PEFT does it (peft_config.py, peft_file.py), PARA in a layout of its own
(para_file.py). Only the two files are opened.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import yaml

from ..config import Ia3Config, LoraConfig, ModelConfig, ParaConfig, expanded, shorten
from ..storage.bucket import BucketPath
from ..storage.folder import require_whole
from ..untrusted import one_line, read_json
from .adapter import Adapter
from .folder import (
    CARD,
    CONFIG,
    WEIGHTS,
    own_file,
    read_whole,
    replace_folder,
    require_finite,
    safetensors_bytes,
    tensor_shapes,
)
from .ia3 import Ia3
from .lora import Lora
from .para import Para
from .para_format import load_para, para_json, para_tensors, para_values, read_para_config, require_same_backbone
from .peft_config import named, peft_values, read_peft_config
from .peft_format import load_peft, peft_json, peft_tensors
from .rows import check_fits


class Described(NamedTuple):
    """What an adapter folder says of itself; its weights are not read."""

    config: ParaConfig | LoraConfig | Ia3Config
    backbone: dict
    """of a PARA adapter model_type, num_layers, width, site_widths, perhaps fingerprint; of the others num_layers"""
    base_model: str
    """where the backbone comes from; "" where it is not named"""
    matrices: int
    """values of one tenant's matrices"""
    vectors: int
    """values of its vectors"""
    carried: int
    """values that decode carries a row"""


def save_adapter(
    adapter: Adapter, folder: str | Path | BucketPath, *, base_model: str = "", model=None, card: Iterable[str] = ()
) -> None:
    """Writes an adapter folder. It appears whole, in the place of an older one, or not at all.

    Args:
        base_model: where the backbone comes from, for the model card and adapter_config.json.
        model: the backbone itself. A PARA folder keeps its fingerprint, so that loading on another one warns.
        card: further Markdown lines of the model card: data, scores, licences.

    Raises ValueError for weights that are not finite and for a folder that holds other files, OSError where it can't be
    written (a full disk).
    """
    base_model = one_line(base_model)
    if model is not None:
        check_fits(adapter, model.config)
    if isinstance(adapter, Para):
        config: dict = para_json(adapter, base_model, getattr(model, "fingerprint", None))
        tensors: dict[str, Any] = para_tensors(adapter)
    elif isinstance(adapter, (Lora, Ia3)):
        config, tensors = peft_json(adapter, base_model), peft_tensors(adapter)
    else:
        raise ValueError(
            f"save_adapter: {type(adapter).__name__} is not possible; expected a Para, Lora or Ia3 adapter"
        )
    tensors = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    require_finite("save_adapter", tensors)
    files = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: safetensors_bytes(tensors),
        CARD: model_card(adapter.config, base_model, card).encode(),
    }
    replace_folder(expanded(folder).resolve(), files)


def load_adapter(source: str | Path | BucketPath, model_config: ModelConfig, *, model=None) -> Adapter:
    """The adapter of a folder or a hub id (user/name or user/name@revision), for the backbone of `model_config`.

    Args:
        model: the backbone itself; a fingerprint that differs from the adapter's gives a warning.

    Raises ValueError, naming what is wrong, for an adapter that is not whole, not supported or for another backbone.
    """
    from ..hub import resolve_adapter

    try:
        return read_whole(lambda: resolve_adapter(source), lambda path: read_adapter(path, source, model_config, model))
    except ValueError as error:
        if "://" in str(source) and str(source) not in str(error):  # it names the local copy
            raise ValueError(f"{source}: {error}") from None
        raise


def read_adapter(folder: Path, source: str | Path | BucketPath, model_config: ModelConfig, model) -> Adapter:
    """The adapter of a folder; `source` is the name that the user gave it."""
    require_whole(folder)
    config, backbone, _ = read_config(folder)
    if not isinstance(config, ParaConfig):
        return load_peft(folder, config, model_config)
    try:
        require_same_backbone(backbone, model_config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    theirs, ours = backbone.get("fingerprint"), getattr(model, "fingerprint", None)
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"{source}: the adapter was trained on other weights of this shape (fingerprint {shorten(theirs, 16)}, "
            f"this backbone's {shorten(ours, 16)})",
            stacklevel=5,
        )
    return load_para(folder, config, model_config)


def read_adapter_config(folder: str | Path | BucketPath) -> Described:
    """What an adapter folder says of itself. A PARA folder's weights need not be there."""
    from ..hub import resolve_adapter

    place = expanded(folder)
    local = resolve_adapter(place) if isinstance(place, BucketPath) else place
    config, backbone, base_model = read_config(local)
    if isinstance(config, ParaConfig):
        return Described(config, backbone, base_model, *para_values(config, backbone))
    shapes = tensor_shapes(local)
    layers = 1 + max((layer for _, _, layer in named(shapes)), default=-1)
    held, carried = peft_values(config, shapes)
    matrices, vectors = (held, 0) if isinstance(config, LoraConfig) else (0, held)
    return Described(config, {"num_layers": layers}, base_model, matrices, vectors, carried)


def read_config(folder: Path) -> tuple[Any, dict, str]:
    """adapter_config.json, checked: the method's config, what it says of the backbone, and the base model's name."""
    file = own_file(folder, CONFIG)
    found = read_json(file)
    kind, base_model = found.get("peft_type"), found.get("base_model_name_or_path")
    if kind not in ("PARA", "LORA", "IA3"):
        raise ValueError(f"{file}: peft_type {shorten(kind)} is not supported; expected PARA, LORA or IA3")
    shapes = {} if kind == "PARA" else tensor_shapes(folder)
    try:
        config, backbone = read_para_config(found) if kind == "PARA" else (read_peft_config(found, shapes), {})
    except ValueError as error:
        raise ValueError(f"{file}: {str(error)[:500]}") from None
    if not isinstance(base_model, (str, NoneType)):
        raise ValueError(f"{file}: base_model_name_or_path: {shorten(base_model)}; expected text or null")
    return config, backbone, one_line(base_model or "")


# ------------------------------------------------------------------------------------------------------ the model card


def model_card(config, base_model: str, lines: Iterable[str]) -> str:
    """README.md. PEFT is named as the library of what it can load: not of PARA."""
    library = "para_jax" if isinstance(config, ParaConfig) else "peft"
    base = {"base_model": base_model} if base_model else {}
    front = {"library_name": library, **base, "tags": [NAMES[type(config)][1], "adapter"]}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {NAMES[type(config)][0]} adapter",
            "",
            f"Base model: {base_model or 'not stated'}. {summary(config)}.",
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
            *([] if library == "para_jax" else ["It is in the format of Hugging Face PEFT, which loads it too.", ""]),
        ]
    )


#: What a method is called, and its tag.
NAMES = {ParaConfig: ("PARA", "para"), LoraConfig: ("LoRA", "lora"), Ia3Config: ("(IA)^3", "ia3")}


def summary(config) -> str:
    """A method's config in a line."""
    sites = ", ".join(config.target_modules)
    if isinstance(config, ParaConfig):
        chosen = f"pooler {config.pooler}, summary {config.summary}, activation {config.activation}"
        layers = config.layers_to_transform
        return f"Rank {config.r} on {sites}; {chosen}" + (f"; layers {', '.join(map(str, layers))}" if layers else "")
    if isinstance(config, LoraConfig):
        return f"Rank {config.r} on {sites}; scale {config.scale:.6g}"
    return f"Vectors on {sites}" + ("; down_proj's input is scaled" if config.feedforward_modules else "")
