"""attach: an adapter in every layer of a Flax NNX Transformer that is not ours, without a change to its code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ..adapters.adapter import Adapter
from ..adapters.methods import is_adapter_config
from ..adapters.rows import Rows, Stack, check_fits, layers_first
from ..backbone.transformer import Transformer
from ..config import SITES, ModelConfig
from ..model.adapted import init_adapter
from ..runtime.sharding import is_variable, mesh_of, named_axes, partition
from .compare import compare_backbones
from .family import Family, config_of, family_of, layers_of, module_at
from .hooks import Attached, hooked, layer_hook, linear_hook, no_weight_map, root_hook

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nnx.Module)


def attach(
    model: Model,
    adapter: Any,
    *,
    prompts: Any = None,
    config: ModelConfig | None = None,
    family: Family | None = None,
    backbone: Transformer | None = None,
) -> Model:
    """`model` itself, with an adapter in every layer. A fresh adapter changes nothing.

    The model is then called as before, with two arguments more, by name. prompt_end, int32 [batch], is the index of
    each prompt's last token. A call that fills a cache needs none: its rows are prompts, padded on the left. Neither
    does a decode step, nor an adapter that acts alike on all tokens. tenants, int32 [batch], with Rows or a Stack, is
    each row's adapter; -1 is the base model. A row whose prompt has no end (`EndsWith` finds none) gets NaN. The new
    weights are nnx.LoRAParam, the only ones that Tunix's trainers train and save.

    Args:
        model: of a class in `para_jax.foreign.FAMILIES`, or any with `family`.
        adapter: an adapter, the config of a fresh one, a Stack, or Rows of one stack, which also say the tenants of
            calls that do not.
        prompts: where prompts end in calls without prompt_end: LeftPadded(width), EndsWith(token_ids), or any object
            with `ends(tokens int [batch, T]) -> int32 [batch]`.
        config: the backbone's shape; default: as the model's own config has it.
        family: where the model's layers and linears are; default: the row of its class.
        backbone: the same backbone as para_jax loads it. A warning tells if the two compute different functions.

    Raises ValueError for a model that is attached already, for an adapter of another backbone, for sites that a layer
    lacks, and, with layers that are one module for a scan, for layers_to_transform. Calls raise ValueError where
    prompt_end or tenants are missing.

    >>> attached = attach(their_model, ParaConfig(r=12), prompts=LeftPadded(4), config=model.config, family=family)
    >>> attached is their_model, attached(tokens).shape
    (True, (1, 5, 256))
    """
    if attached_to(model):
        raise ValueError("the model has an adapter already; call detach(model) or set_adapter(model, adapter)")
    family = family or family_of(model)
    config = config or config_of(model, family)
    if backbone is not None:
        warn_of_difference(model, backbone, family)
    if is_adapter_config(adapter):
        adapter = init_adapter(adapter, config)
    if isinstance(adapter, Rows):
        (stack,), index = adapter.stacks, adapter.by_row().index[0]
        # A variable, as Tunix's Sampler keeps those of its model.
        setattr(model, "para_tenants", nnx.Param(index))  # noqa: B010
        adapter = stack
    weights = by_layers(adapter)
    check_fits(weights, config)
    layers, scanned = layers_of(model, family)
    check_layers(weights, layers, scanned, config, family)
    if scanned:
        layers[0].para = jax.tree.map(lambda a: jnp.moveaxis(a, 0, family.stacked), weights)
    else:
        for place, i in enumerate(weights.layers(weights.config, len(layers))):
            layers[i].para = jax.tree.map(lambda a, place=place: a[place], weights)
    for layer in layers:
        if hasattr(layer, "para"):
            layer.para = placed(layer.para, mesh_of(model), config)
        for linear in family.linears:
            hook(module_at(layer, linear.path), linear_hook, linear)
        hook(layer, layer_hook, family)
    attached = Attached(family, weights.config, weights.reads_prompt, prompts, size_of(adapter))
    hook(model, root_hook, attached, to_hf_mappings=no_weight_map)
    return model


def detach(model: Model) -> Model:
    """`model` itself, as it was before attach. Without an adapter it stays as it is.

    >>> detach(their_model) is their_model
    True
    """
    for _, module in list(nnx.iter_graph(model)):
        if plain := getattr(type(module), "para_base", None):
            for name in {"para", "para_tenants"} & vars(module).keys():
                delattr(module, name)
            module.__class__ = plain
    return model


def adapter_of(model: nnx.Module) -> Adapter | Stack:
    """The adapter of an attached model, as `save_adapter` and our own backbone take it; a Stack where attach got one
    or Rows. Raises ValueError for a model without one.

    >>> forward(model, adapter_of(attached_model), tokens, 5).shape
    (1, 5, 256)
    """
    attached, scanned, of_layers = held_by(model)
    axis = attached.family.stacked
    if scanned:
        adapter = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), of_layers[0])
    else:
        adapter = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers)
    return adapter if attached.tenants is None else Stack(layers_first(adapter))


def set_adapter(model: nnx.Module, adapter: Adapter | Stack) -> None:
    """Replaces the weights of an attached model's adapter. Compiled functions stay valid. Raises ValueError for an
    adapter of another config or backbone, or another number of them.

    >>> set_adapter(attached_model, adapter)
    """
    attached, scanned, of_layers = held_by(model)
    weights = by_layers(adapter)
    new, old = ((one.config, one.backbone) for one in (weights, of_layers[0]))
    if new != old or size_of(adapter) != attached.tenants:
        raise ValueError(f"the adapter has {weights.config}, the model {attached.config}; detach, then attach")
    for place, held in enumerate(of_layers):
        for old, new in zip(variables(held), variables(weights), strict=True):
            value = new.get_value()
            value = jnp.moveaxis(value, 0, attached.family.stacked) if scanned else value[place]
            old.set_value(jax.device_put(value, old.get_value().sharding))


# ------------------------------------------------------------------------------------------------------------ the parts


def attached_to(model: nnx.Module) -> Attached | None:
    spec = getattr(type(model), "para_spec", None)
    return spec if isinstance(spec, Attached) else None


def held_by(model: nnx.Module) -> tuple[Attached, bool, list[Any]]:
    """What the root knows, whether the layers are one module, and the adapter's modules."""
    if (attached := attached_to(model)) is None:
        raise ValueError(f"{type(model).__name__} has no adapter; call attach(model, adapter)")
    layers, scanned = layers_of(model, attached.family)
    return attached, scanned, [layer.para for layer in layers if hasattr(layer, "para")]


