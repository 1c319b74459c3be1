"""Loads a Transformer from a source: a folder, a hub id, a .gguf file or a built-in name. `abstract_backbone` gives its
shapes only."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig
from ..io.checks import expanded, one_of, shorten
from ..io.hub import local_backbone, resolve_backbone, resolve_config
from ..io.messages import warn
from ..io.untrusted import read_json
from ..runtime.sharding import tree_shardings, with_sharding
from .families import as_list, model_config
from .gguf.file import GgufFile
from .kernel_choice import AttentionChoice
from .kernel_trial import choose_attention
from .known_configs import KNOWN_CONFIGS
from .quantize import quantised
from .safetensors import Safetensors
from .transformer import Layer, Transformer
from .weights import fingerprint, load_parameters, recipes, with_own_head

#: The dtypes of weights and compute.
DTYPES = ("float32", "bfloat16", "float16")


def load_model_config(source: str | Path) -> ModelConfig:
    """The ModelConfig of a backbone. No weights are read, or downloaded from the hub.

    The hub ids in known_configs.py need no download at all. A folder with such a name is read.
    Raises ValueError for a source that does not exist, or a model that is not supported.

    >>> load_model_config("HuggingFaceTB/SmolLM2-135M-Instruct").num_layers
    30
    """
    if str(source) in KNOWN_CONFIGS and local_backbone(expanded(source), source) is None:
        return model_config(KNOWN_CONFIGS[str(source)])
    return config_at(resolve_config(source), source)


def load_backbone(
    source: str | Path,
    *,
    dtype=None,
    mesh=None,
    layout: str = "layers",
    quantize: str | None = None,
    attention: str = "auto",
) -> Transformer:
    """A frozen backbone with its weights.

    Args:
        source: a folder with config.json and safetensors files, a hub id (user/name or user/name@revision), a .gguf
            file, or the built-in name smollm2-135m.
        dtype: of weights and compute; default: float32 on a CPU, else bfloat16.
        mesh: shards the weights over its devices; default: the first device. Every process of the mesh must call this,
            and reads only what its own devices hold.
        layout: "layers" for decoding, "stacked" for training.
        quantize: "int8" stores the kernels of linear layers in one byte per weight.
        attention: the kernel for whole sequences: "auto", "plain", "splash" (TPU) or "cudnn" (GPU). On an accelerator
            the kernel is first tried on short rows. If that fails, "auto" uses plain attention and reports it.

    Raises ValueError, in a line or two, for a source that is missing, damaged or not supported.

    >>> model = load_backbone("smollm2-135m")
    >>> model.layout
    'layers'
    """
    dtype, path = chosen_dtype(dtype), resolve_backbone(source)
    config = config_at(path, source)
    warn_of_settings(path)
    weights = GgufFile(path) if path.suffix == ".gguf" else Safetensors(path)
    recipes(config, weights)  # checks the config against the file before anything is traced
    config = with_own_head(config, weights)
    if jax.default_backend() == "cpu" and dtype == jnp.bfloat16:
        warnings.warn("a bfloat16 backbone is slower on a CPU than float32, and XLA widens its weights", stacklevel=2)
    choice = choose_attention(attention, config, dtype, mesh)
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_backbone(config, dtype, mesh, "layers", quantize))
    leaves = {parameter_name(path): leaf for path, leaf in paths}
    shardings = None if mesh is None else {name: leaf.sharding for name, leaf in leaves.items()}
    loaded = load_parameters(config, weights, dtype, shardings, quantize)
    model = jax.tree.unflatten(treedef, [loaded.pop(name) for name in leaves])
    model.fingerprint, model.attention = fingerprint(weights), choice
    return model.with_layout(layout)


def chosen_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of weights and compute; None means the default. Raises ValueError for one that can't hold weights."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if str(jnp.dtype(dtype)) not in DTYPES:
        raise ValueError(f"dtype {shorten(dtype)} is not supported; use {one_of(DTYPES)} (int8: quantize='int8')")
    return jnp.dtype(dtype)


def abstract_backbone(
    config: ModelConfig,
    dtype,
    mesh=None,
    layout: str = "stacked",
    quantize: str | None = None,
    attention: str = "auto",
) -> Transformer:
    """The Transformer that load_backbone returns, with a jax.ShapeDtypeStruct in place of each array. With a mesh they
    have shardings. The mesh's devices need not exist on this machine."""
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize {shorten(quantize)} is unknown; use int8 or None")
    model = traced(config)
    model.attention = AttentionChoice(attention)
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), model)
    if quantize:
        model = jax.eval_shape(quantised, model)
    model = model.with_layout(layout)
    if mesh is None:
        return model
    return jax.tree.map(with_sharding, model, tree_shardings(model, mesh, config))


def traced(config: ModelConfig) -> Transformer:
    """The shapes of a Transformer. Each kind of layer is traced once: JAX's time to trace a module is quadratic in its
    parameters (80 layers take 4 s)."""
    model = jax.eval_shape(lambda: Transformer(replace(config, kinds=()), rngs=nnx.Rngs(0)))
    layers = {kind: jax.eval_shape(lambda kind=kind: Layer(config, kind, rngs=nnx.Rngs(0))) for kind in {*config.kinds}}
    model.layers = nnx.List([jax.tree.map(lambda leaf: leaf, layers[kind]) for kind in config.kinds])
    model.config = config
    return model


def config_at(path: Path, source: str | Path) -> ModelConfig:
    found = GgufFile(path).config if path.suffix == ".gguf" else folder_config(path)
    try:
        return model_config(found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


#: What a generation_config.json may change in every answer, also in a greedy one, and what changes nothing.
NOT_APPLIED = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "suppress_tokens": []}


def warn_of_settings(folder: Path) -> None:
    """Warns of settings that would give other answers, and are not applied. A .gguf file has none."""
    file = folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    for name, neutral in NOT_APPLIED.items():
        if settings.get(name) not in (None, neutral):
            warn(f"{file}: {name} {shorten(settings[name])} is not applied; transformers and vLLM apply it by default")


def folder_config(folder: Path) -> dict:
    """The config.json of a folder, with the end tokens of its generation_config.json, which may list more: Qwen's chat
    models end with <|im_end|>, or with <|endoftext|>, which is in that file alone."""
    config, file = read_json(folder / "config.json"), folder / "generation_config.json"
    more = read_json(file).get("eos_token_id") if file.is_file() else None
    if more is None:
        return config
    return config | {"eos_token_id": [*as_list(config.get("eos_token_id")), *as_list(more)]}


def parameter_name(path) -> str:
    """A parameter's name, such as layers.0.attention.q_proj.kernel, from its JAX key path."""
    return jax.tree_util.keystr(path[:-1], simple=True, separator=".")
