"""Projections and activations against NumPy, and dropout by its statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.linear import ACTIVATIONS, dropout, project
from tests.models.ops.oracle import agree, gradients_agree


def plain_project(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_contract: int) -> jax.Array:
    return project(x, kernel, bias, num_contract=num_contract, dot_general=jax.lax.dot_general)


@pytest.mark.parametrize("own", [False, True], ids=["lax.dot_general", "another dot_general"])
def test_a_projection_contracts_the_named_axes(rng: np.random.Generator, own: bool) -> None:
    """Into heads, as query does, and out of them, as the output projection does; a dot_general of its own or JAX's."""

    def another(*args: object, **kwargs: object) -> jax.Array:
        return jax.lax.dot_general(*args, **kwargs)  # type: ignore[arg-type]

    dot_general = another if own else jax.lax.dot_general
    x, kernel, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((5, 4, 2)), rng.standard_normal((4, 2))
    expected = np.zeros((2, 3, 4, 2))
    for b, t, h, n, d in np.ndindex(2, 3, 4, 2, 5):
        expected[b, t, h, n] += x[b, t, d] * kernel[d, h, n] + bias[h, n] / 5
    agree(lambda *a: project(*a, num_contract=1, dot_general=dot_general), expected, x, kernel, bias)

    heads, kernel = rng.standard_normal((2, 3, 4, 2)), rng.standard_normal((4, 2, 5))
    expected = np.zeros((2, 3, 5))
    for b, t, h, n, d in np.ndindex(2, 3, 4, 2, 5):
        expected[b, t, d] += heads[b, t, h, n] * kernel[h, n, d]
    agree(lambda x, k: project(x, k, None, num_contract=2, dot_general=dot_general), expected, heads, kernel)


def test_gradients_of_projections_are_the_differences(rng: np.random.Generator) -> None:
    x, kernel, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((5, 4, 2)), rng.standard_normal((4, 2))
    gradients_agree(lambda x, k, b: plain_project(x, k, b, 1), x, kernel, bias)
    heads, kernel, bias = rng.standard_normal((2, 3, 4, 2)), rng.standard_normal((4, 2, 5)), rng.standard_normal(5)
    gradients_agree(lambda x, k, b: plain_project(x, k, b, 2), heads, kernel, bias)


def test_parameters_are_cast_to_the_activations_dtype(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.bfloat16)
    kernel, bias = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32), jnp.ones(4, jnp.float32)
    assert plain_project(x, kernel, bias, 1).dtype == jnp.bfloat16


def test_activations_are_their_formulas(rng: np.random.Generator) -> None:
    x = 3 * rng.standard_normal(64)
    formulas = {
        "silu": [v / (1 + math.exp(-v)) for v in x],
        "gelu": [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x],
        "gelu_tanh": [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x],
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    for name, expected in formulas.items():
        agree(ACTIVATIONS[name], np.array(expected), x)
    # The two gelus differ by up to 5e-4, far above the tolerance.
    assert np.abs(np.array(formulas["gelu"]) - formulas["gelu_tanh"]).max() > 1e-4


ONES = jnp.ones((4, 16, 32))


@pytest.mark.parametrize("broadcast_time", [False, True])
def test_dropout_keeps_the_expected_share_and_the_expectation(broadcast_time: bool) -> None:
    """2000 masks of rate 0.3: the kept share lies within three standard deviations, and so does the mean of a unit."""
    rate, draws = 0.3, 2000
    keys = jax.random.split(jax.random.key(1), draws)
    out = jax.jit(jax.vmap(lambda key: dropout(ONES, key, rate=rate, broadcast_time=broadcast_time)))(keys)
    kept = np.asarray(out) != 0
    np.testing.assert_allclose(np.asarray(out)[kept], 1 / (1 - rate), rtol=1e-6)
    independent = kept[:, :, 0] if broadcast_time else kept
    deviation = math.sqrt(rate * (1 - rate) / independent.size)
    assert abs(independent.mean() - (1 - rate)) < 3 * deviation
    # Each single unit is kept as often: the worst of 2048 lies within five deviations, at odds of one in a thousand.
    unit = math.sqrt(rate * (1 - rate) / draws)
    assert np.abs(independent.mean(0) - (1 - rate)).max() < 5 * unit
    assert np.abs(np.asarray(out).mean(0) - 1).max() < 5 * unit / (1 - rate)


def test_a_broadcast_mask_is_one_for_all_tokens_and_another_for_each_row_and_channel() -> None:
    out = np.asarray(dropout(ONES, jax.random.key(0), rate=0.5, broadcast_time=True))
    assert (out == out[:, :1]).all()
    assert len({row[0].tobytes() for row in out}) == 4
    free = np.asarray(dropout(ONES, jax.random.key(0), rate=0.5, broadcast_time=False))
    assert (free != free[:, :1]).any()


def test_the_key_decides_the_mask_and_no_key_or_no_rate_is_the_identity() -> None:
    draw = jax.jit(lambda key: dropout(ONES, key, rate=0.5, broadcast_time=False))
    one, again, other = draw(jax.random.key(3)), draw(jax.random.key(3)), draw(jax.random.key(4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.4
    assert dropout(ONES, None, rate=0.5, broadcast_time=False) is ONES
    assert dropout(ONES, jax.random.key(0), rate=0.0, broadcast_time=False) is ONES


def test_dropped_units_have_a_gradient_of_exactly_zero_even_where_they_are_not_finite() -> None:
    key = jax.random.key(0)
    out, pullback = jax.vjp(lambda x: dropout(x, key, rate=0.5, broadcast_time=False), ONES)
    (grad,) = pullback(jnp.ones_like(out))
    np.testing.assert_array_equal(grad, jnp.where(out == 0, 0.0, 2.0))
    infinite = dropout(jnp.where(out == 0, jnp.inf, 1.0), key, rate=0.5, broadcast_time=False)
    assert jnp.isfinite(infinite).all()


def test_dropout_keeps_the_dtype() -> None:
    assert dropout(ONES.astype(jnp.bfloat16), jax.random.key(0), rate=0.1, broadcast_time=True).dtype == jnp.bfloat16
