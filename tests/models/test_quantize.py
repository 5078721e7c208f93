"""Quantised products: exact where the format is exact, an independent NumPy quantiser elsewhere, unbiased gradients."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.quantize import MAX_INT8_SUM, dot_general_for, int8_product, saturate, to_fp8, token_blocks

# Axes of the input before the contracted ones, contracted axes, output axes: the shapes of a model's projections.
SHAPES = {
    "mlp": ((3, 8), (64,), (48,)),
    "query": ((3, 8), (64,), (4, 16)),
    "fused": ((3, 8), (64,), (3, 4, 16)),
    "out": ((3, 8), (4, 16), (64,)),
}
KEY = jax.random.key(7)


def dims(lhs: Any, count: int) -> Any:
    return (tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))), ((), ())


def product_and_gradients(
    quantization: str, lhs: Any, rhs: Any, grad: Any, key: jax.Array | None, name: str = "wo"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The product, and what it sends back to lhs and rhs for an output gradient."""
    count = (lhs.ndim + rhs.ndim - grad.ndim) // 2
    dot_general = dot_general_for(quantization, key=key, name=name)
    out, pull = jax.vjp(lambda lhs, rhs: dot_general(lhs, rhs, dims(lhs, count)), lhs, rhs)
    return out, *pull(grad)


compiled = jax.jit(product_and_gradients, static_argnums=(0, 5))


