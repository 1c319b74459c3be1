"""Loads the Transformer's parameters, one by one, from a checkpoint with Hugging Face's tensor names.

Checkpoints store linear weights as [out, in]; the parameters are [in, out].
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import FEEDFORWARD_NAMES, FUSED, SITES, ModelConfig
from ..io.progress import Progress
from ..io.untrusted import safe_names
from .parts import Recipe, Source, load_parameter, pieces
from .quantize import quantiser


def load_parameters(
    config: ModelConfig,
    source: Source,
    dtype: Any,
    shardings: dict[str, jax.sharding.Sharding] | None = None,
    quantize: str | None = None,
) -> dict[str, jax.Array]:
    """The Transformer's parameters by path, such as "layers.0.attention.q_proj.kernel".

    With `quantize`, kernels are int8, and each has a "....scale". The peak of host memory is the loaded weights and
    about 100 MB; on accelerators, and with `quantize`, one tensor and about 100 MB.

    Raises ValueError naming tensors that are missing, unknown, misshapen or not finite. Only processes that read the
    values that are not finite raise; the others continue.
    """
    plan = recipes(config, source)
    shapes = parameter_shapes(config)
    placing = shardings or {}
    loaded, broken = {}, []
    with Progress(f"loading {source.path.name}", len(shapes), unit="tensor") as bar:
        for name, shape in shapes.items():
            scale = name.removesuffix("kernel") + "scale" if quantize and name.endswith(".kernel") else None
            # A kernel is rounded to int8 once, not by way of a 16-bit dtype.
            read_as = jnp.dtype(jnp.float32 if scale else dtype)
            array, finite = load_parameter(source, plan[name], shape, read_as, placing.get(name))
            if not finite:
                broken.append(plan[name].source)
            if scale:
                quantise = quantiser(placing.get(name), placing.get(scale))
                loaded[name], loaded[scale] = jax.block_until_ready(quantise(array))
            else:
                loaded[name] = array
            bar.advance()
    if broken:
        raise ValueError(f"{source.path}: tensors with NaN or infinite values: {safe_names(broken)}; fetch it again")
    return loaded


def with_own_head(config: ModelConfig, source: Source) -> ModelConfig:
    """The config, without tied embeddings if the source has both matrices. transformers unties them where they differ,
    as in Mistral Small 3.1 once transformers 5 has saved it."""
    both = {"lm_head.weight", source_name(config, "embedding")} <= source.shapes.keys()
    return replace(config, tied_embeddings=False) if config.tied_embeddings and both else config


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the Transformer's parameters, by path."""
    layer = layer_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, config.width)}
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm.weight"] = (config.width,)
    return shapes if config.tied_embeddings else shapes | {"head": (config.width, config.vocab_size)}


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    biases = [config.qkv_bias] * 3 + [config.output_bias] + [config.mlp_bias] * 3
    for site, bias in zip(SITES, biases, strict=True):
        part = "feedforward" if site in ("gate_proj", "up_proj", "down_proj") else "attention"
        shapes[f"{part}.{site}.kernel"] = (config.site_input_width(site), config.site_width(site))
        if bias:
            shapes[f"{part}.{site}.bias"] = (config.site_width(site),)
    if config.qk_norm != "none":
        head = config.qk_norm == "head"
        shapes["attention.q_norm.weight"] = (config.head_dim if head else config.q_width,)
        shapes["attention.k_norm.weight"] = (config.head_dim if head else config.kv_width,)
    names = ("input_norm", "pre_feedforward_norm") if config.pre_norm else ()
    names += ("post_attention_norm", "post_feedforward_norm") if config.post_norm else ()
    return shapes | {f"{name}.weight": (config.width,) for name in names}


def recipes(config: ModelConfig, source: Source) -> dict[str, Recipe]:
    """How to make each parameter from the source's tensors. No tensor is read. Raises ValueError if their names and
    shapes do not match the config."""
    shapes = source.shapes
    fused = [joint for joint in FUSED if any(f".{joint}." in name for name in shapes)]
    plan = {name: recipe(config, name, shape, fused) for name, shape in parameter_shapes(config).items()}
    if config.tied_embeddings and plan["embedding"].source not in shapes and "lm_head.weight" in shapes:
        plan["embedding"] = plan["embedding"]._replace(source="lm_head.weight")  # as save_model of safetensors keeps it
    expected = {recipe.source: recipe.shape for recipe in plan.values()}
    known = expected | ({"lm_head.weight": plan["embedding"].shape} if config.tied_embeddings else {})
    problems = {
        "missing": [name for name in expected if name not in shapes],
        "unknown": [name for name in shapes if name not in known and not name.endswith("rotary_emb.inv_freq")],
        "misshapen": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in known.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {safe_names(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"{source.path}: the tensors do not match the config (model_type {config.model_type}). {listed}"
        )
    return plan


def recipe(config: ModelConfig, name: str, shape: tuple[int, ...], fused: list[str]) -> Recipe:
    """The recipe of one parameter.

    Args:
        fused: the source's tensors that hold sites under another name, as in Phi-3.
    """
    source = source_name(config, name)
    rows, start = shape[-1], 0
    # The site's rows follow those of the other sites in the joint tensor.
    for joint in fused:
        for i, part in enumerate(FUSED[joint]):
            if f".{part}." in source:
                start = sum(map(config.site_width, FUSED[joint][:i]))
                rows = sum(map(config.site_width, FUSED[joint]))
                source = source.replace(part, joint)
                break
    transpose = name == "head" or name.endswith(".kernel")
    if transpose:
        return Recipe(source, (rows, shape[0]), start, True)
    return Recipe(source, (rows,) if len(shape) == 1 else shape, start)


def source_name(config: ModelConfig, name: str) -> str:
    """Hugging Face's name of a parameter."""
    if name == "head":
        return "lm_head.weight"
    # Llama's post_attention_layernorm is the norm before the feed-forward layer.
    before_feedforward = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
    for ours, theirs in (
        ("embedding", "embed_tokens.weight"),
        ("final_norm", "norm"),
        (".attention.", ".self_attn."),
        (".feedforward.", f".{FEEDFORWARD_NAMES.get(config.model_type, 'mlp')}."),
        (".kernel", ".weight"),
        (".input_norm", ".input_layernorm"),
        (".post_attention_norm", ".post_attention_layernorm"),
        (".pre_feedforward_norm", f".{before_feedforward}"),
        (".post_feedforward_norm", ".post_feedforward_layernorm"),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"


def fingerprint(source: Source) -> str:
    """Identifies a backbone: the sha256 of its first q_proj's stored bytes (for GGUF, of its float32 values)."""
    prefix = "model.layers.0.self_attn."
    name, rows = f"{prefix}q_proj.weight", None
    if name not in source.shapes and {f"{prefix}qkv_proj.weight", f"{prefix}o_proj.weight"} <= set(source.shapes):
        # q_proj is the first rows of the joint tensor, as many as o_proj has inputs.
        name, rows = f"{prefix}qkv_proj.weight", source.shapes[f"{prefix}o_proj.weight"][1]
    digest = hashlib.sha256()
    for start, stop in pieces(0, rows or source.shapes[name][0], source.shapes[name][1]):
        digest.update(np.ascontiguousarray(source.read(name, start, stop)).view(np.uint8).data)
    return digest.hexdigest()
