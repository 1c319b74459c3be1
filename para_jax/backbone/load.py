"""load_backbone and load_model_config: from a source (folder, hub id, .gguf file, built-in name) to a Transformer; and
abstract_backbone, its shapes alone."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig, require
from ..gguf.file import GgufFile
from ..hub import resolve_backbone, resolve_config
from ..sharding import tree_shardings
from ..untrusted import read_json
from .families import model_config
from .kernel_choice import asked_for
from .kernel_trial import choose_attention
from .known_configs import KNOWN_CONFIGS
from .quantize import quantised
from .safetensors import Safetensors
from .transformer import Layer, Transformer
from .weights import fingerprint, load_parameters, recipes


def load_model_config(source: str | Path) -> ModelConfig:
    """The ModelConfig of a backbone, from config.json or GGUF metadata alone; no weights are read or fetched from a
    hub.

    The config of a hub id in known.py comes from there.
    Raises ValueError for a source that does not exist and for a model that is not supported, naming what is not.
    """
    if str(source) in KNOWN_CONFIGS:
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
        source: a folder with config.json and *.safetensors, a hub id (user/name or user/name@revision), a .gguf file,
            or the built-in name smollm2-135m.
        dtype: of weights and compute; default float32 on a CPU, else bfloat16.
        mesh: lays the weights out over it; default: the first device. Each process of the mesh reads what its own
            devices hold, and must call this function.
        layout: "layers" for decoding, "stacked" for training.
        quantize: "int8" keeps the kernels of the linears in a byte a weight.
        attention: the kernel for whole sequences: "auto", "plain", "splash" (TPU) or "cudnn" (GPU). On an accelerator
            the kernel is tried on small rows first; "auto" uses plain attention where it fails, and says so on stderr.

    Raises ValueError, in a line or two, for what can't be found, is not supported, or is not whole.
    """
    path = resolve_backbone(source)
    config = config_at(path, source)
    weights = GgufFile(path) if path.suffix == ".gguf" else Safetensors(path)
    recipes(config, weights)  # raises for a config that is not this file's, before it decides how much is traced
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
    if on_cpu and dtype == jnp.bfloat16:
        warnings.warn(
            "a bfloat16 backbone on a CPU is slower than a float32 one, and XLA widens its weights", stacklevel=2
        )
    choice = choose_attention(attention, config, dtype, mesh)
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_backbone(config, dtype, mesh, "layers", quantize))
    wanted = {parameter_name(path): leaf for path, leaf in paths}
    shardings = None if mesh is None else {name: leaf.sharding for name, leaf in wanted.items()}
    loaded = load_parameters(config, weights, dtype, shardings, quantize)
    model = jax.tree.unflatten(treedef, [loaded.pop(name) for name in wanted])
    model.fingerprint, model.attention = fingerprint(weights), choice
    return model.with_layout(layout)


def abstract_backbone(
    config: ModelConfig,
    dtype,
    mesh=None,
    layout: str = "stacked",
    quantize: str | None = None,
    attention: str = "auto",
) -> Transformer:
    """The Transformer that load_backbone gives, with a jax.ShapeDtypeStruct for each array, which with a mesh says how
    it is laid out. The mesh's devices need not be at hand."""
    require(quantize in (None, "int8"), "quantize", quantize, "int8, or None")
    model = traced(config)
    model.attention = asked_for(attention)
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), model)
    if quantize:
        model = jax.eval_shape(quantised, model)
    model = model.with_layout(layout)
    if mesh is None:
        return model
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(placed, model, tree_shardings(model, mesh, config))


def traced(config: ModelConfig) -> Transformer:
    """The shapes of a Transformer. Layers of one kind are traced once: JAX's time to trace a module grows with the
    square of its parameters (80 layers take 4 s)."""
    model = jax.eval_shape(lambda: Transformer(replace(config, kinds=()), rngs=nnx.Rngs(0)))
    layers = {kind: jax.eval_shape(lambda kind=kind: Layer(config, kind, rngs=nnx.Rngs(0))) for kind in {*config.kinds}}
    model.layers = nnx.List([jax.tree.map(lambda leaf: leaf, layers[kind]) for kind in config.kinds])
    model.config = config
    return model


def config_at(path: Path, source: str | Path) -> ModelConfig:
    found = GgufFile(path).config if path.suffix == ".gguf" else read_json(path / "config.json")
    try:
        return model_config(found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def parameter_name(path) -> str:
    """layers.0.attention.q_proj.kernel, from a JAX key path into the module."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path[:-1])
