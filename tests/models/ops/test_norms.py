"""The norms against float64 NumPy loops, their gradients against differences, and what precision is kept where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.norms import layer_norm, rms_norm
from tests.models.ops.oracle import agree, gradients_agree


@pytest.fixture
def inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations far from zero mean, scale and bias."""
    return 3.0 + 2.0 * rng.standard_normal((2, 3, 8)), rng.standard_normal(8), rng.standard_normal(8)


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_equals_the_loop(inputs: tuple[np.ndarray, ...], plus_one: bool) -> None:
    x, scale, _ = inputs
    expected = np.empty_like(x)
    for index in np.ndindex(2, 3):
        row = x[index]
        root = (sum(v * v for v in row) / 8 + 1e-5) ** 0.5
        expected[index] = [v / root * (s + plus_one) for v, s in zip(row, scale, strict=True)]
    agree(lambda x, s: rms_norm(x, s, eps=1e-5, plus_one=plus_one), expected, x, scale)


@pytest.mark.parametrize("plus_one", [False, True])
def test_layer_norm_equals_the_loop(inputs: tuple[np.ndarray, ...], plus_one: bool) -> None:
    x, scale, bias = inputs
    expected = np.empty_like(x)
    for index in np.ndindex(2, 3):
        row = x[index]
        mean = sum(row) / 8
        root = (sum((v - mean) ** 2 for v in row) / 8 + 1e-5) ** 0.5
        for i, v in enumerate(row):
            expected[(*index, i)] = (v - mean) / root * (scale[i] + plus_one) + bias[i]
    agree(lambda x, s, b: layer_norm(x, s, b, eps=1e-5, plus_one=plus_one), expected, x, scale, bias)


def test_gradients_are_the_differences(inputs: tuple[np.ndarray, ...]) -> None:
    x, scale, bias = inputs
    gradients_agree(lambda x, s: rms_norm(x, s, eps=1e-5, plus_one=True), x, scale)
    gradients_agree(lambda x, s, b: layer_norm(x, s, b, eps=1e-5, plus_one=False), x, scale, bias)


def test_eps_decides_what_a_row_of_nearly_nothing_becomes() -> None:
    """By hand: x = 1e-3 everywhere, eps = 3e-6 gives 1e-3 / sqrt(1e-6 + 3e-6) = 0.5; a layer norm of it is its bias."""
    x, one = jnp.full((1, 1, 4), 1e-3), jnp.ones(4)
    np.testing.assert_allclose(rms_norm(x, one, eps=3e-6, plus_one=False), 0.5, rtol=1e-5)
    np.testing.assert_allclose(layer_norm(x, one, 7 * one, eps=3e-6, plus_one=False), 7.0, atol=1e-4)
    assert jnp.isfinite(rms_norm(jnp.zeros((1, 1, 4)), one, eps=1e-6, plus_one=False)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_narrow_activations_are_taken_in_float32(dtype: str) -> None:
    """Squares of 300 overflow float16 and their sum loses digits in bfloat16; the result is 1 to its last bit."""
    x = jnp.full((2, 512), 300.0, dtype)
    for normed in (
        rms_norm(x, jnp.ones(512, dtype), eps=1e-6, plus_one=False),
        rms_norm(x, jnp.zeros(512, dtype), eps=1e-6, plus_one=True),
    ):
        assert normed.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(normed, np.float32), 1.0)
    pair = jnp.asarray([[300.0, 302.0]], dtype)
    normed = layer_norm(pair, jnp.ones(2, dtype), jnp.zeros(2, dtype), eps=1e-6, plus_one=False)
    np.testing.assert_array_equal(np.asarray(normed, np.float32), [[-1.0, 1.0]])


def test_a_gemma_scale_is_multiplied_before_rounding_and_a_llama_scale_after() -> None:
    """Hugging Face's two orders, in bfloat16 where they differ (transformers: Gemma2RMSNorm, LlamaRMSNorm)."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((64, 16)), jnp.bfloat16)
    scale = jnp.asarray(rng.standard_normal(16), jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + np.float32(1e-6))
    gemma = jnp.asarray(normed * (1.0 + np.asarray(scale, np.float32)), jnp.bfloat16)
    llama = jnp.asarray(normed, jnp.bfloat16) * scale
    found = [jax.jit(lambda x, s, p=p: rms_norm(x, s, eps=1e-6, plus_one=p))(x, scale) for p in (True, False)]
    for ours, expected in zip(found, (gemma, llama), strict=True):
        # One unit in the last place of bfloat16 is 2**-8 of the value; rsqrt may round the other way at a tie.
        same = np.asarray(ours, np.float32) == np.asarray(expected, np.float32)
        assert same.mean() > 0.99
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), rtol=2**-7)
    late = jnp.asarray(normed, jnp.bfloat16) * (1 + scale)
    assert (np.asarray(late, np.float32) == np.asarray(gemma, np.float32)).mean() < 0.9, "the orders differ"
