"""The hooks of an attached model: its root finds the prompts, its layers make adjustments from the residual stream, its
linears apply them.

A hooked module keeps its object, attributes and state paths. Only its class becomes a subclass with another __call__,
so isinstance, checkpoints and weight maps work as before. Root and layers talk to those below through context
variables while the model runs, or is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..adapters.acting import acting, batched_adjust, carried
from ..adapters.adapter import Adapter, Adjustment, Shared
from ..adapters.rows import make_of_all, of_groups
from ..adapters.scope import Reach, reach_of_config
from .family import Family, Linear, module_at
from .prompts import prompt_ends


@dataclass(frozen=True)
class Attached:
    """What the root of an attached model knows. It is the same for equal attachments, as nnx compares classes."""

    family: Family
    config: Any
    """of the adapters"""
    reads_prompt: bool
    rule: Any
    """where prompts end in calls that do not say it: has ends(tokens int [batch, T]) -> int32 [batch]; or None"""
    tenants: int | None
    """how many tenants the weights lead with; None: one adapter"""


@dataclass(frozen=True)
class Call:
    """One call of the model."""

    reach: Reach
    start: Any
    """int32 [batch]: the index of each prompt's first token"""
    length: Any
    """int32 [batch]: each prompt's tokens"""
    acts: Any
    """bool [batch, T]: where the adapters act; True: everywhere"""
    tenants: Any
    """int32 [batch], -1 for the base model; None with one adapter for all rows"""
    decodes: bool
    """whether the cache has the adjustments already"""
    known: Any
    """bool [batch]: which rows have a prompt end and a tenant that there is; None: all. The others get NaN, because a
    compiled program can raise no error"""


CALL: ContextVar[Call | None] = ContextVar("call of the model", default=None)
ADJUST: ContextVar[Callable | None] = ContextVar("adjustment of the layer", default=None)


@contextmanager
def within(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@cache
def hooked(base: type, hook: Callable, spec: Any, **methods: Callable) -> type:
    """The subclass of `base` whose __call__ is hook(base's __call__, spec). It has one base, because Python swaps
    classes of one memory layout only."""
    call = hook(base.__call__, spec)
    names = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), names | methods | {"para_base": base, "para_spec": spec})


