"""Tries an attention kernel when a model is loaded: forward and backward on short rows, compared with plain attention.
So a kernel that fails on this machine is found before anything else runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..config import ModelConfig
from ..io.messages import say
from ..runtime.processes import gather_texts
from ..runtime.sharding import partition
from .kernel_choice import AttentionChoice, attention_kernel, choice_named
from .kernels import KERNELS

#: Tokens per row of the trial.
LENGTH = 256
#: The longest window of the trial: models have longer ones than its rows, and these would be tried as none.
WINDOW = 16
#: The largest difference from plain attention that counts as rounding, relative to the largest value.
TOLERANCE = 0.05


def choose_attention(
    name: str,
    config: ModelConfig,
    dtype,
    mesh: Mesh | None,
    *,
    platform: str | None = None,
    capability: tuple[int, int] | None = None,
) -> AttentionChoice:
    """The attention choice for a model that is being loaded. If `auto` would use a kernel that fails its trial, the
    choice is plain, and a line says why.

    Args:
        name: the value of backbone.attention.
        platform, capability: as for attention_kernel; default: those of the mesh's devices, or of this process.

    Raises ValueError for an unknown name, and for a named kernel that cannot run here or fails the trial.
    """
    choice = choice_named(name)
    platform = platform or (jax.default_backend() if mesh is None else str(mesh.devices.flat[0].platform))
    kernel, _ = attention_kernel(config, LENGTH, dtype, platform, choice, capability=capability)
    if kernel == "plain":
        return choice
    problem = first_on_any_process(trial_problem(kernel, config, dtype, mesh, packed=False))
    if problem and name != "auto":
        raise ValueError(f"backbone.attention={name} failed a trial on this machine: {problem}. Use auto or plain.")
    if problem:
        say(f"attention: plain, because {kernel} failed a trial: {problem}")
        return AttentionChoice("plain", f"{kernel} failed a trial")
    problem = first_on_any_process(trial_problem(kernel, config, dtype, mesh, packed=True))
    if problem and name == "auto":
        say(f"attention: plain in packed rows, because {kernel} failed a trial with them: {problem}")
        return AttentionChoice(name, packed_why=f"{kernel} failed a trial with packed rows")
    return choice


def trial_problem(kernel: str, config: ModelConfig, dtype, mesh: Mesh | None, *, packed: bool) -> str | None:
    """What went wrong in a trial, in one line; None if it passed. The trial uses no communication, so a process whose
    trial fails keeps no other waiting."""
    try:
        plain, tried = (run_kernel(name, config, dtype, mesh, packed) for name in ("plain", kernel))
    except Exception as error:  # compilers, drivers and libraries raise errors of any kind
        said = (str(error).strip().splitlines() or [""])[0].strip()[:200]
        return f"{type(error).__name__}: {said}" if said else type(error).__name__
    for name, found, expected in zip(("values", "dq", "dk", "dv"), tried, plain, strict=True):
        for a, b in zip(own_parts(found), own_parts(expected), strict=True):
            error, largest = float(abs(a - b).max()), float(abs(b).max())
            if not error <= TOLERANCE * largest:  # true for NaN as well
                return f"its {name} differ from plain attention's by {error:.2g}, where the largest is {largest:.2g}"
    return None


def run_kernel(kernel: str, config: ModelConfig, dtype, mesh: Mesh | None, packed: bool) -> tuple[jax.Array, ...]:
    """Attention's output, summed over the kinds of layers, and its gradients with respect to queries, keys and values.
    Each device that holds different rows gets one row."""
    arguments = trial_arguments(config, dtype, mesh)
    if mesh is None:
        return jax.block_until_ready(jax.jit(trial_program(kernel, config, packed))(*arguments))
    out = tuple(array.sharding for array in (arguments[0], *arguments[:3]))
    with jax.set_mesh(mesh):
        program = jax.jit(trial_program(kernel, config, packed), out_shardings=out)
        return jax.block_until_ready(program(*arguments))


def trial_program(kernel: str, config: ModelConfig, packed: bool):
    def forward_and_backward(q, k, v, weights):
        def mixed(q, k, v):
            rows = jnp.broadcast_to(jnp.arange(LENGTH) // (LENGTH // 2), (q.shape[0], LENGTH)) if packed else None
            windows = dict.fromkeys(kind.window and min(kind.window, WINDOW) for kind in config.kinds)
            attends = [KERNELS[kernel](LENGTH, window, rows) for window in windows]
            found = [attend(q, k, v, config.attention_scale, config.attention_softcap)[0] for attend in attends]
            return sum(found[1:], start=found[0])

        values, backward = jax.vjp(mixed, q, k, v)
        return values, *backward(weights)

    return forward_and_backward


def trial_arguments(config: ModelConfig, dtype, mesh: Mesh | None) -> list[jax.Array]:
    """Queries, keys, values and output gradients, sharded as the kernels expect, so that nothing is communicated."""
    rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    arrays = []
    for seed, heads in enumerate((config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)):
        drawn = np.random.default_rng(seed).normal(size=(1, LENGTH, heads, config.head_dim))
        values = np.broadcast_to(drawn, (rows, *drawn.shape[1:])).astype(jnp.dtype(dtype))
        if mesh is None:
            arrays.append(jnp.asarray(values))
            continue
        counts = (rows, LENGTH, config.num_kv_heads, config.head_dim)
        sharding = NamedSharding(mesh, partition(("batch", None, "kv_heads", None), counts, mesh.shape))
        arrays.append(jax.make_array_from_callback(values.shape, sharding, lambda index, values=values: values[index]))
    return arrays


def own_parts(array: jax.Array) -> list[np.ndarray]:
    return [np.asarray(shard.data).astype(np.float32) for shard in array.addressable_shards]


def first_on_any_process(problem: str | None) -> str | None:
    """The first problem on any process, on all of them: they must all run the same program."""
    if jax.process_count() == 1:
        return problem
    return next((text for text in gather_texts(problem or "") if text), None)
