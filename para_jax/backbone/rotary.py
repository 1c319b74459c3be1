"""Rotary position embeddings in the rotate-half form (arXiv:2104.09864), with the scalings of published models."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import DividedRotaryConfig, RotaryConfig


def rotary_tables(
    config: RotaryConfig, positions: Int[Array, "*axes"]
) -> tuple[Float[Array, "*axes half"], Float[Array, "*axes half"]]:
    """Cosines and sines, float32 [..., dims / 2], of integer positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    if isinstance(config, DividedRotaryConfig):
        return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float[Array, "*axes length half"],
    sin: Float[Array, "*axes length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the first dims of every head of x [batch, length, heads, head_dim].

    Args:
        cos, sin: [(batch,) length, dims / 2], from rotary_tables.
    """
    half = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second, rest = (
        x[..., :half].astype(jnp.float32),
        x[..., half : 2 * half].astype(jnp.float32),
        x[..., 2 * half :],
    )
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)


def inverse_frequencies(config: RotaryConfig) -> np.ndarray:
    """Radians per position, float32 [dims / 2]."""
    frequencies = config.theta ** -(np.arange(0, config.dims, 2, dtype=np.float64) / config.dims)
    if isinstance(config, DividedRotaryConfig):
        frequencies = frequencies / config.divisors
    if config.scaling == "linear":
        frequencies = frequencies / config.factor
    if config.scaling == "llama3":
        frequencies = llama3_scaled(frequencies, config)
    return frequencies.astype(np.float32)


def llama3_scaled(frequencies: np.ndarray, config: RotaryConfig) -> np.ndarray:
    """Llama 3.1's rule: frequencies with wavelengths (in positions) above original / low_freq_factor are divided by the
    factor, those below original / high_freq_factor stay, and those in between are interpolated."""
    wavelengths = 2 * np.pi / frequencies
    rotations = config.original_max_positions / wavelengths
    blend = np.clip((rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor), 0, 1)
    return (1 - blend) * frequencies / config.factor + blend * frequencies


def yarn_divisors(
    config: RotaryConfig, factor: float, original: int, beta_fast: float, beta_slow: float, truncate: bool
) -> tuple[float, ...]:
    """What YaRN (arXiv:2309.00071, section 3.2) divides each frequency by: from 1 where a frequency turns `beta_fast`
    times within the original length, to `factor` where it turns `beta_slow` times. `truncate` rounds both ends
    outwards to whole dimensions."""

    def dimension(turns: float) -> float:
        return config.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dims - 1)
    ramp = np.clip((np.arange(config.dims // 2) - low) / (high - low or 0.001), 0, 1)
    return tuple(float(each) for each in 1 / (1 - ramp + ramp / factor))