def size_of(adapter: Adapter | Stack) -> int | None:
    return adapter.size if isinstance(adapter, Stack) else None


def by_layers(adapter: Adapter | Stack) -> Adapter:
    """The weights with a leading layer axis."""
    return layers_first(adapter.adapters) if isinstance(adapter, Stack) else adapter


def hook(module: nnx.Module | None, hook: Callable, spec: Any, **methods: Callable) -> None:
    if module is not None:
        module.__class__ = hooked(type(module), hook, spec, **methods)


def check_layers(weights: Adapter, layers: list, scanned: bool, config: ModelConfig, family: Family) -> None:
    """Raises ValueError where the adapter does not fit the model's layers."""
    if scanned and len(weights.layers(weights.config, config.num_layers)) < config.num_layers:
        raise ValueError("layers_to_transform: the model's layers are one module for a scan; leave it out")
    if not scanned and len(layers) != config.num_layers:
        raise ValueError(
            f"{family.layers} has {len(layers)} layers, the config {config.num_layers}; pass one that fits"
        )
    for i, layer in enumerate(layers):
        found = {site for linear in family.linears if module_at(layer, linear.path) for site in linear.sites}
        if missing := set(weights.config.target_modules) - found:
            known = ", ".join(site for site in SITES if site in found)
            raise ValueError(f"layer {i} has no {', '.join(missing)}; choose target_modules from {known}")


def placed(adapter: Adapter, mesh: Any, config: ModelConfig) -> Adapter:
    """One layer's weights, sharded over the backbone's mesh by our own rules. Its axis `tensor` may be called tp."""
    if mesh is None:
        return adapter
    names = {"tensor": "tp"} if "tp" in mesh.axis_names else {}
    sizes = {axis: mesh.shape.get(names.get(axis, axis), 1) for axis in ("data", "fsdp", "tensor")}

    def one(variable):
        split = (names.get(axis, axis) for axis in partition(*named_axes(variable, config), sizes))
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in split))
        return variable.replace(jax.device_put(variable.get_value(), NamedSharding(mesh, spec)))

    return jax.tree.map(one, adapter, is_leaf=is_variable)


def variables(adapter: Adapter) -> list[Any]:
    return jax.tree.leaves(adapter, is_leaf=is_variable)


def warn_of_difference(model: nnx.Module, backbone: Transformer, family: Family) -> None:
    tokens = jnp.arange(64)[None] * 7 % backbone.config.vocab_size
    gap = compare_backbones(model, backbone, tokens, family=family)
    if gap > (0.1 if backbone.dtype == jnp.bfloat16 else 0.01):
        log.warning(
            "%s and the backbone compute different functions: their logits differ by %.3g of their size. An adapter "
            "trained on one will not work on the other",
            type(model).__name__,
            gap,
        )
