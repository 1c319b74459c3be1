"""Where the layers and the linears of a Transformer are. A row of FAMILIES is all that a new model needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from flax import nnx

from ..config import LayerKind, ModelConfig, RotaryConfig


@dataclass(frozen=True)
class Linear:
    """A module of a layer whose output is that of one site, or of several stacked along a leading axis."""

    path: str
    """from the layer, such as attn.q_proj"""
    sites: tuple[str, ...]
    out_axes: int = 1
    """how many trailing axes of the output are the site's width: 2 for [..., heads, head_dim]"""
    in_axes: int = 1
    bias: str | None = None
    """the name of a bias that the parent module adds to the output afterwards (Qwen 2). The factors scale it too"""
    folded: bool = False
    """whether 1 / sqrt(head_dim) of the attention is folded into the weights (MaxText's queries)"""


@dataclass(frozen=True)
class Family:
    """Where a model's layers and linears are. The model is called with the tokens int [batch, length] first."""

    linears: tuple[Linear, ...]
    model_type: str = ""
    """Hugging Face's name of the architecture, where the model's own config gives its shape"""
    layers: str = "layers"
    """the path of a list of layers, or of one module that holds all of them, for a scan"""
    stacked: int = 0
    """the axis of the layers in the arrays of that one module"""
    stream: int = 0
    """which argument of a layer is the residual stream"""
    cache: str | None = "cache"
    """the layer's argument with its cache, a dict. The layer then returns (cache, stream, ...). None: no decoding"""
    positions: str = "positions"
    """the model's argument with each token's position in its row, padding left out"""


MLP = tuple(Linear(f"mlp.{site}", (site,)) for site in ("gate_proj", "up_proj", "down_proj"))
OUT = Linear("attn.o_proj", ("o_proj",), in_axes=2)
ATTENTION = (*(Linear(f"attn.{n}_proj", (f"{n}_proj",), out_axes=2) for n in "qkv"), OUT)
BIASED = (*(Linear(f"attn.{n}_proj", (f"{n}_proj",), out_axes=2, bias=f"{n}_bias") for n in "qkv"), OUT)
GEMMA = (
    Linear("attn.q_einsum", ("q_proj",), out_axes=2),
    Linear("attn.k_einsum", ("k_proj",), out_axes=2),
    Linear("attn.kv_einsum", ("k_proj", "v_proj"), out_axes=2),
    Linear("attn.qkv_einsum", ("q_proj", "k_proj", "v_proj"), out_axes=2),
    Linear("attn.attn_vec_einsum", ("o_proj",), in_axes=2),
)
MAXTEXT = (
    Linear("self_attention.query", ("q_proj",), out_axes=2, folded=True),
    Linear("self_attention.key", ("k_proj",), out_axes=2),
    Linear("self_attention.value", ("v_proj",), out_axes=2),
    Linear("self_attention.out", ("o_proj",), in_axes=2),
    Linear("mlp.wi_0", ("gate_proj",)),
    Linear("mlp.wi_1", ("up_proj",)),
    Linear("mlp.wo", ("down_proj",)),
)

#: By the module of the model's class. Read in Tunix 0.1.7 and MaxText 0.2.5.
FAMILIES = {
    "tunix.models.llama3.model": Family(ATTENTION + MLP, "llama"),
    "tunix.models.qwen2.model": Family(BIASED + MLP, "qwen2"),
    "tunix.models.qwen3.model": Family(ATTENTION + MLP, "qwen3"),
    "tunix.models.gemma.model": Family(GEMMA + MLP, "gemma"),
    "tunix.models.gemma3.model": Family(GEMMA + MLP, "gemma3_text"),
    "tunix.models.gemma4.model": Family(GEMMA + MLP, "gemma4_text"),
    "maxtext.models.models": Family(
        MAXTEXT, layers="decoder.layers", stacked=1, cache=None, positions="decoder_positions"
    ),
    "maxtext.integration.tunix.tunix_adapter": Family(MAXTEXT, layers="base.decoder.layers", stacked=1, cache=None),
}


def family_of(model: nnx.Module) -> Family:
    """The row of a model's class. Raises ValueError for a class without one."""
    for kind in type(model).__mro__:
        if kind.__module__ in FAMILIES:
            return FAMILIES[kind.__module__]
    raise ValueError(
        f"{type(model).__module__}.{type(model).__name__} is none of the known models; pass family=Family(...), which "
        "says where its layers and linears are"
    )


def config_of(model: Any, family: Family) -> ModelConfig:
    """The shape of a Tunix model, from its own config. It says nothing about rotary embeddings, windows or norms."""
    c = model.config
    if not family.model_type or not hasattr(c, "embed_dim"):
        raise ValueError(f"attach can't read the shape of {type(model).__name__}; pass config=load_model_config(...)")
    second = family.model_type == "gemma" and c.use_post_attn_norm
    return ModelConfig(
        model_type="gemma2" if second else family.model_type,
        vocab_size=getattr(c, "vocab_size", None) or c.num_embed,
        width=c.embed_dim,
        hidden_width=c.hidden_dim,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        kinds=(LayerKind(rotary=RotaryConfig(dims=c.head_dim)),) * c.num_layers,
        norm_offset=1.0 if "gemma" in family.model_type else 0.0,
    )


def layers_of(model: Any, family: Family) -> tuple[list[Any], bool]:
    """The model's layers, and whether they are one module that holds all of them."""
    *parents, name = family.layers.split(".")
    parent: Any = reduce(getattr, parents, model)
    layers: Any = getattr(parent, name, None)
    if layers is None:  # MaxText without a scan: layers_0, layers_1, ...
        count = sum(child.removeprefix(f"{name}_").isdigit() for child in vars(parent))
        return [getattr(parent, f"{name}_{i}") for i in range(count)], False
    return (list(layers), False) if hasattr(layers, "__len__") else ([layers], True)


def module_at(layer: nnx.Module, path: str) -> Any:
    """The module at a path from a layer; None where the layer has none."""
    return reduce(lambda module, name: getattr(module, name, None), path.split("."), layer)
