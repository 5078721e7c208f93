"""Cached attention against plain attention under a mask, in float64, and its indifference to what it may not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.inference import attention
from models.inference.attention import cached_attention
from models.inference.cache import KVCache, insert, write_layer
from models.ops.attention import dot_product_attention

L, B, K, N, H = 2, 4, 2, 8, 6
LAYER = 1


def make_cache(rng: np.random.Generator, capacity: int, lengths: list[int]) -> KVCache:
    shape = (L, B, capacity, K, N)
    return KVCache(
        jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape)), jnp.asarray(lengths, jnp.int32)
    )


def new_tokens(rng: np.random.Generator, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, N))) for heads in (H, K, K))


def attend(query, key, value, cache, window=None, softcap=None):
    written = write_layer(cache, key, value, jnp.asarray(LAYER))
    return cached_attention(query, written, jnp.asarray(LAYER), window=window, scale=0.3, softcap=softcap)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (9, 2.0)])
@pytest.mark.parametrize(("capacity", "block"), [(32, 8), (30, 8), (30, 64)])
def test_it_equals_plain_attention_under_the_caches_mask(
    rng, monkeypatch, backend, T, window, softcap, capacity, block
):
    """On a CPU slots are taken one by one; elsewhere all at once, which this machine can compute as well."""
    monkeypatch.setattr(attention, "on_cpu", lambda: backend == "cpu")
    monkeypatch.setattr(attention, "CPU_BLOCK", block)
    monkeypatch.setattr(attention, "DEVICE_BLOCK", block)
    with jax.enable_x64(True):
        cache = make_cache(rng, capacity, [0, 3, 16, capacity - T])
        query, key, value = new_tokens(rng, T)
        found = attend(query, key, value, cache, window, softcap)
        keys, values = np.array(cache.key[LAYER]), np.array(cache.value[LAYER])
        for row, length in enumerate(cache.lengths):
            keys[row, length : length + T], values[row, length : length + T] = key[row], value[row]
        distance = (cache.lengths[:, None] + jnp.arange(T))[:, :, None] - jnp.arange(capacity)
        mask = (distance >= 0) & (distance < (capacity if window is None else window))
        expected = dot_product_attention(
            query, jnp.asarray(keys), jnp.asarray(values), mask, scale=0.3, softcap=softcap
        )
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def test_a_slot_is_the_same_to_the_bit_however_long_the_others_are(rng, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BLOCK", 8)
    run = jax.jit(attend)
    query, key, value = (each.astype(jnp.float32) for each in new_tokens(rng, 1))
    cache = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_cache(rng, 64, [5, 0, 0, 0]))
    results = [
        run(query, key, value, KVCache(cache.key, cache.value, jnp.array([5, other, 0, 63])))[0]
        for other in (0, 30, 63)
    ]
    results.append(run(query, key, value, KVCache(cache.key, cache.value, jnp.array([5, 0, 0, 0])))[0])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_what_a_slot_does_not_hold_leaks_nothing_even_if_it_is_not_finite(rng):
    query, key, value = new_tokens(rng, 1)
    cache = make_cache(rng, 32, [5, 9, 0, 31])
    held = (jnp.arange(32) < cache.lengths[:, None])[None, :, :, None, None]
    spoilt = KVCache(jnp.where(held, cache.key, jnp.nan), jnp.where(held, cache.value, jnp.inf), cache.lengths)
    np.testing.assert_array_equal(attend(query, key, value, spoilt), attend(query, key, value, cache))


@pytest.mark.parametrize("T", [1, 4])
def test_writing_touches_one_layer_and_drops_what_is_past_the_capacity(rng, T):
    cache = make_cache(rng, 8, [0, 3, 7, 8])
    _, key, value = new_tokens(rng, T)
    written = write_layer(cache, key, value, jnp.asarray(LAYER))
    expected_key, expected_value = np.array(cache.key), np.array(cache.value)
    for row, length in enumerate(cache.lengths.tolist()):
        for offset in range(min(T, 8 - length)):
            expected_key[LAYER, row, length + offset] = key[row, offset]
            expected_value[LAYER, row, length + offset] = value[row, offset]
    np.testing.assert_array_equal(written.key, expected_key)
    np.testing.assert_array_equal(written.value, expected_value)
    np.testing.assert_array_equal(written.lengths, cache.lengths)


def test_inserting_fills_one_slot_of_every_layer(rng):
    cache, prefix = make_cache(rng, 16, [1, 2, 3, 4]), make_cache(rng, 8, [0, 0, 0, 0])
    row = KVCache(prefix.key[:, :1], prefix.value[:, :1], jnp.array([8]))
    filled = insert(cache, row, jnp.asarray(2), jnp.asarray(6))
    np.testing.assert_array_equal(filled.key[:, 2, :8], row.key[:, 0])
    np.testing.assert_array_equal(filled.value[:, 2, :8], row.value[:, 0])
    np.testing.assert_array_equal(filled.lengths, [1, 2, 6, 4])
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(filled.key[:, others], cache.key[:, others])
