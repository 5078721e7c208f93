"""Attention of new tokens to what a slot cache holds."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.inference.cache import KVCache
from models.ops.attention import Window, soft_cap

CPU_BLOCK = 64
"""Cached tokens looked at together; a block of all slots then fits a core's own cache."""
DEVICE_BLOCK = 1024
"""The same where starting a kernel costs more than what it reads."""


def block_size(capacity: int) -> int:
    """Cached tokens that one turn of `cached_attention`'s loop looks at."""
    return min(capacity, CPU_BLOCK if jax.default_backend() == "cpu" else DEVICE_BLOCK)


def cached_attention(
    query: Float[Array, "B T H N"],
    cache: KVCache,
    layer: Int[Array, ""],
    *,
    window: Window,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H N"]:
    """Causal attention of T new tokens of each slot to those before them and to themselves.

    The cache is read a block at a time with a running maximum and sum (Milakov and Gimelshein 2018), up to the longest
    slot. A block in which a slot holds nothing adds an exact zero, so a slot's result does not depend, to the bit, on
    how long the others are. What a slot does not hold is zeroed before the product: what a past request left, were it
    infinite, leaks nothing.

    Args:
        query: [B, T, H, N], rotated.
        cache: with the new tokens written behind each slot's `lengths` old ones.
        layer: which one to read.
        window: tokens a query sees, itself included; None for all.
        scale: factor on query-key products.
        softcap: bound on scaled products, or None.

    Returns:
        Mixed values in query's dtype.
    """
    B, T, H, N = query.shape
    K, capacity = cache.key.shape[3], cache.key.shape[2]
    block = block_size(capacity)
    exact = jnp.promote_types(query.dtype, jnp.float32)
    # Heads first, and the queries of a kv head as the rows of one matrix: both products then need no transposition.
    rows = (B, K, H // K * T)
    grouped = jnp.moveaxis(query.reshape(B, T, K, H // K, N), 1, 3).reshape(*rows, N)
    at = cache.lengths[:, None] + jnp.arange(T)  # Index of each query in its slot, [B, T].
    lowest = jnp.finfo(exact).min

    def attend_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        # The last block of a capacity that is no multiple begins earlier; what was read before is masked out.
        first = jnp.minimum(index * block, capacity - block)
        keys, values = (
            jax.lax.dynamic_slice(whole, (layer, 0, first, 0, 0), (1, B, block, K, N))[0]
            for whole in (cache.key, cache.value)
        )
        key_index = first + jnp.arange(block)
        distance = at[:, :, None] - key_index
        visible = (distance >= 0) & (key_index >= index * block)
        if window is not None:
            visible &= distance < window
        visible = jnp.tile(visible, (1, H // K, 1))[:, None]
        keys, values = (jnp.swapaxes(each, 1, 2).astype(query.dtype) for each in (keys, values))
        scores = jnp.einsum("bkmn,bksn->bkms", grouped, keys, preferred_element_type=exact)
        scores = jnp.where(visible, soft_cap(scores * scale, softcap), lowest)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        # Where nothing was visible yet, the maximum is the mask's own value, and its weight must not be one.
        weights, shrink = jnp.where(visible, jnp.exp(scores - new_top), 0.0), jnp.exp(top - new_top)
        values = jnp.where((key_index <= at[:, -1:])[:, None, :, None], values, 0)
        part = jnp.einsum("bkms,bksn->bkmn", weights.astype(query.dtype), values, preferred_element_type=exact)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + part

    start = jnp.full((*rows, 1), lowest), jnp.zeros((*rows, 1), exact), jnp.zeros((*rows, N), exact)
    needed = jnp.minimum((cache.lengths.max() + T + block - 1) // block, -(-capacity // block))
    _, total, mixed = jax.lax.fori_loop(0, needed, attend_block, start)
    mixed /= jnp.where(total == 0.0, 1.0, total)
    return jnp.moveaxis(mixed.reshape(B, K, H // K, T, N), 3, 1).reshape(B, T, H, N).astype(query.dtype)
