"""PARA's vector generator (arXiv:2502.01033): it makes the factors on Q, V and Up from a hidden state, once per prompt.

[S] seen in a source, [D] derived, [C] our choice, because no source that could be read says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..config import ModelConfig, ParaConfig
from ..runtime.sharding import is_variable
from .adapter import Adapter, AdapterParam, BiasParam, Factors, describe, named_leaves, token_at
from .formats.own import ValueCounts, join_layers, layer_name
from .method import Method


class Para(Adapter):
    """One layer's generator. With x the residual stream that enters the layer, before its input norm:

        s = pool(x over the prompt's tokens)       [S] "a pooler"; [C] the last prompt token
        z = act(s W_down)                          [S]; [C] GELU in its erf form
        l = 1 + z W_up                             [S]; [C] "1 +", and a W_up that starts from zero
        l_q, l_v, l_u = split(l)                   [S]; one matrix per site in memory
        Q' = l_q Q, V' = l_v V, U' = l_u U         [S]; [C] straight after the linear, before q-norm and rotary

    A fresh adapter is exactly the backbone. Without biases r = 12 gives the paper's 8.9M on LLaMA-2 7B [D].

    With the pooler `constant` [C], s is a learned vector per layer instead of the prompt's state. It starts from
    N(0, 1). Everything else is the same, so PARA's score minus that of this control is what reading the prompt is
    worth. Its factors do not depend on the prompt: a trained one is an (IA)^3 adapter (`export_ia3`).

    With `up_bias` [C], l = 1 + c + z W_up: a learned constant c, which starts from zero, next to the prompt's part.

    With `layers_to_transform` [C] only those layers have a generator; in the others l = 1.

    With `late_r` [C] the last third of the layers has this rank, and the others have r. The arrays have the larger of
    the two. Past a layer's rank they are zero, and stay so: act(0) = 0, so z has no gradient there, and W_up neither.
    """

    def __init__(self, config: ParaConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.params(), (model.width, config.array_r), jnp.float32) * model.width**-0.5  # [C]
        self.down = AdapterParam(down, axes=("width", "rank"))

        def up(site: str) -> AdapterParam:
            zeros = jnp.zeros((config.array_r, model.site_width(site)), jnp.float32)
            return AdapterParam(zeros, axes=("rank", model.site_axis(site)))

        self.up = nnx.Dict({site: up(site) for site in config.target_modules})
        if config.up_bias:
            self.up_bias = nnx.Dict(
                {
                    site: BiasParam(jnp.zeros(model.site_width(site), jnp.float32), axes=(model.site_axis(site),))
                    for site in config.target_modules
                }
            )
        if config.pooler == "constant":
            self.constant = AdapterParam(jax.random.normal(rngs.params(), (model.width,), jnp.float32), axes=("width",))
        self.config = config
        self.backbone = describe(model)

    @staticmethod
    def layers(config: ParaConfig, num_layers: int) -> Sequence[int]:
        """The layers that have a generator. Raises ValueError for one that the backbone lacks."""
        chosen = config.layers_to_transform
        if chosen is None:
            return range(num_layers)
        if chosen[-1] >= num_layers:
            raise ValueError(
                f"layers_to_transform {chosen} names layer {chosen[-1]}; the backbone has layers 0 to {num_layers - 1}"
            )
        return chosen

    def pool(
        self, x: Float[Array, "length width"], prompt_length: Int[Array, ""], start: Int[Array, ""] | int = 0
    ) -> Float[Array, " width"]:
        return POOLERS[self.config.pooler](x, prompt_length, start)

    def condition(self, summary: Float[Array, " width"]) -> Factors:
        """The factors, made in float32 on every device. JAX's default precision rounds the operands of a product to
        bfloat16 on a TPU and to TF32 on a GPU. This runs once per prompt, so full precision costs next to nothing."""
        summary = self.constant[...] if self.config.pooler == "constant" else summary.astype(jnp.float32)
        if self.config.summary == "rms":  # [C]: from layer to layer it grows from 0.1 to 29
            summary = summary * jax.lax.rsqrt(jnp.mean(summary * summary) + 1e-6)
        hidden = ACTIVATIONS[self.config.activation](exact_product(summary, self.down[...]))
        distance = {site: exact_product(hidden, up[...]) for site, up in self.up.items()}
        if self.config.up_bias:
            distance = {site: self.up_bias[site][...] + of_prompt for site, of_prompt in distance.items()}
        return Factors(distance)

    @property
    def ranks(self) -> np.ndarray:
        """The rank of each layer that has a generator."""
        count = self.backbone.num_layers
        return np.array([self.config.rank_of(i, count) for i in self.layers(self.config, count)])

    def started(self) -> Para:
        if self.config.late_r is None:
            return self
        within = jnp.arange(self.config.array_r) < self.ranks[:, None]  # [layers, rank]
        started = jax.tree.map(lambda leaf: leaf, self)
        started.down[...] = jnp.where(within[:, None], self.down[...], 0)
        return started

    @property
    def unused(self) -> int:
        count, widths = self.backbone.num_layers, dict(self.backbone.site_widths)
        each = self.backbone.width + sum(widths[site] for site in self.config.target_modules)
        layers = len(self.layers(self.config, count))
        return (layers * self.config.array_r - self.config.total_rank(count)) * each

    def normal(self, model: ModelConfig) -> Para:
        """The same adapter with a generator of the same rank in every layer."""
        if self.config.layers_to_transform is None and self.config.late_r is None:
            return self
        normal = jax.tree.map(lambda leaf: leaf, self.in_all_layers())
        normal.config = replace(self.config, layers_to_transform=None, late_r=None, r=self.config.array_r)
        return normal

    def in_all_layers(self) -> Para:
        """The adapter with zeros in the layers without a generator: their factors are one."""
        layers = self.config.layers_to_transform
        if layers is None:
            return self

        def spread(variable):
            held = variable.get_value()
            filled = jnp.zeros((self.backbone.num_layers, *held.shape[1:]), held.dtype)
            return variable.replace(filled.at[np.array(layers)].set(held))

        return jax.tree.map(spread, self, is_leaf=is_variable)

    @property
    def reads_prompt(self) -> bool:
        return self.config.pooler != "constant"


def exact_product(x: Float[Array, " in"], weights: Float[Array, "in out"]) -> Float[Array, " out"]:
    """x @ weights in float32, whatever the device does by default."""
    return jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST)


def last(x: Float[Array, "length width"], prompt_length, start=0) -> Float[Array, " width"]:
    return token_at(x, start + prompt_length - 1)


def mean(x: Float[Array, "length width"], prompt_length, start=0) -> Float[Array, " width"]:
    return jnp.sum(jnp.where(in_prompt(x, prompt_length, start), x.astype(jnp.float32), 0), axis=0) / prompt_length


def in_prompt(x: Float[Array, "length width"], prompt_length, start) -> Bool[Array, "length 1"]:
    after = jnp.arange(x.shape[0]) - start
    return ((after >= 0) & (after < prompt_length))[:, None]


#: Poolers: (x [length, width], length of the prompt, position of its first token) -> [width]. For `constant` the result
#: is not used.
POOLERS: dict[str, Callable] = {"last": last, "mean": mean, "constant": last}

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


#: The rate at which the raw summary learnt best on a Gemma model, on three tasks (scripts/experiments/README.md).
LARGEST_GEMMA_RATE = 1e-4


def raw_on_gemma(config: ParaConfig, model: ModelConfig, rate: float) -> str | None:
    """PARA's `Method.doubt`."""
    reads = config.summary == "raw" and config.pooler != "constant"
    if not reads or model.norm_offset != 1 or rate <= LARGEST_GEMMA_RATE:
        return None
    return (
        f"learning rate {rate:g}: hidden states of Gemma models are large, and with adapter.summary=raw PARA may learn "
        f"little at more than {LARGEST_GEMMA_RATE:g}; set train.learning_rate={LARGEST_GEMMA_RATE:g} or auto, or "
        "adapter.summary=rms with a rate of 1e-2"
    )


# ----------------------------------------------------------------------------------------------------------- the folder


def para_tensors(adapter: Adapter) -> dict[str, jax.Array | np.ndarray]:
    """The tensors by name, [out, in]; the rows of para_up.weight are in the order of the sites."""
    config, leaves, count = adapter.config, named_leaves(adapter), adapter.backbone.num_layers
    tensors = {}
    for place, i in enumerate(adapter.layers(config, count)):
        r = config.rank_of(i, count)
        ups = [leaves[f"up.{site}"][place, :r].T for site in config.target_modules]
        tensors[layer_name(i, "para_down.weight")] = leaves["down"][place, :, :r].T
        tensors[layer_name(i, "para_up.weight")] = jnp.concatenate(ups)
        if config.up_bias:
            biases = [leaves[f"up_bias.{site}"][place] for site in config.target_modules]
            tensors[layer_name(i, "para_up.bias")] = jnp.concatenate(biases)
        if config.pooler == "constant":
            tensors[layer_name(i, "para_constant")] = leaves["constant"][place]
    return tensors


def para_leaves(
    config: ParaConfig, model: ModelConfig, tensors: dict[str, np.ndarray]
) -> tuple[ParaConfig, dict[str, np.ndarray]]:
    stacked = join_layers({name: in_array_rank(name, tensor, config.array_r) for name, tensor in tensors.items()})
    ends = np.cumsum([model.site_width(site) for site in config.target_modules])[:-1]
    ups = np.split(stacked["para_up.weight"].swapaxes(1, 2), ends, axis=2)
    leaves = {f"up.{site}": up for site, up in zip(config.target_modules, ups, strict=True)}
    if config.up_bias:
        biases = np.split(stacked["para_up.bias"], ends, axis=1)
        leaves |= {f"up_bias.{site}": bias for site, bias in zip(config.target_modules, biases, strict=True)}
    leaves["down"] = stacked["para_down.weight"].swapaxes(1, 2)
    if config.pooler == "constant":
        leaves["constant"] = stacked["para_constant"]
    return config, leaves


def in_array_rank(name: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    """A layer's tensor with zeros up to the rank of the arrays."""
    axis = {"para_down.weight": 0, "para_up.weight": 1}.get(".".join(name.split(".")[-2:]))
    if axis is None or tensor.shape[axis] == rank:
        return tensor
    room = [(0, rank - size if i == axis else 0) for i, size in enumerate(tensor.shape)]
    return np.pad(tensor, room)


def para_values(config: ParaConfig, backbone: dict, read_shapes: Callable) -> ValueCounts:
    """Counted from the config alone, so that a folder without its weights can be inspected."""
    count, width, carried = backbone["num_layers"], backbone["width"], sum(backbone["site_widths"].values())
    layers = count if config.layers_to_transform is None else len(config.layers_to_transform)
    vectors = carried if config.up_bias else 0
    if config.pooler == "constant":
        vectors += width
    each = width + carried  # numbers per rank of a layer
    return ValueCounts(matrices=config.total_rank(count) * each, vectors=layers * vectors, carried=count * carried)


def para_outline(config: ParaConfig) -> str:
    rank = f"{config.r} ({config.late_r} in the last third of the layers)" if config.late_r else str(config.r)
    text = f"Rank {rank} on {', '.join(config.target_modules)}; pooler {config.pooler}, "
    text += f"summary {config.summary}, activation {config.activation}"
    if config.up_bias:
        text += ", W_up with a bias"
    if config.layers_to_transform:
        text += f"; layers {', '.join(map(str, config.layers_to_transform))}"
    return text


PARA = Method(
    name="para",
    label="PARA",
    peft_type="PARA",
    config=ParaConfig,
    adapter=Para,
    rank=lambda config: config.array_r,
    group_config=lambda config, sites, max_r: replace(config, target_modules=sites, r=max_r, late_r=None),
    doubt=raw_on_gemma,
    outline=para_outline,
    to_tensors=para_tensors,
    from_tensors=para_leaves,
    count_values=para_values,
)