def expected_of(lhs: Any, rhs: Any, grad: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same three in float64."""
    lhs, rhs, grad = (np.asarray(x, np.float64) for x in (lhs, rhs, grad))
    count = (lhs.ndim + rhs.ndim - grad.ndim) // 2
    tokens, outputs = lhs.ndim - count, rhs.ndim - count
    return (
        np.tensordot(lhs, rhs, count),
        np.tensordot(grad, rhs, (range(tokens, grad.ndim), range(count, rhs.ndim))),
        np.tensordot(lhs, grad, (range(tokens), range(grad.ndim - outputs))),
    )


def normal(case: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal input, kernel and output gradient."""
    tokens, inputs, outputs = SHAPES[case]
    generator = np.random.default_rng(seed)
    shapes = ((*tokens, *inputs), (*inputs, *outputs), (*tokens, *outputs))
    return tuple(generator.standard_normal(shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def error(actual: Any, expected: Any) -> float:
    """The norm of the difference over the norm of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def matrix(x: np.ndarray, leading: int) -> np.ndarray:
    """The first `leading` axes as rows, the others as columns."""
    return x.reshape(int(np.prod(x.shape[:leading])), -1)


@pytest.mark.parametrize("key", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("case", SHAPES)
def test_integers_up_to_127_multiply_exactly_in_int8(case: str, key: jax.Array | None) -> None:
    """Every row and column of the three matrices reaches 127 times a power of two, so all scales are powers of two."""
    generator = np.random.default_rng(1)
    tokens = len(SHAPES[case][0])
    arrays = []
    for x, leading, scale in zip(normal(case), (tokens, len(SHAPES[case][1]), tokens), (0.5, 0.125, 4.0), strict=True):
        integers = generator.integers(-127, 128, matrix(x, leading).shape)
        integers[0, :] = integers[:, 0] = 127
        arrays.append((integers * scale).astype(np.float32).reshape(x.shape))
    for actual, expected in zip(compiled("int8", *arrays, key), expected_of(*arrays), strict=True):
        np.testing.assert_array_equal(actual, expected)


def nearest_int8(x: np.ndarray, axis: int) -> np.ndarray:
    """A matrix through int8 with one scale for each line along `axis`, in float64."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.rint(x / scale) * scale


@pytest.mark.parametrize("case", SHAPES)
def test_int8_has_a_scale_for_each_token_and_each_channel(case: str) -> None:
    """Against NumPy, float64, to 2e-6; tokens and channels differ in size by powers of ten."""
    lhs, rhs, grad = normal(case)
    tokens, count = len(SHAPES[case][0]), len(SHAPES[case][1])
    generator = np.random.default_rng(2)
    lhs = lhs * 10.0 ** generator.uniform(-3, 3, (*lhs.shape[:tokens], *[1] * count)).astype(np.float32)
    rhs = rhs * 10.0 ** generator.uniform(-3, 3, (*[1] * count, *rhs.shape[count:])).astype(np.float32)
    out, dlhs, drhs = compiled("int8", lhs, rhs, grad, None)
    x, w, g = (matrix(a.astype(np.float64), n) for a, n in ((lhs, tokens), (rhs, count), (grad, tokens)))
    expected = (
        nearest_int8(x, 1) @ nearest_int8(w, 0),
        nearest_int8(g, 1) @ nearest_int8(w, 1).T,
        nearest_int8(x, 0).T @ nearest_int8(g, 0),
    )
    for actual, like in zip((out, dlhs, drhs), expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual).reshape(like.shape), like, rtol=0, atol=2e-6 * np.abs(like).max())


def through_fp8(x: np.ndarray, dtype: Any) -> np.ndarray:
    """An array through fp8 with one scale, cast by ml_dtypes, in float64."""
    scale = np.float32(np.abs(x).max()) / np.float32(ml_dtypes.finfo(dtype).max)
    return (x / scale).astype(dtype).astype(np.float64) * np.float64(scale)


@pytest.mark.parametrize("case", SHAPES)
def test_fp8_is_e4m3_forward_and_e5m2_for_gradients_with_a_scale_for_each_tensor(case: str) -> None:
    """Against ml_dtypes' own casts, float64, to 2e-6."""
    lhs, rhs, grad = normal(case)
    x, w, g = (
        through_fp8(lhs, ml_dtypes.float8_e4m3fn),
        through_fp8(rhs, ml_dtypes.float8_e4m3fn),
        through_fp8(grad, ml_dtypes.float8_e5m2),
    )
    for actual, like in zip(compiled("fp8", lhs, rhs, grad, None), expected_of(x, w, g), strict=True):
        np.testing.assert_allclose(actual, like, rtol=0, atol=2e-6 * np.abs(like).max())


@pytest.mark.parametrize("case", SHAPES)
def test_numbers_of_the_format_multiply_exactly_in_fp8(case: str) -> None:
    """7 * 2**n is a number of both: 448 = 7 * 2**6 is e4m3's largest, 57344 = 7 * 2**13 e5m2's, so scales are 2**n."""
    generator = np.random.default_rng(3)
    arrays = []
    for x, top, scale in zip(normal(case), (6, 6, 13), (0.25, 8.0, 2.0**-20), strict=True):
        powers = 7.0 * 2.0 ** generator.integers(top - 3, top + 1, x.shape) * generator.choice([-1, 1], x.shape)
        powers.flat[0] = 7.0 * 2.0**top
        arrays.append((powers * scale).astype(np.float32))
    for actual, expected in zip(compiled("fp8", *arrays, None), expected_of(*arrays), strict=True):
        np.testing.assert_array_equal(actual, expected)


# Rounding errors of standard normal numbers: a step of int8 is max/127, and uniform within a step; e4m3 keeps 3 bits
# behind the leading one, e5m2 keeps 2, so each has a relative error of about 2.6 % and 5.2 %.
BOUNDS = {"int8": (0.001, 0.02, 0.02), "fp8": (0.01, 0.05, 0.08)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("quantization", BOUNDS)
def test_products_and_gradients_of_normal_numbers_are_near_and_yet_not_exact(
    quantization: str, case: str, dtype: str
) -> None:
    arrays = [jnp.asarray(x, dtype) for x in normal(case)]
    actual = compiled(quantization, *arrays, KEY)
    assert [x.dtype for x in actual] == [jnp.dtype(dtype)] * 3
    least, most, most_in_gradients = BOUNDS[quantization]
    for x, like, bound in zip(actual, expected_of(*arrays), (most, most_in_gradients, most_in_gradients), strict=True):
        assert least < error(x, like) < bound


def test_stochastic_rounding_is_right_on_average() -> None:
    """The kernel is exact in int8, so dlhs must average grad @ kernel.T; likewise drhs. Within 4 standard errors."""
    draws = 4000
    generator = np.random.default_rng(4)
    lhs, rhs = (generator.integers(-127, 128, shape).astype(np.float32) for shape in ((1, 8, 6), (6, 8)))
    for x in (lhs[0], rhs):
        x[0, :] = x[:, 0] = 127
    grad = generator.standard_normal((1, 8, 8)).astype(np.float32)

    def gradients(key: jax.Array) -> tuple[jax.Array, ...]:
        return product_and_gradients("int8", lhs, rhs, grad, key)[1:]

    samples = jax.jit(jax.vmap(gradients))(jax.random.split(KEY, draws))
    for sample, expected in zip(samples, expected_of(lhs, rhs, grad)[1:], strict=True):
        sample = np.asarray(sample, np.float64)
        standard_error = sample.std(axis=0) / np.sqrt(draws)
        assert standard_error.min() > 0
        assert np.all(np.abs(sample.mean(axis=0) - expected) < 4 * standard_error + 1e-6 * np.abs(expected))


def test_three_tenths_of_a_step_average_three_tenths_with_a_key_and_vanish_without() -> None:
    """127 makes the step 1. Without noise 0.3 and -0.3 are 0; noise acts on bfloat16's 100.5 too, which has no 100.3.

    1024 numbers go up as often as they lie above the lower step, within 4 * sqrt(0.5 * 0.5 / 1024) = 0.063.
    """
    for dtype in (jnp.float32, jnp.bfloat16):
        for value in (0.3, -0.3, 100.3):
            value = float(jnp.asarray(value, dtype))
            lhs = jnp.full((1024, 2), value, dtype).at[:, 1].set(127)
            rhs = jnp.array([[127.0], [0.0]])
            arguments = {"dimension_numbers": dims(lhs, 1), "blocks": 1, "rhs_key": None}
            nearest = int8_product(lhs, rhs, lhs_key=None, **arguments) / 127
            np.testing.assert_allclose(nearest, np.rint(value), rtol=1e-6)
            drawn = np.asarray(int8_product(lhs, rhs, lhs_key=KEY, **arguments), np.float64) / 127
            assert np.abs(drawn - value).max() < 1.01
            assert abs((drawn > value).mean() - (value - np.floor(value))) < 0.063, (dtype, value)


def test_the_key_and_the_projections_name_decide_the_noise() -> None:
    arrays = normal("mlp")
    first = compiled("int8", *arrays, KEY, "wo")
    for actual, again in zip(compiled("int8", *arrays, KEY, "wo"), first, strict=True):
        np.testing.assert_array_equal(actual, again)
    for key, name in ((KEY, "wi_0"), (jax.random.fold_in(KEY, 1), "wo"), (None, "wo")):
        other = compiled("int8", *arrays, key, name)
        np.testing.assert_array_equal(other[0], first[0])
        assert all(0.001 < error(a, b) < 0.02 for a, b in zip(other[1:], first[1:], strict=True)), (key, name)


def test_every_number_draws_noise_of_its_own_in_each_gradient() -> None:
    """Identities on both sides show the rounded gradient itself, once for each use; 127 makes all its steps 1."""
    grad = np.full((1, 16, 8), 0.5, np.float32)
    grad[0, 0, :] = grad[0, :, 0] = 127
    _, dlhs, drhs = compiled("int8", np.eye(16, dtype=np.float32)[None], np.eye(16, 8, dtype=np.float32), grad, KEY)
    for_lhs, for_rhs = (np.asarray(x)[1:, 1:8] for x in (dlhs[0], drhs))
    for drawn in (for_lhs, for_rhs):
        np.testing.assert_array_equal(np.unique(np.rint(drawn * 1e6) / 1e6), [0, 1])
        # Of 105 fair coins, 53 +- 20 show heads.
        assert abs(drawn.sum() - 52.5) < 20
        assert len(np.unique(drawn, axis=0)) > 10
    assert 20 < np.abs(for_lhs - for_rhs).sum() < 85


@pytest.mark.parametrize(
    ("tokens", "count"),
    [
        ((8, 1024), 1),
        ((1, MAX_INT8_SUM), 1),
        ((2, MAX_INT8_SUM), 2),
        # At most 133144 // 8192 = 16 rows fit a block.
        ((256, 8192), 16),
        # 7 rows of 40000 tokens: 3 would fit a block, and 7 has no divisor but 7 that makes blocks so small.
        ((7, 40000), 7),
    ],
)
def test_weight_gradients_are_summed_in_as_few_blocks_as_int32_allows(tokens: tuple[int, ...], count: int) -> None:
    assert 127 * 127 * MAX_INT8_SUM < 2**31 <= 127 * 127 * (MAX_INT8_SUM + 1)
    assert token_blocks(tokens) == count


def test_a_row_too_long_for_int32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.quantization=int8: a row has 133145 tokens: .*sequence_length"):
        token_blocks((4, MAX_INT8_SUM + 1))


def test_a_weight_gradient_over_many_tokens_does_not_overflow() -> None:
    """160000 products of 127 * 127 are 2.58e9, beyond int32."""
    lhs, rhs, grad = np.ones((4, 40000, 1), np.float32), np.ones((1, 1), np.float32), np.ones((4, 40000, 1), np.float32)
    _, _, drhs = compiled("int8", lhs, rhs, grad, None)
    np.testing.assert_allclose(drhs, [[160000.0]], rtol=1e-6)


def test_blocks_have_scales_of_their_own() -> None:
    """A row a million times smaller than the other would vanish in the other's scale."""
    generator = np.random.default_rng(5)
    lhs, grad = (generator.standard_normal((2, 64, n)).astype(np.float32) for n in (8, 8))
    lhs[1, :, :4], lhs[0, :, :4] = lhs[1, :, :4] * 1e-6, 0.0
    tokens = ((0, 1), (0, 1)), ((), ())
    product = functools.partial(int8_product, lhs, grad, tokens, lhs_key=None, rhs_key=None)
    expected = np.tensordot(lhs, grad, ((0, 1), (0, 1)))
    assert error(product(blocks=2), expected) < 0.02
    assert error(product(blocks=2)[:4], expected[:4]) < 0.02
    lhs[0, :, :4] = 1.0
    grad[0] = 0.0
    expected = np.tensordot(lhs, grad, ((0, 1), (0, 1)))
    assert error(product(blocks=2)[:4], expected[:4]) < 0.02
    assert error(product(blocks=1)[:4], expected[:4]) > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_outliers_and_zeros_give_no_nan(quantization: str, dtype: str) -> None:
    lhs, rhs, grad = (jnp.asarray(x, dtype) for x in normal("query"))
    for factor in (1e4, 1e-30, 1e-42, 0.0):
        huge = (lhs * factor, rhs, grad), (lhs, rhs * factor, grad), (lhs, rhs, grad * factor)
        for arrays in (*huge, (lhs * factor, rhs * factor, grad * factor)):
            for x in compiled(quantization, *arrays, KEY):
                assert bool(jnp.isfinite(x).all()), factor
    for x in compiled(quantization, 0 * lhs, 0 * rhs, 0 * grad, KEY):
        assert not np.any(x)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_large_activations_are_as_accurate_as_small_ones(quantization: str) -> None:
    lhs, rhs, grad = normal("mlp")
    small = compiled(quantization, lhs, rhs, grad, None)
    large = compiled(quantization, lhs * np.float32(2.0**14), rhs, grad, None)
    for actual, expected, factor in zip(large, small, (2.0**14, 1.0, 2.0**14), strict=True):
        np.testing.assert_array_equal(actual, expected * factor)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_what_is_not_finite_is_not_hidden(quantization: str, bad: float) -> None:
    lhs, rhs, grad = normal("mlp")
    lhs[1, 2, 3] = bad
    out, _, drhs = compiled(quantization, lhs, rhs, grad, KEY)
    assert not np.isfinite(out[1, 2]).any()
    assert not np.isfinite(drhs[3]).any()
    grad[0, 1, 5] = bad
    _, dlhs, drhs = compiled(quantization, lhs, rhs, grad, KEY)
    assert not np.isfinite(dlhs[0, 1]).any()
    assert not np.isfinite(drhs[:, 5]).any()


def test_casts_to_fp8_saturate_where_jax_gives_nan() -> None:
    x = jnp.array([1e6, -1e6, 448.0, 470.0, jnp.inf, 0.0])
    assert np.isnan(np.asarray(x.astype(jnp.float8_e4m3fn), np.float32)[0])
    np.testing.assert_array_equal(np.asarray(saturate(x, jnp.float8_e4m3fn), np.float32), [448, -448, 448, 448, 448, 0])
    np.testing.assert_array_equal(
        np.asarray(saturate(x, jnp.float8_e5m2), np.float32), [57344, -57344, 448, 448, 57344, 0]
    )
    assert np.isnan(np.asarray(saturate(jnp.array([jnp.nan]), jnp.float8_e4m3fn), np.float32)[0])


def test_a_tensor_of_zeros_has_the_scale_one() -> None:
    scaled = to_fp8(jnp.zeros(3), jnp.float8_e4m3fn)
    assert float(scaled.scale) == 1.0
    assert float(to_fp8(jnp.full(3, 896.0), jnp.float8_e4m3fn).scale) == 2.0


COMPILED_TYPES = {"int8": (r"s32\[[\d,]*\]\S* dot\(", 3), "fp8": (r"f8e4m3fn\[", 2)}


@pytest.mark.parametrize("quantization", COMPILED_TYPES)
def test_the_compiler_keeps_the_low_precision(quantization: str) -> None:
    """XLA may drop a pair of casts that only loses precision; a product that it widens still comes from fp8 numbers."""
    text = compiled.lower(quantization, *normal("mlp"), KEY).compile().as_text()
    pattern, least = COMPILED_TYPES[quantization]
    assert len(re.findall(pattern, text)) >= least
    if quantization == "fp8":
        assert "f8e5m2[" in text


def test_what_no_projection_asks_for_is_refused() -> None:
    lhs, rhs, _ = normal("mlp")
    dot_general = dot_general_for("int8", key=None, name="wo")
    for numbers in ((((1,), (0,)), ((), ())), (((2,), (1,)), ((), ())), (((2,), (0,)), ((0,), (1,)))):
        with pytest.raises(AssertionError):
            dot_general(lhs, rhs, numbers)
    with pytest.raises(AssertionError):
        dot_general(lhs.astype(jnp.bfloat16), rhs, dims(lhs, 1))
    assert dot_general_for("none", key=KEY, name="wo") is jax.lax.dot_general
    assert dot_general(lhs, rhs, dims(lhs, 1), preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16
