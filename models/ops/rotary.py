"""Rotary position embedding (Su et al. 2021) on rotated halves, as Hugging Face's models compute it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(head_dim: int, theta: float) -> Float[np.ndarray, " half"]:
    """theta^(-2i/N) for i in [0, N/2), in radians a token."""
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def scale_llama31(
    frequencies: Float[np.ndarray, " half"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> Float[np.ndarray, " half"]:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, the rest blended.

    Args:
        frequencies: radians a token.
        factor: how far the context was extended.
        low_freq_factor: wavelengths above original_max_position / low_freq_factor tokens are stretched whole.
        high_freq_factor: wavelengths below original_max_position / high_freq_factor tokens are kept.
        original_max_position: context length before the extension, in tokens.
    """
    wavelengths = 2.0 * math.pi / frequencies
    smooth = (original_max_position / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1.0 - smooth) * frequencies / factor + smooth * frequencies
    stretched = np.where(wavelengths > original_max_position / low_freq_factor, frequencies / factor, frequencies)
    middle = (wavelengths >= original_max_position / high_freq_factor) & (
        wavelengths <= original_max_position / low_freq_factor
    )
    return np.where(middle, blended, stretched).astype(frequencies.dtype)


def rotary_tables(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of position * frequency, float32."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    # A loop, since the compiler would fuse plain arithmetic into its readers and compute the table anew in every layer,
    # for each head.
    cos, sin = jax.lax.map(lambda which: jnp.where(which, jnp.cos(angles), jnp.sin(angles)), jnp.array([True, False]))
    return cos, sin


def rotate(
    x: Float[Array, "B T H N"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H N"]:
    """Turns the pair (x[i], x[i + N/2]) by the token's angle; computed in float32, returned in x's dtype."""
    x1, x2 = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
