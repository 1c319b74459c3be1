"""Which attention kernel a model uses: what was asked for, what a trial at start found, and the rules of `auto`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..config import ATTENTION, ModelConfig, require

LANES = 128  # splash attention takes lengths in multiples of this; others are padded
#: Head widths that cuDNN's flash attention takes, by the least compute capability (jax._src.cudnn.
#: fused_attention_stablehlo, check_is_flash_attention). JAX itself checks nothing below 8.0, where no kernel exists.
CUDNN_HEADS = {(9, 0): 256, (8, 0): 128}


@dataclass(frozen=True)
class AttentionChoice:
    """What a model carries: `backbone.attention`, or plain where a trial of the kernel failed."""

    name: str = "auto"
    why: str = ""
    """why it is plain, where that was not asked for"""
    packed_why: str = ""
    """why packed rows alone use plain attention"""


AUTO = AttentionChoice()


def asked_for(name: str) -> AttentionChoice:
    """The choice of a name. Raises ValueError for an unknown one."""
    require(name in ATTENTION, "backbone.attention", name, " or ".join(ATTENTION))
    return AttentionChoice(name)


def attention_kernel(
    config: ModelConfig,
    length: int,
    dtype,
    platform: str,
    choice: AttentionChoice = AUTO,
    *,
    packed: bool = False,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """The name of the kernel for sequences of this length, and why it is that one.

    Args:
        packed: whether rows hold several examples.
        capability: a GPU's compute capability; default: that of this process's first GPU.

    Raises ValueError where the choice names a kernel that can't work here.
    """
    if choice.name == "plain":
        return "plain", choice.why or "backbone.attention=plain"
    problems = {"splash": None if platform == "tpu" else f"it runs on a TPU, and this is a {platform.upper()}"}
    problems["cudnn"] = cudnn_problem(config, length, dtype, platform, packed, capability)
    if choice.name != "auto":
        problem = problems[choice.name]
        if problem:
            raise ValueError(f"backbone.attention={choice.name} can't work: {problem}. Use auto or plain.")
        return choice.name, f"backbone.attention={choice.name}"
    if packed and choice.packed_why:
        return "plain", choice.packed_why
    if platform == "tpu":
        return ("splash", "on a TPU") if length >= LANES else ("plain", f"rows shorter than {LANES} tokens")
    if platform == "gpu":
        return ("plain", problems["cudnn"]) if problems["cudnn"] else ("cudnn", "on a GPU")
    return "plain", f"on a {platform.upper()}"


def cudnn_problem(
    config: ModelConfig, length: int, dtype, platform: str, packed: bool, capability: tuple[int, int] | None
) -> str | None:
    """Why cuDNN can't compute a model's attention, if it can't."""
    if platform != "gpu":
        return f"it runs on an NVIDIA GPU, and this is a {platform.upper()}"
    capability = capability or own_capability()
    if capability is None:
        return "cuDNN needs an NVIDIA GPU, and JAX does not tell this device's compute capability"
    widest = next((width for least, width in CUDNN_HEADS.items() if capability >= least), None)
    shown = ".".join(map(str, capability))
    if widest is None:
        return f"cuDNN's flash attention needs compute capability 8.0, and this GPU has {shown}"
    if config.attention_softcap is not None:
        return "cuDNN has no soft cap"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN does not take {jnp.dtype(dtype)}"
    if config.head_dim % 8 or config.head_dim > widest:
        return f"cuDNN takes heads of a multiple of 8, at most {widest} wide on this GPU, not {config.head_dim}"
    if packed and length % 2:
        return f"cuDNN takes packed rows of even length, not {length}"
    return None


def own_capability() -> tuple[int, int] | None:
    """The compute capability of this process's first GPU; None without an NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return (int(match[1]), int(match[2])) if match else None


def describe_attention(
    config: ModelConfig, dtype, platform: str, choice: AttentionChoice, lengths: Iterable[int], *, packed: bool = False
) -> str:
    """A line that names the kernels of training's rows, of evaluation's, which are never packed, and of decoding."""

    def named(lengths: Iterable[int], packed: bool) -> str:
        found = {attention_kernel(config, n, dtype, platform, choice, packed=packed) for n in lengths}
        return "; ".join(f"{kernel} ({why})" for kernel, why in sorted(found))

    training, evaluation = named(lengths, packed), named((LANES - 1, LANES), False)
    other = f"; evaluation: {evaluation}" if evaluation != training else ""
    return f"attention: {training}{other}; decode: {describe_decode(platform)}"


def describe_decode(platform: str) -> str:
    """How much of the cache a decode step reads; see cache_blocks."""
    if platform == "tpu":
        return "plain, a cache beyond 512 tokens up to the longest row (on a TPU)"
    return f"plain, all of the cache (on a {platform.upper()})"
