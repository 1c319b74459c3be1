"""The work of a training step on each chip, and the minimum time for it: an estimate from the chip's published peaks,
never a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from para_jax.backbone.load import load_model_config
from para_jax.config import SITES, ModelConfig, RunConfig
from para_jax.estimate.longest_row import RowPart, longest_split, parts_of_row
from para_jax.runtime.devices import matrix_weights
from para_jax.training.loss import CHUNK
from para_jax.training.passes import lay_out


class Chip(NamedTuple):
    """The peak rates of one chip, per second."""

    flops: float
    """bfloat16"""
    hbm: float
    """bytes read from or written to main memory"""
    ici: float
    """bytes received from other chips, over all links together"""


#: From cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e: "Peak compute per chip (bf16)", "HBM bandwidth per chip", and
#: half of "Bidirectional inter-chip interconnect (ICI) bandwidth (per chip)", as bytes arrive on half of it. The v4
#: page lacks this line: its "All-reduce bandwidth per Pod" divided by the chips, which on v5e and v6e equals that half.
CHIPS = {
    "v4": Chip(275e12, 1200e9, 1.1e15 / 4096),
    "v5e": Chip(197e12, 819e9, 400e9 / 2),
    "v5p": Chip(459e12, 2765e9, 1200e9 / 2),
    "v6e": Chip(918e12, 1638e9, 800e9 / 2),
}
#: How often a device receives the bytes in hlo.collective_bytes: an all-reduce scatters sums, then gathers.
#: It holds for large groups. In a group of n a device receives (n - 1) / n of that, so half of it in a group of two.
RECEIVED = {"all-reduce": 2}


class Work(NamedTuple):
    """The work of a step on each chip."""

    flops: float
    hbm_bytes: float


class TimeEstimate(NamedTuple):
    """The work of a step on each chip, and the minimum time for it: the time of the slowest part, as if the chip did
    all parts in parallel at their published peaks. A real step takes longer, except if it is bound by the ICI of an
    axis of few chips: there ici_bytes is up to twice too high."""

    flops: float
    hbm_bytes: float
    ici_bytes: float
    seconds: float
    bound: str
    """the slowest part: FLOPs, HBM or ICI"""
    parts: dict[str, float]
    """seconds of each part"""


def estimate_time(work: Work, collectives: Mapping[str, int], kind: str) -> TimeEstimate:
    """The estimate for a kind of chip ("v5e").

    Args:
        collectives: bytes by kind of collective, from hlo.collective_bytes.
    """
    chip = CHIPS[kind]
    ici = float(sum(RECEIVED.get(name, 1) * size for name, size in collectives.items()))
    parts = {"FLOPs": work.flops / chip.flops, "HBM": work.hbm_bytes / chip.hbm, "ICI": ici / chip.ici}
    bound = max(parts, key=lambda part: parts[part])
    return TimeEstimate(work.flops, work.hbm_bytes, ici, parts[bound], bound, parts)


def training_work(config: RunConfig, mesh: Mesh | AbstractMesh, tenants: int = 1) -> Work:
    """The work of a training step whose rows have the maximum length and only completion tokens (or, packed, one
    example): the matrix products of the backbone, attention and the head, in the forward pass, in its recomputation by
    train.remat, and in the backward pass to the activations (the weights are frozen). With scope response, the prompts
    of the maximum length have a forward pass alone.

    HBM counts the weights of these products, their inputs and outputs, logits, and the scores of plain attention.
    Adapters, optimiser, norms and elementwise operations are not counted.
    """
    model, layout = load_model_config(config.backbone.source), lay_out(config, mesh, tenants)
    prompts, trained = parts_of_row(config, model)
    (_, completion), remat = longest_split(config), config.train.remat
    dtype = jnp.dtype(config.backbone.dtype or "bfloat16")
    rows = layout.passes * layout.pass_rows / mesh.size  # per chip, as if `tensor` split them too
    rows_held, tensor = layout.pass_rows / (mesh.size / mesh.shape["tensor"]), mesh.shape["tensor"]
    chunks = -(-rows_held * completion * model.vocab_size / tensor // CHUNK)
    linear_runs = 2 + (recomputed_share(config, model) if remat == "block" else 0)
    attention_runs = 3 + (remat != "none") + (0.5 if trained.kernel == "splash" else 0)  # backward: 2, splash's scores
    head_runs = 3 if chunks > 1 else 2

    weights, head = matrix_weights(model), model.width * model.vocab_size
    weight_bytes = 1 if config.backbone.quantize == "int8" else dtype.itemsize
    through = sum(model.site_input_width(site) + model.site_width(site) for site in SITES) * model.num_layers
    flops = rows * completion * 2 * head * head_runs
    hbm = layout.passes * head * dtype.itemsize * head_runs * chunks / tensor
    hbm += rows * completion * 2 * 4 * model.vocab_size * head_runs
    forward = [(prompts, 1, 1)] if prompts else []
    for part, linear, attention in [(trained, linear_runs, attention_runs), *forward]:
        seen = sum(keys_of(part, kind.window) for kind in model.kinds)
        flops += rows * part.tokens * (2 * weights * linear + 4 * seen * model.q_width * attention)
        hbm += layout.passes * weights * weight_bytes * linear / tensor
        hbm += rows * part.tokens * through * dtype.itemsize * linear
        if part.kernel == "plain":
            hbm += rows * part.tokens * 2 * 4 * seen * model.num_heads * attention
    return Work(flops, hbm)


def keys_of(part: RowPart, window: int | None) -> float:
    """The mean number of keys per token of a part that its kernel computes."""
    return part.context - part.tokens + keys_seen(part.tokens, window, part.kernel)


def recomputed_share(config: RunConfig, model: ModelConfig) -> float:
    """The share of a layer's matrix products that the backward pass recomputes: all but the last one, whose output only
    an adapter on it needs."""
    last = model.num_layers * model.site_input_width("down_proj") * model.site_width("down_proj")
    adapted = "down_proj" in config.adapter.target_modules
    return 1 - (0 if adapted else last / matrix_weights(model))


def keys_seen(length: int, window: int | None, kernel: str) -> float:
    """The mean number of keys per token that a kernel computes: all for plain attention, visible ones for splash."""
    if kernel == "plain":
        return length
    reach = min(length, window or length)
    return reach - reach * (reach - 1) / (2 * length)
