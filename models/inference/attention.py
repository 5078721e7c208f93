"""Attention of new tokens to what a slot cache holds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.inference.cache import KVCache
from models.ops.attention import Window, soft_cap

CPU_BLOCK = 64
"""Cached tokens looked at together; a block of all slots then fits a core's own cache."""
DEVICE_BLOCK = 1024
"""The same where starting a kernel costs more than what it reads."""


def on_cpu() -> bool:
    """Whether slots are taken one by one, and blocks read as they lie."""
    return jax.default_backend() == "cpu"


def block_size(capacity: int) -> int:
    """Cached tokens that one turn of `cached_attention`'s loop looks at."""
    return min(capacity, CPU_BLOCK if on_cpu() else DEVICE_BLOCK)


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
    slot; on a CPU slot by slot, each up to its own length. A block in which a slot holds nothing adds an exact zero, so
    a slot's result does not depend, to the bit, on how long the others are. What a slot does not hold is zeroed before
    the product: what a past request left, were it infinite, leaks nothing.

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
    attend = partial(_attend, cache=cache, layer=layer, window=window, scale=scale, softcap=softcap)
    if not on_cpu():
        return attend(query, slot=jnp.zeros((), layer.dtype))
    slots = jnp.arange(query.shape[0])
    return jax.lax.map(lambda each: attend(each[0][None], slot=each[1])[0], (query, slots))


def _attend(
    query: Float[Array, "R T H N"],
    *,
    cache: KVCache,
    layer: Int[Array, ""],
    slot: Int[Array, ""],
    window: Window,
    scale: float,
    softcap: float | None,
) -> Float[Array, "R T H N"]:
    """Attention of R neighbouring slots, of which `slot` is the first."""
    R, T = query.shape[:2]
    lengths = jax.lax.dynamic_slice(cache.lengths, (slot,), (R,))
    capacity = cache.key.shape[2]
    block = block_size(capacity)
    exact = jnp.promote_types(query.dtype, jnp.float32)
    products = _MergedHeads(query, cache) if T == 1 and on_cpu() else _SeparateHeads(query, cache)
    at = lengths[:, None] + jnp.arange(T)  # Index of each query in its slot, [R, T].
    lowest = jnp.finfo(exact).min

    def attend_block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        # The last block of a capacity that is no multiple begins earlier; what was read before is masked out.
        first = jnp.minimum(index * block, capacity - block)
        # Indices are cast to one dtype, which in x64 they do not have of themselves.
        corner = [jnp.asarray(index, jnp.int32) for index in (layer, slot, first, 0, 0)]
        keys, values = (
            jax.lax.dynamic_slice(whole, corner, (1, R, block, *whole.shape[3:]))[0]
            for whole in (cache.key, cache.value)
        )
        key_index = first + jnp.arange(block)
        distance = at[:, :, None] - key_index
        visible = (distance >= 0) & (key_index >= index * block)
        if window is not None:
            visible &= distance < window
        visible = products.per_row(visible)
        scores = products.scores(keys, exact)
        scores = jnp.where(visible, soft_cap(scores * scale, softcap), lowest)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        # Where nothing was visible yet, the maximum is the mask's own value, and its weight must not be one.
        weights, shrink = jnp.where(visible, jnp.exp(scores - new_top), 0.0), jnp.exp(top - new_top)
        values = jnp.where((key_index <= at[:, -1:])[:, :, None, None], values, 0)
        part = products.mix(weights.astype(query.dtype), values, exact)
        return new_top, total * shrink + weights.sum(-1, keepdims=True), mixed * shrink + part

    rows, width = products.rows, products.width
    start = jnp.full((*rows, 1), lowest), jnp.zeros((*rows, 1), exact), jnp.zeros((*rows, width), exact)
    needed = jnp.minimum((lengths.max() + T + block - 1) // block, -(-capacity // block))
    _, total, mixed = jax.lax.fori_loop(0, needed, attend_block, start)
    return products.heads(mixed / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)


class _SeparateHeads:
    """Products for each kv head: the queries that read it are the rows of one matrix, [B, K, (H/K) T, ...]."""

    def __init__(self, query: Float[Array, "B T H N"], cache: KVCache) -> None:
        B, self.T, H, self.width = query.shape
        K = cache.key.shape[3]
        self.shape = (B, K, H // K, self.T, self.width)
        self.rows = (B, K, H // K * self.T)
        grouped = query.reshape(B, self.T, K, H // K, self.width)
        self.query = jnp.moveaxis(grouped, 1, 3).reshape(*self.rows, self.width)

    def per_row(self, visible: Bool[Array, "B T S"]) -> Bool[Array, "B 1 M S"]:
        """A mask for the scores."""
        return jnp.tile(visible, (1, self.shape[2], 1))[:, None]

    def scores(self, keys: Float[Array, "B S K N"], exact: Any) -> Float[Array, "B K M S"]:
        """Queries times keys."""
        heads = jnp.swapaxes(keys, 1, 2).astype(self.query.dtype)
        return jnp.einsum("bkmn,bksn->bkms", self.query, heads, preferred_element_type=exact)

    def mix(self, weights: Float[Array, "B K M S"], values: Float[Array, "B S K N"], exact: Any) -> jax.Array:
        """Weights times values, [B, K, M, N]."""
        heads = jnp.swapaxes(values, 1, 2).astype(weights.dtype)
        return jnp.einsum("bkms,bksn->bkmn", weights, heads, preferred_element_type=exact)

    def heads(self, mixed: Float[Array, "B K M N"]) -> Float[Array, "B T H N"]:
        """The result in the query's shape."""
        B, K, G, T, N = self.shape
        return jnp.moveaxis(mixed.reshape(self.shape), 3, 1).reshape(B, T, K * G, N)


class _MergedHeads:
    """Products for all kv heads of a slot at once: a query is zero at every head but its own, [B, H, K N].

    That is K times the arithmetic, on blocks read as they lie in memory. To transpose them into heads costs a CPU far
    more when there is one query for each.
    """

    def __init__(self, query: Float[Array, "B 1 H N"], cache: KVCache) -> None:
        B, _, H, N = query.shape
        K = cache.key.shape[3]
        self.shape, self.rows, self.width = (B, H, K, N), (B, H), K * N
        self.own = (jnp.arange(H)[:, None] // (H // K) == jnp.arange(K))[:, :, None]
        self.query = jnp.where(self.own, query[:, 0, :, None], 0).reshape(B, H, K * N)

    def per_row(self, visible: Bool[Array, "B 1 S"]) -> Bool[Array, "B 1 S"]:
        """A mask for the scores."""
        return visible

    def scores(self, keys: Float[Array, "B S K N"], exact: Any) -> Float[Array, "B H S"]:
        """Queries times keys."""
        flat = keys.reshape(*keys.shape[:2], -1).astype(self.query.dtype)
        return jnp.einsum("bhc,bsc->bhs", self.query, flat, preferred_element_type=exact)

    def mix(self, weights: Float[Array, "B H S"], values: Float[Array, "B S K N"], exact: Any) -> jax.Array:
        """Weights times the values of every head, [B, H, K N]."""
        flat = values.reshape(*values.shape[:2], -1).astype(weights.dtype)
        return jnp.einsum("bhs,bsc->bhc", weights, flat, preferred_element_type=exact)

    def heads(self, mixed: Float[Array, "B H KN"]) -> Float[Array, "B 1 H N"]:
        """The result in the query's shape: of each query the values of its own head."""
        return jnp.where(self.own, mixed.reshape(self.shape), 0).sum(2)[:, None]
