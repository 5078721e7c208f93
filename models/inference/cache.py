"""The one key-value cache of the house: `[L, slots, S, K, N]` with a length for each slot."""

from dataclasses import dataclass, replace
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
    cache: KVCache, key: Float[Array, "B T K N"], value: Float[Array, "B T K N"], layer: Int[Array, ""]
) -> KVCache:
    """Puts T new tokens behind each slot's old ones in one layer; those beyond the capacity are dropped.

    The lengths stay as they are until all layers are written. A layer writes before it reads, so that the compiler can
    write in place: a write that came after all reads would make it copy the whole cache for every token.
    """
    write = _write_one if key.shape[1] == 1 else _write_many
    return replace(
        cache,
        key=write(cache.key, key.astype(cache.key.dtype), layer, cache.lengths),
        value=write(cache.value, value.astype(cache.value.dtype), layer, cache.lengths),
    )


def _write_one(whole: jax.Array, new: jax.Array, layer: jax.Array, lengths: jax.Array) -> jax.Array:
    return whole.at[layer, jnp.arange(new.shape[0]), lengths].set(new[:, 0], mode="drop")


def _write_many(whole: jax.Array, new: jax.Array, layer: jax.Array, lengths: jax.Array) -> jax.Array:
    """Every index of the cache looks up its new entry: far quicker than scattering many."""
    old = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
    source = jnp.arange(whole.shape[2]) - lengths[:, None]
    is_new = (source >= 0) & (source < new.shape[1])
    entries = jnp.take_along_axis(new, jnp.clip(source, 0, new.shape[1] - 1)[:, :, None, None], axis=1)
    return jax.lax.dynamic_update_index_in_dim(whole, jnp.where(is_new[:, :, None, None], entries, old), layer, 0)


def insert(cache: KVCache, prefix: KVCache, slot: Int[Array, ""], length: Int[Array, ""]) -> KVCache:
    """Gives a slot the one row of `prefix`, of which `length` tokens count; its capacity is at most the cache's."""

    def put(whole: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, row.astype(whole.dtype), (0, slot, 0, 0, 0))

    return KVCache(put(cache.key, prefix.key), put(cache.value, prefix.value), cache.lengths.at[slot].set(length))
