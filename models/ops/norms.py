"""Root-mean-square norm (Zhang and Sennrich 2019) and layer norm (Ba et al. 2016), statistics in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], *, eps: float, plus_one: bool
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale.

    Args:
        x: activations.
        scale: one factor a channel; with `plus_one` the factor is `1 + scale`, multiplied in float32 as Gemma does,
            else it multiplies the normalised value in x's dtype as Llama does.
        eps: added to the mean square.
        plus_one: the stored scale is an offset from one.

    Returns:
        Same shape and dtype as x.
    """
    return _rms_norm(x, scale, eps, plus_one)


# The backward pass keeps x and nothing between: what is between is as large as x, and cheap.
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float, plus_one: bool) -> jax.Array:
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if plus_one:
        return (normed * (1.0 + scale.astype(x32.dtype))).astype(x.dtype)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, eps: float, plus_one: bool
) -> Float[Array, "*batch D"]:
    """(x - mean) / sqrt(var + eps) * scale + bias; see `rms_norm` for the arguments."""
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    factor = scale.astype(x32.dtype) + (1.0 if plus_one else 0.0)
    return (normed * factor + bias.astype(x32.dtype)).astype(x.dtype)
