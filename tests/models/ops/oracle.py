"""What the tests of the ops share: a way to run an op in float64 and in float32 against a NumPy loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def agree(op: Callable[..., Any], expected: np.ndarray, *arrays: np.ndarray) -> None:
    """The op gives `expected` of the arrays: in float64 to 1e-10 and in float32 to 1e-5 of the largest magnitude."""
    scale = np.abs(expected).max()
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"):
            given = [jnp.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else None) for a in arrays]
            found = jax.jit(op)(*given)
            assert found.dtype == dtype and found.shape == expected.shape
            np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * scale, err_msg=dtype)


def gradients_agree(op: Callable[..., Any], *arrays: np.ndarray) -> None:
    """Every gradient of a random weighting of the op is the central difference of it, in float64 to 1e-7."""
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in arrays]
        weights = jnp.asarray(rng.standard_normal(jax.eval_shape(op, *wide).shape))

        @jax.jit
        def total(*values: jax.Array) -> jax.Array:
            return (op(*values) * weights).sum()

        grads = jax.jit(jax.grad(total, argnums=tuple(range(len(wide)))))(*wide)
        for index, (value, grad) in enumerate(zip(wide, grads, strict=True)):
            for _ in range(3):
                direction = jnp.asarray(rng.standard_normal(value.shape))
                moved = [
                    total(*wide[:index], value + sign * 1e-6 * direction, *wide[index + 1 :]) for sign in (1.0, -1.0)
                ]
                slope, found = float(moved[0] - moved[1]) / 2e-6, float((grad * direction).sum())
                assert abs(found - slope) <= 1e-7 * max(1.0, float(jnp.abs(grad).max())) * value.size**0.5, index
