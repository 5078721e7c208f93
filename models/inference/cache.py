"""The one key-value cache of the house: `[L, slots, S, K, N]` with a length for each slot."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.config import TransformerConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer; slot b holds its first `lengths[b]` tokens at indices 0, 1, ...

    What stands behind a slot's length is rubbish that no query sees.
    """

    key: Float[Array, "L B S K N"]
    value: Float[Array, "L B S K N"]
    lengths: Int[Array, " B"]


def init_cache(config: TransformerConfig, *, num_slots: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache for `num_slots` rows of at most `capacity` tokens."""
    shape = (config.num_layers, num_slots, capacity, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((num_slots,), jnp.int32))


def write_layer(
    cached: Float[Array, "B S K N"], new: Float[Array, "B T K N"], lengths: Int[Array, " B"]
) -> Float[Array, "B S K N"]:
    """Puts a row's T new entries behind its `lengths` old ones; entries beyond the capacity are dropped."""
    rows = jnp.arange(new.shape[0])[:, None]
    columns = lengths[:, None] + jnp.arange(new.shape[1])[None, :]
    return cached.at[rows, columns].set(new.astype(cached.dtype), mode="drop")


def append(cache: KVCache, key: Float[Array, "L B T K N"], value: Float[Array, "L B T K N"]) -> KVCache:
    """Puts T new tokens of all layers behind each slot's old ones; those beyond the capacity are dropped."""
    write = jax.vmap(write_layer, in_axes=(0, 0, None))
    return KVCache(
        write(cache.key, key, cache.lengths), write(cache.value, value, cache.lengths), cache.lengths + key.shape[2]
    )


def insert(cache: KVCache, prefix: KVCache, slot: Int[Array, ""], length: Int[Array, ""]) -> KVCache:
    """Gives a slot the one row of `prefix`, of which `length` tokens count; its capacity is at most the cache's."""

    def put(whole: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, row.astype(whole.dtype), (0, slot, 0, 0, 0))

    return KVCache(put(cache.key, prefix.key), put(cache.value, prefix.value), cache.lengths.at[slot].set(length))
