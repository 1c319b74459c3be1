"""Which attention kernel a model uses: the user's setting, the result of a trial at start, and the rules of `auto`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..config import ModelConfig

LANES = 128  # splash attention takes lengths in multiples of this; others are padded
#: The largest head width of cuDNN's flash attention, by minimum compute capability (jax._src.cudnn.
#: fused_attention_stablehlo, check_is_flash_attention). Below 8.0 there is no kernel, but JAX does not check that.
CUDNN_HEADS = {(9, 0): 256, (8, 0): 128}


@dataclass(frozen=True)
class AttentionChoice:
    """A model's attention setting: `backbone.attention`, or plain if a trial of the kernel failed."""

    name: str = "auto"
    why: str = ""
    """why it is plain, if the user did not ask for that"""
    packed_why: str = ""
    """why packed rows, and only they, use plain attention"""


def attention_kernel(
    config: ModelConfig,
    length: int,
    dtype,
    platform: str,
    choice: AttentionChoice,
    *,
    packed: bool = False,
    capability: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """(kernel, reason) for sequences of this length.

    Args:
        packed: whether rows hold several examples.
        capability: the GPU's compute capability; default: that of this process's first GPU.

    Raises ValueError if the choice names a kernel that cannot run here.
    """
    if choice.name == "plain":
        return "plain", choice.why or "backbone.attention=plain"
    problems = {"splash": None if platform == "tpu" else f"it needs a TPU, and this is a {platform.upper()}"}
    problems["cudnn"] = cudnn_problem(config, dtype, platform, capability)
    if choice.name != "auto":
        problem = problems[choice.name]
        if problem:
            raise ValueError(f"backbone.attention={choice.name} cannot run: {problem}. Use auto or plain.")
        return choice.name, f"backbone.attention={choice.name}"
    if packed and choice.packed_why:
        return "plain", choice.packed_why
    if platform == "tpu":
        return ("splash", "on a TPU") if length >= LANES else ("plain", f"rows shorter than {LANES} tokens")
    if platform == "gpu":
        return ("plain", problems["cudnn"]) if problems["cudnn"] else ("cudnn", "on a GPU")
    return "plain", f"on a {platform.upper()}"


def cudnn_problem(config: ModelConfig, dtype, platform: str, capability: tuple[int, int] | None) -> str | None:
    """Why cuDNN cannot compute a model's attention. None if it can."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is a {platform.upper()}"
    capability = capability or own_capability()
    if capability is None:
        return "cuDNN needs an NVIDIA GPU, and JAX does not report this device's compute capability"
    widest = next((width for least, width in CUDNN_HEADS.items() if capability >= least), None)
    version = ".".join(map(str, capability))
    if widest is None:
        return f"cuDNN's flash attention needs compute capability 8.0, and this GPU has {version}"
    if config.attention_softcap is not None:
        return "cuDNN does not support a soft cap"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN does not support {jnp.dtype(dtype)}"
    if config.head_dim % 8 or config.head_dim > widest:
        return (
            f"cuDNN needs a head width that is a multiple of 8 and at most {widest} on this GPU, not {config.head_dim}"
        )
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
    """One line with the kernels for training, for evaluation (which never packs rows), and for decoding."""

    def kernels_of(lengths: Iterable[int], packed: bool) -> str:
        found = {attention_kernel(config, n, dtype, platform, choice, packed=packed) for n in lengths}
        return "; ".join(f"{kernel} ({why})" for kernel, why in sorted(found))

    training, evaluation = kernels_of(lengths, packed), kernels_of((LANES - 1, LANES), False)
    other = f"; evaluation: {evaluation}" if evaluation != training else ""
    return f"attention: {training}{other}; decode: {describe_decode(platform)}"


def describe_decode(platform: str) -> str:
    """How much of the cache a decode step reads (see cache_blocks.py)."""
    if platform == "tpu":
        return "plain, reads a cache beyond 512 tokens up to the longest row (on a TPU)"
    return f"plain, reads the whole cache (on a {platform.upper()})"
