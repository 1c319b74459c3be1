"""Tries an attention kernel when a model is loaded: forward and backward on short rows, compared with plain attention.
So a kernel that fails on this machine is found before anything else runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..config import ModelConfig
from ..io.messages import say
from ..runtime.processes import gather_texts
from .kernel_choice import AttentionChoice, attention_kernel
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

    Raises ValueError for a named kernel that cannot run here or fails the trial.
    """
    choice = AttentionChoice(name)
    platform = platform or (jax.default_backend() if mesh is None else str(mesh.devices.flat[0].platform))
    kernel, _ = attention_kernel(config, LENGTH, dtype, platform, choice, capability=capability)
    if kernel == "plain":
        return choice
    problem = first_on_any_process(trial_problem(kernel, config, dtype, packed=False))
    if problem and name != "auto":
        raise ValueError(f"backbone.attention={name} failed a trial on this machine: {problem}. Use auto or plain.")
    if problem:
        say(f"attention: plain, because {kernel} failed a trial: {problem}")
        return AttentionChoice("plain", f"{kernel} failed a trial")
    problem = first_on_any_process(trial_problem(kernel, config, dtype, packed=True))
    if problem and name == "auto":
        say(f"attention: plain in packed rows, because {kernel} failed a trial with them: {problem}")
        return AttentionChoice(name, packed_why=f"{kernel} failed a trial with packed rows")
    return choice


def trial_problem(kernel: str, config: ModelConfig, dtype, *, packed: bool) -> str | None:
    """What went wrong in a trial on this process's first device, in one line; None if it passed. Each process
    tries for itself, so a trial that fails on one holds up no other."""
    draw, heads, kv_heads = np.random.default_rng(0), config.num_heads, config.num_kv_heads
    shapes = [(1, LENGTH, count, config.head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    given = [jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes]
    try:
        plain, tried = (
            jax.block_until_ready(jax.jit(trial_program(name, config, packed))(*given)) for name in ("plain", kernel)
        )
    except Exception as error:  # compilers, drivers and libraries raise errors of any kind
        said = (str(error).strip().splitlines() or [""])[0].strip()[:200]
        return f"{type(error).__name__}: {said}" if said else type(error).__name__
    for name, found, expected in zip(("values", "dq", "dk", "dv"), tried, plain, strict=True):
        a, b = (np.asarray(array, np.float32) for array in (found, expected))
        error, largest = float(abs(a - b).max()), float(abs(b).max())
        if not error <= TOLERANCE * largest:  # true for NaN as well
            return f"its {name} differ from plain attention's by {error:.2g}, where the largest is {largest:.2g}"
    return None


def trial_program(kernel: str, config: ModelConfig, packed: bool):
    """Attention's output, summed over the kinds of layers, and its gradients with respect to queries, keys and
    values."""

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


def first_on_any_process(problem: str | None) -> str | None:
    """The first problem on any process, on all of them: they must all run the same program."""
    if jax.process_count() == 1:
        return problem
    return next((text for text in gather_texts(problem or "") if text), None)
