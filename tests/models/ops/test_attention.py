"""The plain attention against a float64 loop over queries and keys, and the choice among implementations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.attention import choose_implementation, dot_product_attention, self_attention, soft_cap
from models.ops.masks import FULL_WINDOW, causal_mask
from tests.models.ops.oracle import agree, gradients_agree

B, T, S, H, K, N = 2, 5, 6, 4, 2, 3


def loop(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, scale: float, softcap: float | None
) -> np.ndarray:
    """Attention as it is written down: one query, one head at a time; query head h reads kv head h // (H / K)."""
    out = np.zeros_like(query)
    for b, t, h in np.ndindex(*query.shape[:3]):
        group = h // (query.shape[2] // key.shape[2])
        seen = [s for s in range(key.shape[1]) if mask[b, t, s]]
        scores = [scale * float(query[b, t, h] @ key[b, s, group]) for s in seen]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, h] += weight / sum(weights) * value[b, s, group]
    return out


@pytest.fixture
def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    mask = rng.random((B, T, S)) < 0.6
    mask[0, 2] = False
    return {
        "query": rng.standard_normal((B, T, H, N)),
        "key": rng.standard_normal((B, S, K, N)),
        "value": rng.standard_normal((B, S, K, N)),
        "mask": mask,
    }


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_equals_the_loop(inputs: dict[str, np.ndarray], softcap: float | None) -> None:
    def attention(q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
        return dot_product_attention(q, k, v, mask, scale=0.7, softcap=softcap)

    agree(attention, loop(*inputs.values(), scale=0.7, softcap=softcap), *inputs.values())
    mask = jnp.asarray(inputs["mask"])
    gradients_agree(lambda q, k, v: attention(q, k, v, mask), *(inputs[name] for name in ("query", "key", "value")))


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(inputs: dict[str, np.ndarray]) -> None:
    query, key, value, mask = (jnp.asarray(array) for array in inputs.values())

    def attention(*qkv: jax.Array) -> jax.Array:
        return dot_product_attention(*qkv, mask, scale=1.0, softcap=None)  # type: ignore[misc]

    out, pullback = jax.vjp(attention, query, key, value)
    np.testing.assert_array_equal(out[0, 2], 0.0)
    grads = pullback(jnp.ones_like(out))
    assert all(jnp.isfinite(grad).all() for grad in grads)
    np.testing.assert_array_equal(grads[0][0, 2], 0.0)


def test_a_softmax_over_large_scores_neither_overflows_nor_rounds_in_bfloat16() -> None:
    """Two keys with scores 1000 and 1000 + ln 3 share the query's weight 1 to 3; bfloat16 would make them equal."""
    query = jnp.ones((1, 1, 1, 2))
    key = jnp.array([[[[1000.0, 0.0]], [[1000.0, math.log(3.0)]]]])
    value = jnp.array([[[[0.0, 0.0]], [[4.0, 8.0]]]])
    out = dot_product_attention(query, key, value, jnp.ones((1, 1, 2), bool), scale=1.0, softcap=None)
    np.testing.assert_allclose(out[0, 0, 0], [3.0, 6.0], rtol=1e-3)
    narrow = [x.astype(jnp.bfloat16) for x in (query, key / 100, value)]
    out = dot_product_attention(*narrow, jnp.ones((1, 1, 2), bool), scale=100.0, softcap=None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float32), [3.0, 6.0], rtol=2e-2)


def test_soft_cap_bounds_and_none_is_the_identity(rng: np.random.Generator) -> None:
    x = 100 * rng.standard_normal(50)
    agree(lambda x: soft_cap(x, 20.0), np.array([20 * math.tanh(v / 20) for v in x]), x)
    given = jnp.asarray(x)
    assert soft_cap(given, None) is given


SEGMENTS = np.array([[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13])


@pytest.mark.parametrize("implementation", ["dot_product", "blocked", "flash"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("traced", [False, True])
def test_every_implementation_is_the_causal_attention_of_each_document(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    implementation: str,
    window: int | None,
    traced: bool,
) -> None:
    """In float32 to 1e-5, for a static window and for a traced one, as scanned layers of two kinds have it.

    A CPU has no fused kernel. What stands in for it takes static windows only, as they do, so that what is left of
    "flash" is the choice of the branch.
    """

    def stand_in(q: Any, k: Any, v: Any, *, segment_ids_BT: Any, window: int | None, **rest: Any) -> jax.Array:
        assert window is None or isinstance(window, int)
        mask = causal_mask(segment_ids_BT, window)
        return dot_product_attention(q, k, v, mask, scale=rest["scale"], softcap=rest["softcap"])

    monkeypatch.setattr("models.ops.attention.flash_attention", stand_in)
    length = SEGMENTS.shape[1]
    query, key, value = (rng.standard_normal((2, length, heads, 8)) for heads in (H, K, K))
    mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), window))
    expected = loop(query, key, value, mask, scale=0.35, softcap=None)

    @jax.jit
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: Any) -> jax.Array:
        return self_attention(
            q,
            k,
            v,
            segment_ids=jnp.asarray(SEGMENTS),
            window=window,
            window_choices=(4, None),
            scale=0.35,
            softcap=None,
            implementation=implementation,
        )

    narrow = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    if traced:
        found = attention(*narrow, jnp.asarray(FULL_WINDOW if window is None else window))
    else:
        found = jax.jit(lambda *qkv: attention.__wrapped__(*qkv, window))(*narrow)
    real = SEGMENTS != 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "chosen"),
    [
        ("cpu", 64, "bfloat16", "blocked"),
        ("tpu", 128, "bfloat16", "flash"),
        ("gpu", 64, "float32", "blocked"),
    ],
)
def test_auto_takes_a_fused_kernel_only_where_the_device_has_one_for_these_heads(
    monkeypatch: pytest.MonkeyPatch, platform: str, head_dim: int, dtype: str, chosen: str
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    settings: Any = {"head_dim": head_dim, "dtype": jnp.dtype(dtype), "softcap": None}
    assert choose_implementation("auto", **settings) == chosen
    assert choose_implementation("dot_product", **settings) == "dot_product"
