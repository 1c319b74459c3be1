"""Rotary position embeddings in the rotate-half form (arXiv:2104.09864), with the scalings of published models."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import RotaryConfig


def rotary_tables(
    config: RotaryConfig, positions: Int[Array, "*axes"]
) -> tuple[Float[Array, "*axes half"], Float[Array, "*axes half"]]:
    """Cosines and sines, float32 [..., dims / 2], of integer positions [...]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
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
