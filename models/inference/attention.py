"""Attention of new tokens to what a slot cache holds and to each other."""

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
    key: Float[Array, "B T K N"],
    value: Float[Array, "B T K N"],
    cache: KVCache,
    layer: Int[Array, ""],
    *,
    window: Window,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H N"]:
    """Causal attention of T new tokens of each slot to its cached ones and to the new ones before them.

    The cache is read a block at a time with a running maximum and sum (Milakov and Gimelshein 2018), up to the longest
    slot. A block in which a slot holds nothing adds an exact zero, so a slot's result does not depend, to the bit, on
    how long the others are. Values that no query sees are zeroed before the product: what a past request left, were
    it infinite, leaks nothing.

    Args:
        query: [B, T, H, N], rotated.
        key: [B, T, K, N], rotated; not yet in the cache.
        value: [B, T, K, N].
        cache: of all layers.
        layer: index of this one.
        window: tokens a query sees, itself included; None for all.
        scale: factor on query-key products.
        softcap: bound on scaled products, or None.

    Returns:
        Mixed values in query's dtype.
    """
    B, T, H, N = query.shape
    K, capacity = key.shape[2], cache.key.shape[2]
    block = block_size(capacity)
    exact = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(B, T, K, H // K, N)
    at = cache.lengths[:, None] + jnp.arange(T)  # Index of each query in its slot, [B, T].

    def scores(keys: jax.Array, key_index: jax.Array, visible: jax.Array) -> jax.Array:
        products = jnp.einsum("btkgn,bskn->bkgts", grouped, keys.astype(query.dtype), preferred_element_type=exact)
        distance = at[:, :, None] - key_index[:, None, :]
        visible &= distance >= 0
        if window is not None:
            visible &= distance < window
        return jnp.where(visible[:, None, None], soft_cap(products * scale, softcap), -jnp.inf)

    def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
        values = values.astype(query.dtype)
        return jnp.einsum("bkgts,bskn->bkgtn", weights.astype(query.dtype), values, preferred_element_type=exact)

    # The new tokens come first: each sees itself, so the maximum is finite from the start.
    own = scores(key.astype(cache.key.dtype), at, jnp.ones((B, 1, T), bool))
    top = own.max(-1, keepdims=True)
    weights = jnp.exp(own - top)
    start = top, weights.sum(-1, keepdims=True), mix(weights, value.astype(cache.value.dtype))

    def attend_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        # The last block of a capacity that is no multiple begins earlier; what was read before is masked out.
        first = jnp.minimum(index * block, capacity - block)
        keys, values = (
            jax.lax.dynamic_slice(whole, (layer, 0, first, 0, 0), (1, B, block, K, N))[0]
            for whole in (cache.key, cache.value)
        )
        key_index = first + jnp.arange(block)[None, :]
        held = (key_index >= index * block) & (key_index < cache.lengths[:, None])
        part = scores(keys, key_index, held[:, None])
        new_top = jnp.maximum(top, part.max(-1, keepdims=True))
        weights, shrink = jnp.exp(part - new_top), jnp.exp(top - new_top)
        values = jnp.where(held[:, :, None, None], values, 0)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + mix(weights, values)

    num_blocks = (cache.lengths.max() + block - 1) // block
    _, total, mixed = jax.lax.fori_loop(0, jnp.minimum(num_blocks, -(-capacity // block)), attend_block, start)
    return jnp.moveaxis(mixed / total, 3, 1).reshape(B, T, H, N).astype(query.dtype)