def root_hook(original: Callable, attached: Attached) -> Callable:
    """The call of a model: `original`'s arguments, and by name `prompt_end` and `tenants`, int32 [batch]."""
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("prompt_end", "tenants")]
    last = len(parameters) - (parameters[-1].kind == inspect.Parameter.VAR_KEYWORD)

    def __call__(self, *args, prompt_end=None, tenants=None, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        index = tenants if tenants is not None else getattr(self, "para_tenants", None)
        call = call_of(attached, list(bound.arguments.values())[1], bound.arguments, prompt_end, index)
        with within(CALL, call):
            return original(*bound.args, **bound.kwargs)

    # Tunix reads which arguments a model has.
    __call__.__signature__ = signature.replace(parameters=[*parameters[:last], *own, *parameters[last:]])
    return __call__


def no_weight_map(self, backend: str = "a rollout engine"):
    """Tunix asks a model for it when its rollouts go to vLLM or SGLang. They would answer for the base model."""
    raise ValueError(f"{backend} has no PARA; use para_jax.foreign.tunix.EngineRollout or ParaRollout")


def call_of(attached: Attached, tokens: jax.Array, arguments: dict, prompt_end: Any, tenants: Any) -> Call:
    rows, length = tokens.shape
    if attached.tenants is None and tenants is not None:
        raise ValueError("tenants: the attached model has one adapter; attach a Stack")
    if attached.tenants is not None:
        if tenants is None or tenants.shape != (rows,):
            shape = getattr(tenants, "shape", None)
            raise ValueError(f"tenants has shape {shape}; give int32[{rows}], an index for each row")
        tenants = jnp.asarray(tenants[...], jnp.int32)
    known = None if tenants is None else (tenants >= -1) & (tenants < attached.tenants)
    cache, reach = arguments.get("cache"), reach_of_config(attached.config, rows)
    zero = jnp.zeros(rows, jnp.int32)
    if cache is not None and any("para" in of_layer for of_layer in cache.values()):
        # Every token of a decode step follows its prompt, which no adapter of scope `prompt` reaches.
        return Call(reach, zero, zero + 1, True, tenants, True, None)
    if reach.everywhere and not attached.reads_prompt:
        return Call(reach, zero, zero + 1, True, tenants, False, known)
    if arguments.get("segment_ids") is not None and arguments.get("attention_mask") is None:
        raise ValueError("segment_ids without attention_mask: packed rows hold several prompts; turn packing off")
    end = prompt_ends(prompt_end, attached.rule, tokens, cache is not None)
    positions = arguments.get(attached.family.positions)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    of_end = jnp.take_along_axis(jnp.asarray(positions, jnp.int32), jnp.maximum(end, 0)[:, None], axis=1)[:, 0]
    start, prompt_length = end - of_end, of_end + 1
    acts = True if reach.everywhere else reach.acts(prompt_length, jnp.arange(length) - start[:, None], None)
    has_end = (end >= 0) & (end < length)
    known = has_end if known is None else known & has_end
    return Call(reach, start, prompt_length, acts, tenants, False, known)


def layer_hook(original: Callable, family: Family) -> Callable:
    """The call of a layer. Its cache gets the entry "para": the adjustment for decoding, or () where there is none."""
    name_of_cache = family.cache or ""
    signature = inspect.signature(original)

    def __call__(self, *args, **kwargs):
        call, adapter = CALL.get(), getattr(self, "para", None)
        if call is None or adapter is None:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        stream = list(signature.parameters)[1 + family.stream]
        x, of_layer = bound.arguments[stream], bound.arguments.get(name_of_cache)
        if call.known is not None:
            x = bound.arguments[stream] = jnp.where(call.known[:, None, None], x, jnp.nan)
        if call.decodes and of_layer is None:
            raise ValueError("a layer without a cache of its own (shared keys and values) can't decode with adapters")
        held = of_layer.get("para", ()) if of_layer else ()
        if of_layer:
            bound.arguments[name_of_cache] = {name: value for name, value in of_layer.items() if name != "para"}
        if call.decodes and not call.reach.decodes:
            adjustment = None
        else:
            adjustment = held[0] if held else make(adapter, x, call)
        adjust = acting(batched_adjust(adjustment), call.acts)
        with within(ADJUST, partial(adjusted, adjust, self)):
            result = original(*bound.args, **bound.kwargs)
        if not of_layer:
            return result
        if not call.decodes and call.reach.decodes and not isinstance(adjustment, Shared):
            held = (carried(adjustment, call.reach, x.dtype),)
        after, *rest = result
        return {**after, "para": held}, *rest

    __call__.__signature__ = signature  # MaxText reads which arguments a layer has
    return __call__


def make(adapter: Adapter, x: jax.Array, call: Call) -> Adjustment:
    """One layer's adjustments, in float32, whose arrays lead with the batch, or a Shared one."""
    if call.tenants is not None:
        return of_groups(adapter, call.tenants, None, 1, x, call.length, call.start)
    return make_of_all(adapter, x, call.length, call.start)


def linear_hook(original: Callable, linear: Linear) -> Callable:
    """The call of a linear."""

    def __call__(self, x, *args, **kwargs):
        y, adjust = original(self, x, *args, **kwargs), ADJUST.get()
        return y if adjust is None else adjust(linear, x, y)

    return __call__


def adjusted(adjust: Callable, layer: nnx.Module, linear: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
    """y after adjust(site, x, y) for each of the linear's sites."""
    x = flat(x, linear.in_axes)

    def one(site: str, y: jax.Array) -> jax.Array:
        made = flat(y, linear.out_axes)
        if linear.bias:
            bias = module_at(layer, linear.path.rpartition(".")[0] + "." + linear.bias)[...].astype(y.dtype)
            made = adjust(site, x, made + bias) - bias
        elif linear.folded:
            scale = y.shape[-1] ** 0.5
            made = adjust(site, x, made * scale) / scale
        else:
            made = adjust(site, x, made)
        return made.reshape(y.shape)

    if len(linear.sites) == 1:
        return one(linear.sites[0], y)
    return jnp.stack([one(site, of_site) for site, of_site in zip(linear.sites, y, strict=True)])


def flat(a: jax.Array, axes: int) -> jax.Array:
    """a with its last axes as one."""
    return a.reshape(*a.shape[: a.ndim - axes], -1)
