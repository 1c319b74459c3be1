"""What XLA's compilers say of LoRA's two forms in bench_ragged.py, and of PARA: one layer of LLaMA-2 7B and its head,
compiled for a CPU (float32) and for one v5e chip (bfloat16). Nothing runs, and no weights are made.

FLOPs and bytes are those of the compiler's own cost model. Every adapter has LoRA's r=8 on all linears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from bench_ragged import LORA, PARA, ROWS, summed_by_rows, summed_ragged
from jax.sharding import NamedSharding, PartitionSpec
from program_counts import describe_program
from ragged_lora import ragged_adjustments

from para_jax import ParaConfig, Rows, Stack, init_adapter, load_model_config, make_mesh, pick, prefill, stack_adapters
from para_jax.adapters.rows import layers_first
from para_jax.backbone.load import abstract_backbone
from para_jax.config import SITES
from para_jax.data.batches import Batch
from para_jax.estimate.topology import topology_devices
from para_jax.model.adapted import decode_step

SOURCE, LAYERS = "meta-llama/Llama-2-7b-hf", 1
CACHE = 512  # tokens
SIX_SITES = ParaConfig(target_modules=tuple(site for site in SITES if site != "k_proj"))  # decodes alike for every r
TENANTS, EACH, PROMPT, COMPLETION = 16, 2, 58, 6  # of a training batch: 16 tenants with 2 rows of 64 tokens
PLATFORMS = {"cpu": jnp.float32, "tpu v5e": jnp.bfloat16}


def compiled_counts() -> dict:
    """Counts by platform and program."""
    return {"libtpu": version("libtpu")} | {platform: dict(counts_of(platform)) for platform in PLATFORMS}


def counts_of(platform: str) -> Iterator[tuple[str, dict]]:
    config = load_model_config(SOURCE)
    config = replace(config, kinds=config.kinds[:LAYERS])
    model = abstract_backbone(config, PLATFORMS[platform], layout="layers")
    mesh = make_mesh(devices=topology_devices("v5e:1x1", 1)) if platform.startswith("tpu") else None
    for name, (function, *given) in (decode_programs(model) | training_programs(model)).items():
        if mesh is not None:
            given = jax.tree.map(lambda leaf: placed(leaf, mesh), given)
        compiled = jax.jit(function).lower(*given).compile()
        found = describe_program(compiled)
        kernels = len(re.findall(r"%ragged-dot-none[.\d]* =", compiled.as_text() or ""))
        counts = {name: getattr(found, name) for name in ("flops", "bytes_accessed", "temporaries", "products")}
        yield name, counts | {"ragged_kernels": kernels}


def placed(leaf: Any, mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def decode_programs(model) -> dict[str, tuple]:
    """(function, abstract arguments) of one step."""
    index, token = np.arange(ROWS), jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def state(config, count: int) -> Any:
        adapters = None if config is None else abstract_rows(model, config, count, index % count)
        tokens = jax.ShapeDtypeStruct((ROWS, 16), jnp.int32)
        run: Callable = lambda model, adapters, tokens: prefill(model, adapters, tokens, 16, max_length=CACHE)[1]  # noqa: E731
        return jax.eval_shape(run, model, adapters, tokens)

    def ragged(count: int) -> Any:
        weights = weights_of(model, LORA, count)
        made = jax.eval_shape(lambda w: ragged_adjustments(w, index % count, model.dtype), weights)
        return state(None, 0)._replace(adjustments=made)

    of_rows = {"PARA": PARA, "PARA on six sites": SIX_SITES, "LoRA": LORA}
    states = {"base": state(None, 0)} | {f"{name}, any tenants": state(of, ROWS) for name, of in of_rows.items()}
    states |= {f"ragged LoRA, {count} tenants": ragged(count) for count in (1, 8, ROWS)}
    return {f"decode, {ROWS} rows: {name}": (decode_step, model, state, token) for name, state in states.items()}


def training_programs(model) -> dict[str, tuple]:
    """(function, abstract arguments) of forward and backward."""
    numbers = jax.ShapeDtypeStruct((TENANTS * EACH,), jnp.int32)
    tokens: Any = jax.ShapeDtypeStruct((TENANTS * EACH, PROMPT + COMPLETION), jnp.int32)
    batch, index = Batch(tokens, numbers, numbers), np.arange(TENANTS)  # pyright: ignore[reportArgumentType]

    def gradient(summed):
        return jax.value_and_grad(lambda weights, model, batch: summed(model, weights, index, batch, EACH))

    sides = {"LoRA": (summed_by_rows, LORA, TENANTS), "PARA": (summed_by_rows, PARA, TENANTS)}
    sides |= {f"ragged LoRA, of {count}": (summed_ragged, LORA, count) for count in (TENANTS, 64)}
    return {
        f"train, {TENANTS} x {EACH} rows: {name}": (gradient(summed), weights_of(model, config, count), model, batch)
        for name, (summed, config, count) in sides.items()
    }


def weights_of(model, config, count: int) -> Any:
    """Abstract adapters whose arrays lead with (layers, adapters)."""
    stacked = lambda: layers_first(stack_adapters([init_adapter(config, model.config)] * count).adapters)  # noqa: E731
    return jax.eval_shape(stacked)


def abstract_rows(model, config, count: int, index: np.ndarray) -> Rows:
    stack = jax.eval_shape(lambda: Stack(stack_adapters([init_adapter(config, model.config)] * count).adapters))
    return jax.eval_shape(lambda stack: pick(stack, jnp.asarray(index)), stack)
